"""Pictures of one's own: cleaning, classifying, contact sheets, and the page."""

import csv
import importlib.util
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from chromium import Page, find_chromium
from commands import DATA, ENVIRONMENT, REPO, free_port, run_forked, whole_set
from conftest import train_once
from PIL import Image, ImageDraw, ImageFont

import demo
from cli.command import parse_command_line
from cli.flags import PREDICT_FLAGS, help_text
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from datamodules.files.finding import SYSTEM_DIR, load
from datamodules.files.pictures import LONGEST_EDGE, PictureError, find_pictures, read_picture
from errors import UserError
from inspection.layer_cam import explained_stage, layer_cam
from inspection.stages import stage_modules
from lit_modules import LitClassifier
from lit_modules.initialization import he_initialization
from models import VGG, AlexNet, GoogLeNet, LeNet, NiN
from pictures.cleaning import as_fashion_mnist
from pictures.contact_sheet import COLUMNS, Tile, contact_sheet, thumbnail
from pictures.mistakes import Mistake, explain_mistakes
from pictures.sheet import fitting, legible

# ---- One's own pictures: what is read, what the network gets to see, and what it makes of them.

EDGE = 300


def shirt(draw, ink):
    corners = [(110, 50), (134, 62), (166, 62), (190, 50), (264, 97), (240, 140), (207, 120), (207, 260)]
    draw.polygon([*corners, (93, 260), (93, 120), (60, 140), (36, 97)], fill=ink)


def trouser(draw, ink):
    draw.polygon([(110, 27), (190, 27), (200, 277), (163, 277), (150, 100), (137, 277), (100, 277)], fill=ink)


def bag(draw, ink):
    draw.rounded_rectangle((50, 127, 250, 253), 13, fill=ink)
    draw.arc((93, 53, 207, 207), 180, 360, fill=ink, width=13)


def ankle_boot(draw, ink):
    corners = [(160, 40), (253, 40), (257, 253), (217, 253), (213, 233), (187, 253), (43, 253), (40, 230)]
    draw.polygon([*corners, (67, 203), (133, 180), (157, 143)], fill=ink)


SENSIBLE = {
    shirt: {"T-shirt/top", "Shirt"},
    trouser: {"Trouser"},
    bag: {"Bag"},
    ankle_boot: {"Ankle boot"},
}


def drawing(shape, ink="#303040", ground="white", mode="RGB"):
    picture = Image.new(mode, (EDGE, EDGE), ground)
    shape(ImageDraw.Draw(picture), ink)
    return picture


