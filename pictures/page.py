"""`python demo.py`: a page that shows what several networks make of one picture, in English and Chinese."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when Gradio is imported: no usage statistics, no check for a newer version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps

from checkpoints.reading import listed
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from datamodules.files.pictures import PictureError, read_picture
from errors import RunError, UserError
from inspection.grad_cam import grad_cam
from lit_modules import LitClassifier
from pictures.cleaning import as_fashion_mnist
from pictures.heat_map import EDGE, heat_map
from weights.trained import load_trained

TOP = 3
CHINESE = ("T恤", "裤子", "套头衫", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴")
NAMES = [f"{english} {chinese}" for english, chinese in zip(CLASS_NAMES, CHINESE, strict=True)]
EXAMPLES = Path(__file__).with_name("examples.png")  # a test image of each class, in the order of the classes
LARGEST_FILE = "64mb"

TITLE = "Classic CNNs on Fashion-MNIST · 经典卷积网络"
HEADING = f"""# {TITLE}
Upload a photograph of one garment, shoe or bag on a plain background, or draw one and fill it in.
Each network shows what it sees in the picture; warm colours mark where it looked (Grad-CAM).
<br>上传一张照片（一件衣服、一只鞋（侧面）或一个包，背景尽量单一），或者自己画一件并涂满。
各个网络分别给出判断；暖色表示判断的依据（Grad-CAM）。"""
CSS = """
.gradio-container {max-width: 1240px !important; margin: auto}
.cards {display: grid !important; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); align-items: start}
.card {gap: 8px !important}
.card .prose {min-height: 78px}
.card h3 {margin: 0 !important}
.card p {margin: 0 !important; font-size: 0.85rem}
.square {aspect-ratio: 1}
.square img {image-rendering: pixelated}
.answer .output-class {font-size: 1.2rem !important; padding: 6px 0 !important}
#examples .gallery-item, #examples .gallery-item div {width: 64px; height: 64px}
#examples .gallery-item img {object-fit: contain}
"""


@dataclass
class Network:
    """A trained network of the page.

    Attributes:
        title: Distinguishes it from the others.
        classifier: In evaluation mode.
        data: Knows how it wants its images.
        accuracy: On the test images, 0 to 1; None if no `weights.json` beside the checkpoint says.
    """

    title: str
    classifier: LitClassifier
    data: FashionMNISTDataModule
    accuracy: float | None = None

    @property
    def facts(self) -> str:
        """Size and accuracy."""
        parameters = sum(parameter.numel() for parameter in self.classifier.net.parameters())
        facts = f"{parameters:,} parameters · 参数"
        return facts if self.accuracy is None else f"{facts}<br>test accuracy · 测试准确率 {self.accuracy:.1%}"

    def explain(self, image: np.ndarray) -> tuple[dict[str, float], Image.Image]:
        """Calibrated probabilities of all classes for an image (28, 28) uint8, and the heat map of the likeliest."""
        batch = self.data.preprocess(torch.from_numpy(image)[None])
        probabilities = self.classifier.probabilities(batch)[0]
        cam = grad_cam(self.classifier.net, batch, probabilities.argmax()[None])[0]
        return dict(zip(NAMES, probabilities.tolist(), strict=True)), heat_map(image, cam)


def load_networks(checkpoints: Sequence[Path], trust: bool = False) -> list[Network]:
    """The networks of some checkpoints, each under its recipe's name, with the path if names repeat.

    Raises:
        UserError: If one can't be used.
    """
    loaded = [(path, *load_trained(path, trust)) for path in checkpoints]
    for path, _, data, _ in loaded:
        if tuple(data.class_names) != CLASS_NAMES:
            raise UserError(f"{path} was trained on pictures of other classes; the page is for Fashion-MNIST's")
    recipes = [str(checkpoint.get("recipe") or path.stem) for path, _, _, checkpoint in loaded]
    networks = []
    for recipe, (path, classifier, data, _) in zip(recipes, loaded, strict=True):
        title = recipe if recipes.count(recipe) == 1 else f"{recipe} ({path})"
        accuracy = listed(path).get("test_accuracy")
        networks.append(Network(title, classifier, data, accuracy))
    return networks


def answers(networks: Sequence[Network], picture: Image.Image | None) -> list[Any]:
    """What the networks see, then the probabilities and the heat map of each; None for each of them without a picture.

    Args:
        networks: The page's networks.
        picture: Of mode RGB or RGBA.
    """
    nothing: list[Any] = [None] * (1 + 2 * len(networks))
    if picture is None:
        return nothing
    try:
        image = as_fashion_mnist(picture)
    except ValueError as error:
        gr.Warning(f"The picture {error}. · 图片上看不出主体。")
        return nothing
    seen = Image.fromarray(image).resize((EDGE, EDGE), Image.Resampling.NEAREST)
    return [seen, *(part for network in networks for part in network.explain(image))]


def build(networks: Sequence[Network], folder: Path) -> gr.Blocks:
    """The page.

    Args:
        networks: Shown side by side, in this order.
        folder: For the files of the examples.
    """

    def of_photograph(path: str | None) -> list[Any]:
        try:
            return answers(networks, read_picture(Path(path)) if path else None)
        except PictureError as error:
            gr.Warning(f"The file {error}. · 无法读取该图片。")
            return answers(networks, None)

    def of_drawing(value: dict[str, Any] | None) -> list[Any]:
        drawing = value["composite"] if value else None
        blank = drawing is None or drawing.getextrema() == ((255, 255),) * 3
        return answers(networks, None if blank else drawing)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(HEADING)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                with gr.Tab("Photograph · 照片"):
                    photograph = gr.Image(
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        height=320,
                        buttons=[],
                        show_label=False,
                        elem_id="photograph",
                    )
                    examples = [[str(file)] for file in _examples(folder)]
                    gr.Examples(examples, photograph, label="Examples · 示例", elem_id="examples")
                with gr.Tab("Drawing · 手绘"):
                    drawing = gr.Sketchpad(
                        type="pil",
                        image_mode="RGB",
                        canvas_size=(400, 400),
                        fixed_canvas=True,
                        layers=False,
                        transforms=(),
                        buttons=[],
                        brush=gr.Brush(default_size=10, colors=["#303040", "#808090"], color_mode="fixed"),
                        placeholder="Pick the brush on the left · 先点左边的画笔",
                        show_label=False,
                        elem_id="drawing",
                    )
            with gr.Column(scale=2, min_width=320), gr.Row(elem_classes="cards"):
                with gr.Column(elem_classes="card"):
                    gr.Markdown("### What they see · 网络看到的\n28 × 28 pixels · 像素")
                    outputs: list[Any] = [_picture()]
                for network in networks:
                    with gr.Column(elem_classes="card"):
                        gr.Markdown(f"### {network.title}\n{network.facts}")
                        outputs.append(gr.Label(num_top_classes=TOP, show_label=False, elem_classes="answer"))
                        outputs.append(_picture())
        for asked, given in ((of_photograph, photograph), (of_drawing, drawing)):
            # One picture at a time: Grad-CAM hooks into the networks.
            given.change(
                asked,
                given,
                outputs,
                show_progress="hidden",
                trigger_mode="always_last",
                concurrency_limit=1,
                concurrency_id="networks",
            )
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
        print(f"Open http://{host}:{port} in a browser; Ctrl-C stops it.", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


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
