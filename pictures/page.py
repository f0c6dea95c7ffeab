"""`python demo.py`: a page that shows what several networks make of one picture, in English and Chinese."""

import base64
import io
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Read when Gradio is imported: no usage statistics, no check for a newer version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from PIL import Image, ImageOps

from datamodules import CLASS_NAMES
from datamodules.files.pictures import LONGEST_EDGE, PictureError, read_picture
from errors import RunError
from pictures.cleaning import as_fashion_mnist
from pictures.heat_map import EDGE
from pictures.networks import Network, Seen, load_networks

TOP = 3
EXAMPLES = Path(__file__).with_name("examples.png")  # a test image of each class, in the order of the classes
LARGEST_FILE = "64mb"
HOUR = 3600  # seconds after which uploads and answers are removed; the examples stay

TITLE = "Classic CNNs on Fashion-MNIST · 经典卷积网络"
HEADING = f"""# {TITLE}
Upload a photograph of one garment, shoe or bag on a plain background, or draw one and fill it in.
Each network says what it takes the picture for; warm colours mark what that answer rests on (LayerCAM).
It is not sure of what is stranger than 95 % of the images that it was validated on.
<br>上传一张照片（一件衣服、一只鞋（侧面）或一个包，背景尽量单一），或者自己画一件并涂满。
各个网络分别给出判断；暖色表示判断的依据（LayerCAM）。比 95 % 的验证图片更陌生的图片，标为“不确定”。"""
STAGES = """### What comes out of each stage · 每个阶段输出了什么
Click a stage to enlarge it: each small square is one feature map (of 64 at most), dark at its lowest value,
yellow at its highest.
<br>点击某个阶段可放大：每个小方格是一张特征图（最多显示前 64 张），最暗处值最小，最黄处值最大。"""
CSS = """
.gradio-container {max-width: 1240px !important; margin: auto}
.cards {display: grid !important; grid-template-columns: repeat(auto-fill, minmax(175px, 1fr)); align-items: start}
.card {gap: 8px !important}
.card .prose:not(.note, .note *) {min-height: 92px}
.card h3 {margin: 0 !important; font-size: 1rem !important}
.card p {margin: 0 !important; font-size: 0.75rem}
.square {aspect-ratio: 1}
.square img, #stages img {image-rendering: pixelated}
.answer .output-class {font-size: 1.1rem !important; padding: 6px 0 !important}
.answer .confidence-set {font: 0.75rem system-ui !important}
#stages .caption-label {font-size: 0.7rem; padding: 1px 5px}
#examples .gallery-item, #examples .gallery-item div {width: 64px; height: 64px}
#examples .gallery-item img {object-fit: contain}
"""
# Gradio's own sketchpad takes no stroke before its brush is picked.
PAD_EDGE = 320  # pixels
PAD = f"""<canvas width="{PAD_EDGE}" height="{PAD_EDGE}"
  style="display: block; border: 1px solid #bbb; cursor: crosshair; touch-action: none"></canvas>
<label>Pen · 画笔 <input type="range" min="4" max="60" value="16" style="width: 90px; vertical-align: middle"></label>
<input type="color" value="#303040" style="width: 36px; vertical-align: middle"> <button>Clear · 清除</button>"""
PAD_SCRIPT = """
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const [width, colour] = element.querySelectorAll("input");
const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const send = picture => trigger("submit", {picture});
canvas.addEventListener("pointerdown", event => {
  canvas.setPointerCapture(event.pointerId);
  Object.assign(pen, {lineCap: "round", lineJoin: "round", lineWidth: width.value, strokeStyle: colour.value});
  pen.beginPath();
  pen.moveTo(event.offsetX, event.offsetY);
  pen.lineTo(event.offsetX, event.offsetY);
  pen.stroke();
});
canvas.addEventListener("pointermove", event => {
  if (!event.buttons) return;
  pen.lineTo(event.offsetX, event.offsetY);
  pen.stroke();
});
canvas.addEventListener("pointerup", () => send(canvas.toDataURL("image/png").split(",")[1]));
element.querySelector("button").addEventListener("click", () => { clear(); send(null); });
clear();
"""


def answers(networks: Sequence[Network], seen: Seen | None, chosen: Sequence[str]) -> list[Any]:
    """What the page shows: the garment, then for each network its card, probabilities, note and heat map.

    Args:
        networks: The page's networks.
        seen: The picture; None if there is none.
        chosen: Titles of those that answer; the cards of the others are hidden.
    """
    garment = None if seen is None or seen.garment is None else Image.fromarray(seen.garment)
    shown: list[Any] = [garment and garment.resize((EDGE, EDGE), Image.Resampling.NEAREST)]
    for network in networks:
        asked = network.title in chosen
        image = network.image(seen) if asked and seen else None
        shares, note, heat = (None, "", None) if image is None else network.explain(image)
        shown += [gr.update(visible=asked), shares, note, gr.update(value=heat, visible=heat is not None)]
    return shown