def photograph(image, generator):
    """An image of the data set as a large noisy JPEG, dark on an unevenly lit light ground, off its centre."""
    scale = int(generator.integers(8, 15))
    garment = np.asarray(Image.fromarray(image).resize((28 * scale, 28 * scale), Image.Resampling.BICUBIC), float)
    height, width = 28 * scale + generator.integers(20, 200, 2)
    top = generator.integers(5, height - 28 * scale - 5)
    left = generator.integers(5, width - 28 * scale - 5)
    canvas = np.zeros((height, width))
    canvas[top : top + 28 * scale, left : left + 28 * scale] = garment
    light = generator.uniform(225, 245) + np.linspace(-8, 8, width)
    noisy = light * (1 - canvas / 255) + generator.normal(0, 6, canvas.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert("RGB").save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB")


def box(image, threshold=25):
    """Rows and columns, first and last, of what is not dark."""
    rows, columns = np.flatnonzero((image > threshold).any(1)), np.flatnonzero((image > threshold).any(0))
    return rows[0], rows[-1], columns[0], columns[-1]


# Reading


def test_folders_are_searched_in_order_and_files_taken_as_they_stand(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/c.webp", "notes.txt", "record.json", "phone.HEIC", "._a.jpg", ".trash/d.jpg"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    odd = tmp_path / "no suffix"
    found = find_pictures([odd, tmp_path / "pictures"])
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["no suffix", "pictures/a.jpg", "pictures/b.PNG", "pictures/phone.HEIC", "pictures/deep/c.webp"]


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "12 bits")),
        *((mode, "tiff") for mode in ("CMYK", "F", "I;16", "LA", "RGBA")),
        *((mode, "jpg") for mode in ("L", "RGB", "CMYK")),
        ("RGB", "webp"),
        ("RGB", "gif"),
        ("RGB", "bmp"),
        ("RGB", "ppm"),
    ],
)
def test_colours_of_any_kind_are_read(tmp_path, mode, suffix):
    picture = drawing(trouser, ink="black", ground="#f0f0f0")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    elif mode == "12 bits":  # as scanners and cameras write them into 16
        grey = np.asarray(picture.convert("L"), np.uint16)
        picture = Image.fromarray(grey * 16 + grey // 16)
    elif mode == "F":
        picture = Image.fromarray(np.asarray(picture.convert("L"), np.float32) / 255)
    else:
        picture = picture.convert(mode)
    path = tmp_path / f"picture.{suffix}"
    picture.save(path)
    read = read_picture(path)
    assert read.size == (EDGE, EDGE)
    assert read.mode in ("RGB", "RGBA")
    grey = np.asarray(read.convert("RGB"), int).mean(axis=2)
    assert grey[10, 10] == pytest.approx(240, abs=40)  # the palette of GIF is coarse
    assert grey[60, 150] < 20


@pytest.mark.skipif(sys.platform != "linux", reason="needs a disk on which names are any bytes")
@pytest.mark.parametrize("name", [b"scan.png", b"sc\xe4n.png"])
def test_deep_colours_are_read_whatever_bytes_a_name_has(tmp_path, name):
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + np.full((6, 3), (4095, 2048, 0), ">u2").tobytes()  # 12 of 16 bits, which Pillow can't write
    header, pixels = struct.pack(">IIBBBBB", 6, 8, 16, 2, 0, 0, 0), zlib.compress(row * 8)
    path = tmp_path / os.fsdecode(name)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    read = read_picture(path)
    assert (read.mode, read.size, read.getpixel((5, 7))) == ("RGB", (6, 8), (255, 128, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_cameras_orientation_is_undone(tmp_path, orientation):
    upright = drawing(ankle_boot)
    ways = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # how a camera's sensor saw it: flips and turns of Pillow's
    stored = upright.transpose(Image.Transpose(ways[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "photo.png")), np.asarray(upright))


def test_broken_orientation_does_not_matter(tmp_path):
    path = tmp_path / "photo.jpg"
    drawing(bag).save(path, exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert read_picture(path).size == (EDGE, EDGE)


def test_large_photographs_are_not_decoded_whole(tmp_path):
    drawing(bag).resize((6000, 4500)).save(tmp_path / "photo.jpg")
    width, height = read_picture(tmp_path / "photo.jpg").size
    assert LONGEST_EDGE <= width < 6000
    assert width / height == pytest.approx(4 / 3, rel=0.01)


def unreadable(folder):
    """A path of each kind that can't be read, and what is said of it."""
    paths = {name: folder / name for name in ("gone.png", "text.png", "cut.jpg", "bomb.png", "empty.png", "run.eps")}
    paths["text.png"].write_text("no picture")
    paths["empty.png"].touch()
    drawing(bag).save(paths["cut.jpg"])
    paths["cut.jpg"].write_bytes(paths["cut.jpg"].read_bytes()[:2000])
    Image.new("1", (10_000, 10_000)).save(paths["bomb.png"])
    drawing(bag).save(paths["run.eps"])
    os.mkfifo(folder / "pipe.png")
    return {
        folder / "pipe.png": "is not a file",
        paths["gone.png"]: "does not exist",
        paths["text.png"]: "is not a picture that can be read",
        paths["empty.png"]: "is not a picture that can be read",
        paths["cut.jpg"]: "can't be read: image file is truncated",
        paths["bomb.png"]: "has more than 89,478,485 pixels",
        paths["run.eps"]: "is not a picture that can be read",  # PostScript is a program
    }


def test_what_cannot_be_read_is_named(tmp_path):
    for path, reason in unreadable(tmp_path).items():
        with pytest.raises(PictureError, match=re.escape(reason)):
            read_picture(path)


def test_reading_leaves_the_filters_of_warnings_alone(tmp_path, monkeypatch):
    """Threads share them."""
    drawing(bag).save(tmp_path / "bag.png")
    filters, opened = list(warnings.filters), Image.open
    seen = []

    def watched(*args, **settings):
        seen.append(list(warnings.filters))
        return opened(*args, **settings)

    monkeypatch.setattr(Image, "open", watched)
    read_picture(tmp_path / "bag.png")
    assert seen == [filters]


# What the network sees


@pytest.mark.parametrize(("size", "expected"), [((100, 400), (0, 27, 11, 17)), ((400, 100), (11, 17, 0, 27))])
def test_longest_edge_becomes_28_and_odd_margins_lie_left_and_top(size, expected):
    picture = Image.new("RGB", (900, 700), "white")
    picture.paste("black", (250, 37, 250 + size[0], 37 + size[1]))
    image = as_fashion_mnist(picture)
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert box(image) == expected
    assert image.max() > 250


@pytest.mark.parametrize(
    ("ink", "ground", "invert", "light_on_dark"),
    [
        ("#202020", "white", "auto", True),
        ("white", "#202020", "auto", True),
        ("#a02020", "#e8e0d0", "auto", True),
        ("#e0e0e0", "#787878", "auto", True),  # a ground that is neither light nor dark
        ("#202020", "#787878", "auto", True),
        ("#202020", "white", "always", True),
        ("white", "#202020", "never", True),
        ("#202020", "white", "never", False),
        ("white", "#202020", "always", False),
    ],
)
def test_negated_when_the_ground_is_lighter_or_as_told(ink, ground, invert, light_on_dark):
    image = as_fashion_mnist(drawing(bag, ink, ground), invert)
    assert image[0, 0] == 0  # the ground is exactly black
    assert (image[14:26, 4:24].mean() > 100) == light_on_dark


def test_transparent_ground_contrasts_with_the_object():
    clear = (0, 0, 0, 0)
    seen = [as_fashion_mnist(drawing(bag, ink, clear, "RGBA")) for ink in ((250, 250, 250, 255), (20, 20, 20, 255))]
    for image in seen:
        assert image[20, 14] > 200
        assert image[0, 0] == 0


def test_a_large_transparent_picture_takes_little_memory():
    picture = drawing(bag, (20, 20, 20, 255), (0, 0, 0, 0), "RGBA").resize((3000, 3000))
    tracemalloc.start()
    try:
        assert as_fashion_mnist(picture)[20, 14] > 200
        assert tracemalloc.get_traced_memory()[1] < 64e6  # NumPy's; whole, it would take 700 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("negative", [False, True])
def test_images_of_the_data_set_stay_as_they_are(negative):
    for image in load(DATA, "test")[0][:50].numpy():
        given = 255 - image if negative else image
        assert np.array_equal(as_fashion_mnist(Image.fromarray(given).convert("RGB")), image)


@pytest.mark.parametrize("ground", ["white", "black", "#777777"])
def test_blank_pictures_are_refused(ground):
    with pytest.raises(ValueError, match="nothing that stands out"):
        as_fashion_mnist(Image.new("RGB", (200, 100), ground))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 5), (27, 29)])
def test_tiny_pictures_are_seen_or_refused(size):
    picture = Image.new("RGB", size, "white")
    picture.putpixel((size[0] // 2, size[1] // 2), (0, 0, 0))
    try:
        assert as_fashion_mnist(picture).shape == (28, 28)
    except ValueError as error:
        assert "stands out" in str(error)


def test_noise_and_uneven_light_do_not_move_the_object():
    generator = np.random.default_rng(0)
    clean = np.asarray(drawing(trouser, "black"), float)
    light = np.linspace(0.85, 1, EDGE)[:, None, None]
    noisy = (clean * light + generator.normal(0, 8, clean.shape)).clip(0, 255).astype(np.uint8)
    expected, seen = as_fashion_mnist(drawing(trouser, "black")), as_fashion_mnist(Image.fromarray(noisy))
    assert np.abs(np.array(box(seen)) - box(expected)).max() <= 1
    assert seen[0, 0] < 25


def test_garments_are_cut_out_of_a_patterned_ground():
    tiles = np.random.default_rng(0).normal((140, 105, 70), 12, (EDGE // 15, EDGE // 15, 3))
    picture = Image.fromarray(tiles.clip(0, 255).astype(np.uint8)).resize((EDGE, EDGE), Image.Resampling.NEAREST)
    shirt(ImageDraw.Draw(picture), "#4078a8")  # another colour, as light as the tiles
    seen, expected = as_fashion_mnist(picture) > 25, as_fashion_mnist(drawing(shirt, "black")) > 25
    assert (seen & expected).sum() > 0.6 * (seen | expected).sum()


# Accuracy


LENET, VGG11 = REPO / "weights" / "lenet.ckpt", REPO / "weights" / "vgg11_quarter.ckpt"


@pytest.fixture(scope="module")
def checkpoint():
    """The same on every machine, as what is measured with a network that was trained here would not be."""
    return LENET


@pytest.fixture(scope="module")
def full_set():
    if (folder := whole_set()) is None:
        pytest.skip(f"the full data set lies neither in data/ nor in {SYSTEM_DIR}")
    return folder


@pytest.fixture(scope="module")
def full_checkpoint(full_set, tmp_path_factory):
    return train_once("full", tmp_path_factory, "--model=lenet", "--max_epochs=2", f"--data_dir={full_set}").best


def classify(path, images):
    classifier = LitClassifier.load_from_checkpoint(path)
    data = FashionMNISTDataModule.load_from_checkpoint(path)
    return classifier.probabilities(data.preprocess(torch.from_numpy(np.stack(images)))).argmax(dim=1)


def accuracies(path, images, labels):
    generator = np.random.default_rng(0)
    photographs = [as_fashion_mnist(photograph(image, generator)) for image in images]
    return [float((classify(path, kind) == labels).float().mean()) for kind in (images, photographs)]


def test_photographs_of_the_sample_are_recognized_like_the_originals(checkpoint):
    images, labels = load(DATA, "test")
    originals, photographs = accuracies(checkpoint, images[:250].numpy(), labels[:250])
    assert originals > 0.7
    assert photographs > originals - 0.01


@pytest.mark.slow
@pytest.mark.long
def test_photographs_of_the_full_set_are_recognized_like_the_originals(full_set, full_checkpoint):
    images, labels = load(full_set, "test")
    originals, photographs = accuracies(full_checkpoint, images[:1500].numpy(), labels[:1500])
    assert originals > 0.84
    assert photographs > originals - 0.01


@pytest.mark.parametrize(("ink", "ground"), [("#303040", "white"), ("#d8d8d8", "#101010"), ("#803020", "#e8e4dc")])
def test_silhouettes_are_recognized(checkpoint, ink, ground):
    images = [as_fashion_mnist(drawing(shape, ink, ground)) for shape in SENSIBLE]
    for guess, sensible in zip(classify(checkpoint, images), SENSIBLE.values(), strict=True):
        assert CLASS_NAMES[guess] in sensible


# The command


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for shape in SENSIBLE:
        drawing(shape).save(folder / f"{shape.__name__}.png")
    return folder


def predict(checkpoint, folder, *arguments):
    flags = ("predict", "--accelerator=cpu", f"--ckpt_path={checkpoint}", "--data_dir=nowhere")
    return run_forked(*flags, *arguments, folder=folder)


def test_flags_take_several_values():
    line = "predict --images a.jpg b --invert=never --ckpt_path x.ckpt --output a.csv b.png --gradcam --images c"
    command = parse_command_line(line.split())
    assert command is not None
    assert command.images == [Path("a.jpg"), Path("b"), Path("c")]
    assert command.output == [Path("a.csv"), Path("b.png")]
    assert (command.invert, command.gradcam, command.ckpt_path) == ("never", True, "x.ckpt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model lenet --images a.jpg", "--images belongs to predict"),
        ("test --ckpt_path x.ckpt --gradcam", "--gradcam belongs to predict"),
        ("predict --ckpt_path x.ckpt --invert never", "--invert needs pictures"),
        ("predict --ckpt_path x.ckpt --images", "--images needs a value"),
        (
            "predict --ckpt_path x.ckpt --images a --invert yes",
            "--invert must be one of auto, always, never, got 'yes'",
        ),
        ("predict --ckpt_path x.ckpt --images a --output a.txt", "--output must be a file name that ends in .csv"),
        ("predict --model lenet --images a", "give --ckpt_path"),
    ],
)
def test_flags_in_the_wrong_place_are_refused(line, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_command_line(line.split())


def test_help_of_predict_fits_a_screen_and_names_the_flags():
    assert parse_command_line(["predict", "--help"]) is None
    lines = help_text(predict=True).splitlines()
    assert len(lines) <= 32
    assert max(map(len, lines)) <= 110
    for name in PREDICT_FLAGS:
        assert any(line.strip().startswith(name) for line in lines)
    assert any("predict --help" in line for line in help_text().splitlines())


def test_table_csv_json_and_contact_sheet_agree(checkpoint, tmp_path, pictures):
    answer = predict(checkpoint, tmp_path, "--images", "pictures", "--output", "a.csv", "out/b.json", "c.png")
    assert (answer.code, answer.err) == (0, "")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    content = json.loads((tmp_path / "out" / "b.json").read_text())
    assert content["skipped"] == []
    assert [row["picture"] for row in rows] == [row["picture"] for row in content["pictures"]]
    assert [row["picture"] for row in rows] == sorted(f"pictures/{shape.__name__}.png" for shape in SENSIBLE)
    for row, entry in zip(rows, content["pictures"], strict=True):
        shape = next(shape for shape in SENSIBLE if shape.__name__ in row["picture"])
        assert row["class_1"] in SENSIBLE[shape]
        assert sum(entry["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        ranked = sorted(entry["probabilities"].items(), key=lambda item: -item[1])[:3]
        assert [(guess["class"], guess["probability"]) for guess in entry["top"]] == ranked
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == [name for name, _ in ranked]
        assert float(row[ranked[0][0]]) == pytest.approx(ranked[0][1], abs=1e-6)
        name, probability = ranked[0]
        assert re.search(rf"{row['picture']} +{name} {probability:.1%}", answer.out)
    with Image.open(tmp_path / "c.png") as sheet:
        assert sheet.width > 900
    assert not (tmp_path / "nowhere").exists()  # the data set is not needed
    assert not (tmp_path / "outputs").exists()  # nor is a folder


def test_probabilities_are_those_of_three_lines_of_python(checkpoint, tmp_path, pictures):
    assert predict(checkpoint, tmp_path, "--images", "pictures/bag.png", "--output=a.json").code == 0
    given = json.loads((tmp_path / "a.json").read_text())["pictures"][0]["probabilities"]
    image = torch.from_numpy(as_fashion_mnist(read_picture(pictures / "bag.png")))
    classifier = LitClassifier.load_from_checkpoint(checkpoint)
    data = FashionMNISTDataModule.load_from_checkpoint(checkpoint)
    assert list(given.values()) == pytest.approx(classifier.probabilities(data.preprocess(image))[0].tolist(), abs=1e-5)


def test_broken_files_are_named_and_the_rest_goes_on(checkpoint, tmp_path, pictures):
    reasons = unreadable(pictures)
    evil = pictures / "\x1b[31m[red]Ünï\N{SNOWMAN}.png"
    drawing(trouser).save(evil)
    answer = predict(
        checkpoint, tmp_path, "--images", "pictures", *(str(path) for path in reasons if not path.exists())
    )
    assert answer.code == 0
    for path, reason in reasons.items():
        if path.suffix != ".eps":  # not searched for
            assert re.search(rf"skipped: .*{path.name} {re.escape(reason)}", answer.err)
    assert len(answer.err.splitlines()) == len(reasons) - 1
    assert "\x1b" not in answer.out
    assert re.search(r"\?\[31m\[red\]Ünï☃.png +Trouser", answer.out)
    assert "Wrote outputs/predict_0/pictures.png" in answer.out
    assert (tmp_path / "outputs/predict_0/pictures.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "empty"], "no picture could be read: empty holds none"),
        (["--images", "none.png"], "no picture could be read: none.png does not exist"),
        (["--images", "pictures", "--output", "pictures/bag.png/a.png"], "pictures/bag.png/a.png can't be written"),
        (["--images", "pictures"], "outputs can't be written: File exists"),
        (["--images", "pictures", "--output", "pictures/bag.png"], "pictures/bag.png is one of the pictures"),
    ],
)
def test_mistakes_answer_with_one_line(checkpoint, tmp_path, pictures, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "outputs").touch()
    answer = predict(checkpoint, tmp_path, *arguments)
    assert answer.code != 0
    assert answer.err.startswith(f"train.py: error: {message}")
    assert len(answer.err.splitlines()) == 1


def test_layer_cam_overlays(checkpoint, tmp_path, pictures):
    pytest.importorskip("captum")
    (tmp_path / "outputs" / "predict_7").mkdir(parents=True)  # heat maps don't mix with an earlier run's
    drawing(bag).save(pictures / f"{'é' * 125}.png")  # as long a name as a disk takes
    answer = predict(checkpoint, tmp_path, "--images", "pictures", "--gradcam", "--output", "a.png")
    assert (answer.code, answer.err) == (0, "")
    of_files = [*sorted(shape.__name__ for shape in SENSIBLE), "é" * 100]
    names = [f"{number}-{name}" for number, name in enumerate(of_files, start=1)]
    for name in names:
        with Image.open(tmp_path / "outputs" / "predict_8" / "gradcam" / f"{name}.png") as overlay:
            right = np.asarray(overlay.convert("RGB"), int)[60:280, 320:580]
            assert (right.max(axis=2) - right.min(axis=2)).max() > 60  # coloured


def test_worst_mistakes_of_the_test_images_are_explained(checkpoint, tmp_path):
    pytest.importorskip("captum")
    answer = predict(checkpoint, tmp_path, "--gradcam", f"--data_dir={DATA}")
    assert (answer.code, answer.err) == (0, "")
    path = tmp_path / "outputs" / "predict_0" / "mistakes.png"
    assert "Wrote the 16 most confident mistakes, explained, to outputs/predict_0/mistakes.png" in answer.out

    rows = list(csv.DictReader(path.with_name("predictions.csv").read_text().splitlines()))
    wrong = [row for row in rows if row["label"] != row["prediction"]]
    worst = sorted(wrong, key=lambda row: -float(row[row["prediction"]]))[:16]
    mistakes = [
        Mistake(
            int(row["image"]),
            CLASS_NAMES.index(row["label"]),
            CLASS_NAMES.index(row["prediction"]),
            float(row[row["prediction"]]),
        )
        for row in worst
    ]
    images = load(DATA, "test")[0][[mistake.image for mistake in mistakes]]
    net = LitClassifier.load_from_checkpoint(checkpoint).net
    data = FashionMNISTDataModule.load_from_checkpoint(checkpoint)
    expected = np.asarray(explain_mistakes(net, data, images, mistakes, CLASS_NAMES), int)
    with Image.open(path) as sheet:
        found = np.asarray(sheet.convert("RGB"), int)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) > 3).mean() < 0.001  # another batch, another rounding


class Blocks(torch.nn.Module):
    """Maps with negative values, from a list or the like, and a module that several layers share."""

    def __init__(self, container):
        super().__init__()
        first = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(inplace=True))
        self.blocks = container([first, torch.nn.Conv2d(8, 8, 3)])
        self.classifier = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
        self.shared = torch.nn.Identity()

    def forward(self, images):
        for block in self.blocks.children():
            images = self.shared(block(images))
        return self.shared(self.classifier(images))


def test_the_stages_within_nested_lists_are_found():
    inner = torch.nn.ModuleList([torch.nn.Conv2d(1, 1, 3), torch.nn.Sequential(torch.nn.ReLU())])
    net = torch.nn.Sequential(torch.nn.ModuleList([inner, torch.nn.Flatten()]))
    assert list(stage_modules(net).values()) == ["0.0.0", "0.0.1.0", "0.1"]


CONTAINERS = (
    torch.nn.ModuleList,
    lambda blocks: torch.nn.ModuleDict(dict(zip("ab", blocks, strict=True))),
    lambda blocks: torch.nn.Sequential(*blocks),
)


@pytest.mark.parametrize(
    ("network", "arguments", "size"),
    [
        *((Blocks, {"container": container}, 28) for container in CONTAINERS),
        (LeNet, {}, 28),
        (AlexNet, {"image_size": 67}, 67),
        (VGG, {"depth": 16, "width_divisor": 8, "image_size": 64, "batch_norm": True}, 64),
        (NiN, {}, 67),
        (GoogLeNet, {}, 64),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_layer_cam_of_every_network_leaves_no_trace(network, arguments, size):
    """In inference mode, as in a test; as it would be computed by hand, of a compiled network too."""
    pytest.importorskip("captum")
    torch.manual_seed(0)
    net = network(**arguments).apply(he_initialization)
    for parameter in net.classifier.parameters():  # as in fine-tuning, where parts are frozen
        parameter.requires_grad_(False)
    images = torch.rand(2, 1, size, size)
    classes = net.eval()(images).argmax(dim=1)
    net.train()
    before, state = {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    with torch.inference_mode():
        cams = layer_cam(net, images.clone(), classes.clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())

    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        return output.clone()  # a ReLU that follows may work in place

    handle = explained_stage(net.eval(), images).register_forward_hook(keep)
    net(images)[[0, 1], classes].sum().backward(inputs=kept)
    handle.remove()
    maps = (kept[0].grad.relu() * kept[0]).sum(dim=1).relu().detach()
    assert maps.any()
    assert torch.allclose(cams * maps.amax(dim=(1, 2), keepdim=True), maps, rtol=1e-3, atol=1e-6)
    net.compile()
    assert torch.equal(layer_cam(net, images, classes), cams)


# Names in any script


def boxes(text):
    """The characters of which Pillow's font draws its sign for a missing one."""
    font = ImageFont.load_default(14)
    missing = bytes(font.getmask("\uffff"))
    return [character for character in text if bytes(font.getmask(character)) == missing]


def test_names_that_the_font_cannot_show_are_escaped():
    assert boxes("照片.png") == ["照", "片"]
    for name, expected in {
        "plain.png": "plain.png",
        "cafe\u0301.png": "cafe.png",
        "照片.png": r"\u7167\u7247.png",
        "жук.png": r"\u0436\u0443\u043a.png",
        "5\N{SQUARE KG} \N{FULLWIDTH LATIN CAPITAL LETTER A}.png": "5kg A.png",
        "\N{ATHLETIC SHOE}.png": r"\U0001f45f.png",
    }.items():
        text = legible(name)
        assert text == expected
        assert not boxes(text)


def test_names_in_any_script_tell_pictures_apart():
    sheets = []
    for name in ("жук.png", "жёлтый жук.png"):
        tile = Tile(name, thumbnail(drawing(bag)), np.zeros((28, 28), np.uint8), [("Bag", 0.9)])
        sheets.append(np.asarray(contact_sheet([tile])))
    assert not np.array_equal(sheets[0], sheets[1])


# The contact sheet


def test_contact_sheet_has_room_for_all():
    tile = Tile("picture.png", thumbnail(drawing(bag)), np.zeros((28, 28), np.uint8), [("Bag", 0.9), ("Coat", 0.1)])
    widths, heights = zip(*(contact_sheet([tile] * count).size for count in (1, COLUMNS, COLUMNS + 1)), strict=True)
    assert widths[1] == widths[2] == COLUMNS * widths[0]
    assert heights[1] == heights[0]
    assert heights[2] == 2 * heights[0]


def test_long_names_lose_their_middle():
    font = ImageFont.load_default(14)
    text = fitting("a very long name of a picture that somebody took on holiday.png", 150)
    assert font.getlength(text) <= 150
    assert text.startswith("a very")
    assert text.endswith("day.png")
    assert fitting("short.png", 150) == "short.png"


# ---- The page of demo.py: its answers, and the whole of it in a browser.

CHROMIUM = find_chromium()
needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="the package gradio is missing")


def photo(index):
    """A test image as a photograph."""
    return photograph(load(DATA, "test")[0][index].numpy(), np.random.default_rng(index))


@pytest.fixture(scope="module")
def page():
    """The module; what Gradio's packages deprecate among themselves is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pictures import page
    return page


@needs_gradio
def test_networks_answer_beside_each_other(page, trained):
    networks = page.load_networks([LENET, trained.best, VGG11])
    titles = [network.title for network in networks]
    assert titles == [f"LeNet ({LENET})", f"LeNet ({trained.best})", "VGG · vgg11_quarter"]
    assert "61,706 parameters" in networks[0].facts
    assert "test accuracy" in networks[0].facts
    assert "test accuracy" not in networks[1].facts  # no list tells
    image = as_fashion_mnist(photo(1))
    shown, *parts = page.answers(networks, page.Seen(photo(1), image), titles[:2])
    assert np.array_equal(np.asarray(shown.resize((28, 28), Image.Resampling.NEAREST)), image)
    assert [card["visible"] for card in parts[::4]] == [True, True, False]
    for network, shares, note, heat in zip(networks[:2], parts[1:8:4], parts[2:8:4], parts[3:8:4], strict=True):
        pixels = network.data.preprocess(torch.from_numpy(image)[None])
        expected = network.classifier.probabilities(pixels)[0]
        score = network.classifier.out_of_distribution.score(network.classifier(pixels).detach())
        assert note.startswith(f"unfamiliar · 陌生度 {score.item():.1f}")
        assert list(shares.values()) == expected.tolist()
        assert heat["visible"]
        assert np.ptp(np.asarray(heat["value"]).reshape(-1, 3), axis=0).min() > 50  # neither blank nor grey alone
    assert parts[1] != parts[5]
    assert max(parts[1], key=parts[1].get) == "Pullover 套头衫"
    assert parts[9] is None
    assert not any(page.answers(networks, None, titles)[part] for part in (0, 2, 3, 6, 7, 10, 11))
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    assert networks[0].explain(noise).note.endswith("**not sure · 不确定**")
    networks[0].classifier.out_of_distribution = None  # of a checkpoint that is older
    assert networks[0].explain(noise).note == ""


@needs_gradio
def test_networks_of_other_pictures_answer_too(page, tmp_path):
    flags = (
        f"--model fast/1min --image_size 32 --data {DATA / 'photos'} --max_epochs 1 --accelerator cpu --data_dir made"
    )
    assert run_forked(*flags.split(), folder=tmp_path).code == 0
    checkpoint = tmp_path / "logs" / "fast" / "1min" / "version_0" / "checkpoints" / "best.ckpt"
    networks = page.load_networks([LENET, checkpoint])
    assert "classes of its own" in networks[1].facts and "classes" not in networks[0].facts
    picture = read_picture(next((DATA / "photos").rglob("*.jpg")))
    nothing = page.Seen(picture, None)  # as where no garment stands out
    shown, *parts = page.answers(networks, nothing, [network.title for network in networks])
    assert shown is None and parts[1] is None
    assert list(parts[5]) == list(networks[1].data.class_names)
    assert sum(parts[5].values()) == pytest.approx(1)
    assert networks[1].image(nothing).shape == (32, 32, 3)
    assert networks[1].stages(networks[1].image(nothing))[0][1] == "16×32×32 Conv2d"


@needs_gradio
def test_no_large_picture_stays_in_memory(page):
    seen = page._seen(drawing(bag, "black").resize((3000, 1500)))
    assert seen.picture.size == (1024, 512)
    assert seen.garment[20, 14] > 200


@needs_gradio
def test_there_is_no_heat_map_where_there_is_nothing_to_see(page):
    network = page.load_networks([LENET])[0]
    for parameter in network.classifier.net.parameters():
        torch.nn.init.zeros_(parameter)  # no part of the picture changes any class
    answer = network.explain(as_fashion_mnist(photo(1)))
    assert answer.heat is None
    assert list(answer.shares.values()) == pytest.approx([0.1] * 10)
    network.classifier.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    assert network.explain(as_fashion_mnist(photo(1))).heat is None  # no feature maps


# As in configs/fast: the last convolution of 7x7 is pooled before its ReLU.
FAST = {"width_divisor": 4, "image_size": 28, "batch_norm": True, "blocks": 3, "pool_first": True}


@pytest.mark.parametrize(
    ("network", "arguments", "side", "size"),
    [
        (LeNet, {}, 28, 10),
        (AlexNet, {}, 224, 12),
        (VGG, {"depth": 11, "width_divisor": 8}, 224, 14),
        (VGG, {"depth": 11, "width_divisor": 4, "image_size": 32, "batch_norm": True}, 32, 8),
        (NiN, {}, 224, 12),
        (GoogLeNet, {}, 96, 6),
        *((VGG, {"depth": depth, **FAST}, 28, 7) for depth in (11, 16)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_heat_maps_are_fine_enough_and_of_maps_without_negative_values(network, arguments, side, size):
    net, image = network(**arguments).eval(), torch.rand(1, 1, side, side)
    stage, outputs = explained_stage(net, image), []
    handle = stage.register_forward_hook(lambda module, inputs, output: outputs.append(output.clone()))
    net(image)
    handle.remove()
    assert [output.shape[2:] for output in outputs] == [(size, size)]
    assert outputs[0].min() == 0


def test_mistakes_at_the_page_answer_with_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    cases = [
        ([], "the page needs the package gradio: pip install -r requirements-extras.txt"),
        (["--port=0"], "--port must be an integer from 1 to 65535, got 0"),
        (["--prot=80"], "unrecognized arguments: --prot=80 (python demo.py --help)"),
    ]
    for arguments, message in cases:
        assert demo.main(arguments) == 2
        assert capsys.readouterr().err == f"demo.py: error: {message}\n"
    monkeypatch.setattr(demo, "WEIGHTS", tmp_path)
    assert demo.main([]) == 2
    assert "holds no weights; give the checkpoints of trained networks" in capsys.readouterr().err


@needs_gradio
def test_taken_port_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert demo.main([f"--port={port}"]) == 1
    expected = f"demo.py: error: 127.0.0.1:{port} can't be used: Address already in use; give another --port or --host"
    assert capsys.readouterr().err.splitlines() == [expected]


SHOWN = "[...document.querySelectorAll('.square img')].filter(image => image.naturalWidth > 0).length"
ANSWERS = (
    "[...document.querySelectorAll('.answer')].map(answer => "
    "[...answer.querySelectorAll('.confidence-set')].map(row => row.innerText))"
)
CAPTIONS = "[...document.querySelectorAll('#stages .caption-label')].map(caption => caption.innerText)"


@contextmanager
def served(folder, *arguments, stop, **variables):
    """The page, at the place that is given: its process ends by a signal, and leaves nothing of what was uploaded."""
    uploads = folder / "uploads"
    uploads.mkdir()
    port = free_port()
    command = [sys.executable, str(REPO / "demo.py"), *arguments, f"--port={port}"]
    environment = {**ENVIRONMENT, **variables, "TMPDIR": str(uploads)}
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"Open http://127.0.0.1:{port} in a browser" in server.stdout.readline()
        yield f"127.0.0.1:{port}"
        server.send_signal(stop)
        assert server.wait(30) == 0
        assert not [path for path in uploads.iterdir() if not path.name.startswith("torchinductor")]  # PyTorch's own
    finally:
        server.kill()
        server.communicate()


@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_page_in_a_browser(trained, page, tmp_path):
    """One page for all: it takes as long to start as everything that is done with it."""
    proxies = {"all_proxy": "socks5://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # which lead nowhere
    with ExitStack() as stack, served(tmp_path, str(trained.best), stop=signal.SIGINT, **proxies) as place:
        browser = stack.enter_context(closing(Page(str(CHROMIUM), tmp_path / "profile")))  # open while the page ends
        browser.send("Page.navigate", url=f"http://{place}")
        browser.wait("document.querySelector('#photograph input[type=file]') !== null")
        photo(1).save(tmp_path / "photo.jpg", quality=80)
        browser.upload("#photograph input[type=file]", tmp_path / "photo.jpg")
        ours = sorted((REPO / "weights").glob("*.ckpt"), key=lambda path: path.stat().st_size)
        networks = page.load_networks([*ours, trained.best])
        all_networks_answer_and_can_be_chosen(browser, networks, as_fashion_mnist(read_picture(tmp_path / "photo.jpg")))
        stages_are_opened(browser)
        browser.evaluate("document.querySelector('#photograph button[title=\"Remove Image\"]').click()")
        browser.wait(f"{SHOWN} == 0")
        (tmp_path / "broken.jpg").write_text("no picture", encoding="utf-8")
        browser.upload("#photograph input[type=file]", tmp_path / "broken.jpg")
        browser.wait("document.body.innerText.includes('The file is not a picture that can be read (PNG, JPEG')")
        assert "cannot identify" not in browser.evaluate("document.body.innerText")  # what Pillow says
        the_first_stroke_is_answered(browser, len(networks))
        # An address without a place is the picture itself (data:, blob:).
        assert {urlsplit(address).netloc for address in browser.requests} - {""} == {place}
        assert browser.errors == []


@needs_gradio
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_leaves_no_uploads(tmp_path):
    with served(tmp_path, stop=signal.SIGHUP):
        pass


def all_networks_answer_and_can_be_chosen(browser, networks, image):
    browser.wait(f"{SHOWN} == {len(networks) + 1}")
    for rows, network in zip(browser.evaluate(ANSWERS), networks, strict=True):
        shares = network.explain(image).shares
        top = sorted(shares, key=lambda name: -shares[name])[:3]
        assert [row.split("\n")[0] for row in rows] == top
        assert [int(row.split("\n")[-1].rstrip("%")) for row in rows] == [round(100 * shares[name]) for name in top]
    for count in (len(networks) - 1, len(networks)):  # the first is left out, and comes back
        browser.evaluate("document.querySelector('#networks input').click()")
        browser.wait(f"{SHOWN} == {count + 1} && {ANSWERS}.length == {count}")


def stages_are_opened(browser):
    lenet = ["6×28×28 Conv2d", "6×14×14 MaxPool2d", "16×10×10 Conv2d", "16×5×5 MaxPool2d", "400 Flatten"]
    lenet += ["120 Linear", "84 Linear", "10 Linear"]
    browser.wait(f"{CAPTIONS}.length == {len(lenet)}")
    assert [caption.strip() for caption in browser.evaluate(CAPTIONS)] == lenet
    browser.evaluate("document.querySelectorAll('#stages .thumbnail-item')[2].click()")
    browser.wait("document.querySelector('#stages [data-testid=detailed-image]')?.naturalWidth > 300")
    browser.evaluate("document.querySelector('#stages button[title=Close]').click()")
    browser.evaluate("document.querySelectorAll('#opened input')[1].click()")
    browser.wait(f"{CAPTIONS}[0]?.trim() == '16×32×32 Conv2d'")


def the_first_stroke_is_answered(browser, networks):
    browser.evaluate("[...document.querySelectorAll('button[role=tab]')].at(-1).click()")
    browser.wait("document.querySelector('#drawing canvas')?.offsetWidth > 300")
    browser.evaluate("window.scrollTo(0, 0)")
    box = "document.querySelector('#drawing canvas').getBoundingClientRect()"
    left, top = browser.evaluate(f"[{box}.left, {box}.top]")
    browser.drag((left + 60, top + 150), (left + 160, top + 150), (left + 260, top + 150))
    answered = f"{SHOWN} > 1 && {ANSWERS}.filter(rows => rows.length).length == {networks}"
    browser.wait(answered)
    for tab, shown in ((0, f"{SHOWN} == 0"), (-1, answered)):  # each with its own picture
        browser.evaluate(f"[...document.querySelectorAll('button[role=tab]')].at({tab}).click()")
        browser.wait(shown)
    browser.evaluate("document.querySelector('#drawing button').click()")
    browser.wait(f"{SHOWN} == 0")


# ---- What the network is not sure of.


def test_what_is_unlike_is_said_everywhere_and_comes_first(tmp_path):
    """A page of text among garments; more pictures than fit on one sheet."""
    best = REPO / "weights" / "lenet.ckpt"  # how unlike noise is to a network of the tests is a matter of chance
    garments, noise = load(DATA, "test")[0][:60], np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    folder = tmp_path / "some"
    folder.mkdir()
    for number, image in enumerate([*garments.numpy(), noise]):
        Image.fromarray(image).save(folder / f"{number:02}.png")
    output = [str(tmp_path / name) for name in ("a.json", "a.csv", "a.png")]
    flags = ["--accelerator=cpu", "--sort=unsure", f"--images={folder}", "--output", *output]
    answer = run_forked("predict", f"--ckpt_path={best}", *flags, folder=tmp_path)
    assert answer.code == 0, answer.err
    rows = json.loads((tmp_path / "a.json").read_text())["pictures"]
    scores = [row["out_of_distribution"] for row in rows]
    assert [row["not_sure"] for row in rows] == [score > 1 for score in scores]
    unsure = sum(row["not_sure"] for row in rows)
    assert 1 <= unsure < 30
    assert scores[:unsure] == sorted(scores[:unsure], reverse=True)
    margins = [np.subtract(*(np.float32(guess["probability"]) for guess in row["top"][:2])) for row in rows[unsure:]]
    assert margins == sorted(margins)
    assert next(row for row in rows if row["picture"].endswith("60.png"))["not_sure"]
    assert answer.out.count(" not sure") == unsure
    assert f"Not sure of {unsure} picture" in answer.out
    with (tmp_path / "a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["out_of_distribution"]) for row in table] == pytest.approx(scores, abs=1e-5)
    with Image.open(tmp_path / "a.png") as first, Image.open(tmp_path / "a-2.png") as second:
        assert first.height > 10 * second.height
        sheet = np.asarray(first.convert("RGB"))
    orange = np.array([0xD9, 0x48, 0x01])
    assert (sheet[:400] == orange).all(axis=2).any()
    model, data = (
        LitClassifier.load_from_checkpoint(best),
        FashionMNISTDataModule.load_from_checkpoint(best),
    )
    with torch.no_grad():
        expected = model.eval().out_of_distribution.score(model(data.preprocess(garments[:1])))  # type: ignore[union-attr]
    assert next(row for row in rows if row["picture"].endswith("00.png"))["out_of_distribution"] == pytest.approx(
        expected.item(), abs=1e-3
    )