def build(networks: Sequence[Network], folder: Path) -> gr.Blocks:
    """The page.

    Args:
        networks: Shown side by side, in this order.
        folder: For the files of the examples.
    """

    titles = [network.title for network in networks]

    def of_networks(seen: Seen | None, chosen: list[str]) -> list[Any]:
        return answers(networks, seen, chosen)

    def of_stages(seen: Seen | None, title: str) -> list[tuple[Image.Image, str]]:
        network = networks[titles.index(title)]
        image = seen and network.image(seen)
        return [] if image is None else network.stages(image)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown(HEADING)
        seen = gr.State()
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Photograph · 照片") as of_photographs:
                    photograph = gr.Image(
                        sources=["upload", "clipboard"], height=320, buttons=[], show_label=False, elem_id="photograph"
                    )
                    examples = [[str(file)] for file in _examples(folder)]
                    gr.Examples(examples, photograph, label="Examples · 示例", elem_id="examples")
                with gr.Tab("Drawing · 手绘") as of_drawings:
                    drawing = gr.HTML(html_template=PAD, js_on_load=PAD_SCRIPT, elem_id="drawing")
                chosen = gr.CheckboxGroup(titles, value=titles, label="Networks · 网络", elem_id="networks")
            with gr.Column(scale=2, min_width=320), gr.Row(elem_classes="cards"):
                with gr.Column(elem_classes="card"):
                    gr.Markdown("### What they see · 网络看到的\n28 × 28 pixels · 像素")
                    outputs: list[Any] = [_picture()]
                for network in networks:
                    with gr.Column(elem_classes="card") as card:
                        gr.Markdown(f"### {network.title}\n{network.facts}")
                        label = gr.Label(num_top_classes=TOP, show_label=False, elem_classes="answer")
                        outputs += [card, label, gr.Markdown(elem_classes="note"), _picture()]
        gr.Markdown(STAGES)
        opened = gr.Radio(titles, value=titles[0], show_label=False, elem_id="opened")
        gallery = gr.Gallery(
            columns=6,
            height="auto",
            object_fit="contain",
            format="png",
            show_label=False,
            buttons=[],
            interactive=False,
            elem_id="stages",
        )
        # One picture at a time: LayerCAM and the stages hook into the networks.
        latest: Any = {"show_progress": "hidden", "trigger_mode": "always_last", "concurrency_limit": 1}
        latest["concurrency_id"] = "networks"
        uploaded, drawn = gr.State(), gr.State()
        # Not read by Gradio, so that our message says what is wrong with a file.
        of_file = photograph.change(partial(_photograph, folder), photograph, uploaded, preprocess=False)
        of_pad = drawing.submit(_drawing, None, drawn, trigger_mode="multiple")  # no stroke is lost
        for tab, read, picture in ((of_photographs, of_file, uploaded), (of_drawings, of_pad, drawn)):
            for comes_up in (tab.select, read.then):
                answer = comes_up(_same, picture, seen).then(of_networks, [seen, chosen], outputs, **latest)
                answer.then(of_stages, [seen, opened], gallery, **latest)
        chosen.change(of_networks, [seen, chosen], outputs, **latest)
        opened.change(of_stages, [seen, opened], gallery, **latest)
    return page


def serve(checkpoints: Sequence[Path], host: str, port: int, folder: Path, trust: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        checkpoints: Of the networks.
        host: Address to listen on.
        port: Its port.
        folder: For the files of the examples.
        trust: Let the checkpoints name any class.

    Raises:
        UserError: If a checkpoint can't be used.
        RunError: If the address is not free.
    """
    networks = load_networks(checkpoints, trust)
    page = build(networks, folder)
    system = ("system-ui", "sans-serif")  # the default fonts would be fetched from the internet
    try:
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            show_error=True,
            max_file_size=LARGEST_FILE,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            theme=gr.themes.Soft(font=system, font_mono=("ui-monospace", "monospace")),
            css=CSS,
        )
    except OSError as error:
        raise RunError(f"{host}:{port} can't be used: {str(error).partition('.')[0]}; give another --port") from None
    try:
        here = "127.0.0.1" if host == "0.0.0.0" else host  # Windows opens no 0.0.0.0
        print(f"Open http://{here}:{port} in a browser; Ctrl-C stops it.", flush=True)
        while True:
            time.sleep(1)  # Windows lets no Ctrl-C end a longer wait
    finally:
        page.close(verbose=False)


def _photograph(folder: Path, file: dict[str, Any] | None) -> Seen | None:
    """A file that was uploaded to `folder`; None, and a message, if it can't be used."""
    if file is None:
        return None
    path = Path(file["path"])
    try:
        if not path.resolve().is_relative_to(folder.resolve()):  # the browser names it, and could name any
            raise PictureError("was not uploaded")
        return _seen(read_picture(path))
    except PictureError as error:
        gr.Warning(f"The file {error}. · 无法使用该图片：请另存为 JPEG 或 PNG，过大的请先缩小。")
        return None


def _drawing(event: gr.EventData) -> Seen | None:
    """The pad; None if it was cleared."""
    if event.picture is None:
        return None
    with Image.open(io.BytesIO(base64.b64decode(event.picture)), formats=["PNG"]) as picture:
        # Of any other size it does not come from the pad, and might be one that fills the memory.
        return _seen(picture.convert("RGB")) if picture.size == (PAD_EDGE, PAD_EDGE) else None


def _seen(picture: Image.Image) -> Seen:
    garment = None
    try:
        garment = as_fashion_mnist(picture)
    except ValueError as error:
        gr.Warning(f"The picture {error}. · 图片上看不出主体。")
    picture.thumbnail((LONGEST_EDGE, LONGEST_EDGE))  # each visitor's last one stays in memory
    return Seen(picture, garment)


def _same(picture: Seen | None) -> Seen | None:
    return picture


def _picture() -> gr.Image:
    return gr.Image(format="png", interactive=False, show_label=False, buttons=[], elem_classes="square")


def _examples(folder: Path) -> list[Path]:
    """One test image of each class, large and on white like a photograph."""
    files = []
    with Image.open(EXAMPLES) as strip:
        for index, name in enumerate(CLASS_NAMES):
            image = ImageOps.invert(strip.crop((28 * index, 0, 28 * (index + 1), 28)))
            files.append(folder / f"{name.replace('/', '-')}.png")
            image.resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(files[-1])
    return files
