"""`python train.py predict`: the three likeliest classes of your own pictures, and the worst mistakes explained."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules import FashionMNISTDataModule, PicturesDataModule
from datamodules.files.pictures import PictureError, find_pictures, read_picture
from errors import UserError, count, print_warning
from inspection.layer_cam import check_captum, layer_cam
from lit_modules import LitClassifier
from pictures.cleaning import Invert, as_fashion_mnist
from pictures.contact_sheet import Tile, contact_sheet, thumbnail
from pictures.heat_map import overlay
from pictures.mistakes import Mistake, explain_mistakes

TOP = 3
CAM_BATCH = 8  # their gradients take memory
ON_SHEET = 60  # pictures; more go to further pages
PAGES = 10
Sort = Literal["given", "unsure"]


@dataclass
class Pictures:
    """Pictures that were read, in the order of `paths`, and those that were not.

    Attributes:
        paths: Their files.
        images: What the network sees, (28, 28) uint8 each; of a folder (S, S) or (S, S, 3).
        scores: Of each, how unlike the validation images the network finds it; empty where it was not fitted to any.
        skipped: Files that can't be used, and why.
    """

    paths: list[Path] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def read_pictures(paths: Sequence[Path], invert: Invert, data: FashionMNISTDataModule) -> Pictures:
    """Read files and folders; what can't be read is reported and left out.

    Raises:
        UserError: If nothing could be read.
    """
    pictures, negated = Pictures(), 0
    for path in find_pictures(paths):
        try:
            if isinstance(data, PicturesDataModule):  # trained on pictures as they are
                picture = read_picture(path, data.stored_size)
                negated += (unlike := invert == "auto" and data.negates(picture))
                image = data.fit_picture(picture, "always" if unlike or invert == "always" else "never")
            else:
                image = as_fashion_mnist(read_picture(path), invert)
        except (PictureError, ValueError) as error:
            pictures.skipped.append((path, str(error)))
            continue
        pictures.paths.append(path)
        pictures.images.append(image)
    if not pictures.paths:
        reasons = "; ".join(f"{printable(path)} {reason}" for path, reason in pictures.skipped[:3])
        folders = ", ".join(printable(path) for path in paths)
        raise UserError(f"no picture could be read: {reasons or f'{folders} holds none'}")
    for path, reason in pictures.skipped:
        print_warning(f"skipped: {printable(path)} {reason}")
    if negated:
        print_warning(f"{count(negated, 'picture')} negated, as those trained on are dark; --invert never leaves them")
    return pictures


def predict_pictures(
    trainer: Trainer,
    model: LitClassifier,
    data: FashionMNISTDataModule,
    class_names: Sequence[str],
    *,
    ckpt_path: str,
    images: Sequence[Path],
    invert: Invert,
    output: Sequence[Path],
    sort: Sort,
    gradcam: bool,
    new_folder: Callable[[], Path],
) -> None:
    """Print the table and write the files.

    Args:
        trainer: Of one device.
        model: The classifier; its weights come from the checkpoint.
        data: Knows how the network wants its images; the data set itself is not needed.
        class_names: Names of the classes, in order.
        ckpt_path: The checkpoint.
        images: Pictures and folders of pictures.
        invert: Whether to negate; see `as_fashion_mnist` and `PicturesDataModule.fit_picture`.
        output: Files to write: .csv, .json, and .png for the contact sheet.
        sort: The order of table and files: as the pictures were given, or those first that the network is not sure of,
            then those where two classes are nearly as likely.
        gradcam: Also write a LayerCAM overlay of each picture.
        new_folder: Makes the folder for the contact sheet, if `output` names none, and for the overlays.

    Raises:
        UserError: If no picture could be read, or a file can't be written, or would take a picture's place.
    """
    if gradcam:
        check_captum()
    pictures = read_pictures(images, invert, data)
    _check_output(output, pictures)
    batches = DataLoader(_Batches(pictures.images, data), batch_size=None)
    logits: list[Tensor] = []
    hook = model.net.register_forward_hook(lambda module, inputs, output: logits.append(output.float().cpu()))
    outputs: Any = trainer.predict(model, batches, ckpt_path=ckpt_path, weights_only=True)
    hook.remove()
    probabilities = torch.cat(outputs).float().cpu()
    if model.out_of_distribution:
        pictures.scores = model.out_of_distribution.score(torch.cat(logits)).tolist()
    if sort == "unsure":
        probabilities = _put_unsure_first(pictures, probabilities)
    top = [_top(row, class_names) for row in probabilities]
    _print_table(pictures, top)
    own_sheet = any(path.suffix == ".png" for path in output)
    folder = new_folder() if gradcam or not own_sheet else Path()
    written = []
    for path in output if own_sheet else [*output, folder / "pictures.png"]:
        written += _write(path, pictures, probabilities, top, class_names)
    if gradcam:
        written += _write_overlays(trainer, model, data, pictures, top, class_names, folder / "gradcam")
    print(f"Wrote {', '.join(printable(path) for path in written)}")
    if len(pictures.paths) > ON_SHEET * PAGES:
        print(f"(The contact sheets show the first {ON_SHEET * PAGES} of {len(pictures.paths):,} pictures.)")


def _check_output(output: Sequence[Path], pictures: Pictures) -> None:
    """Never overwrite one of the user's pictures."""
    theirs = {path.resolve() for path in (*pictures.paths, *(path for path, _ in pictures.skipped))}
    for path in output:
        sheets = [_sheet(path, number) for number in range(1, PAGES + 1)] if path.suffix == ".png" else [path]
        if taken := next((sheet for sheet in sheets if sheet.resolve() in theirs), None):
            raise UserError(f"{printable(taken)} is one of the pictures; give another --output")


def write_mistakes(
    trainer: Trainer,
    model: LitClassifier,
    data: FashionMNISTDataModule,
    class_names: Sequence[str],
    mistakes: Sequence[Mistake],
    path: Path,
) -> None:
    """Write a sheet of the worst mistakes among the test images, with the parts behind the guess and the true class.

    Args:
        trainer: Has predicted the classes of the test images.
        model: The classifier.
        data: Holds the test images.
        class_names: Names of the classes, in order.
        mistakes: The worst ones.
        path: A PNG file.

    Raises:
        UserError: If the network has no feature maps, or the file can't be written.
    """
    if not mistakes:
        print("There is no mistake to explain.")
        return
    net = model.to(trainer.strategy.root_device).net
    images = data.test_set.images[[mistake.image for mistake in mistakes]]
    png = io.BytesIO()
    explain_mistakes(net, data, images, mistakes, class_names).save(png, "PNG", optimize=True)
    _write_bytes(path, png.getvalue())
    print(f"Wrote the {count(len(mistakes), 'most confident mistake')}, explained, to {printable(path)}")


def printable(path: Path) -> str:
    """The path without characters that control a terminal."""
    return "".join(character if character.isprintable() else "?" for character in str(path))


class _Batches(IterableDataset):
    """The images in batches, as the network sees them; each batch is prepared when it is needed."""

    def __init__(self, images: Sequence[np.ndarray], data: FashionMNISTDataModule) -> None:
        self.images = images
        self.data = data

    def __iter__(self) -> Iterator[list[Tensor]]:
        for first in range(0, len(self.images), self.data.eval_batch_size):
            yield [self.data.preprocess(as_batch(self.images[first : first + self.data.eval_batch_size]))]


def as_batch(images: Sequence[np.ndarray]) -> Tensor:
    """Images (H, W) or (H, W, 3) uint8 as (N, H, W) or (N, 3, H, W)."""
    batch = torch.from_numpy(np.stack(images))
    return batch if batch.dim() == 3 else batch.permute(0, 3, 1, 2)


def _top(probabilities: Tensor, class_names: Sequence[str]) -> list[tuple[str, float]]:
    values, classes = probabilities.topk(min(TOP, len(probabilities)))
    return [(class_names[index], value) for value, index in zip(values.tolist(), classes.tolist(), strict=True)]


def _put_unsure_first(pictures: Pictures, probabilities: Tensor) -> Tensor:
    """Put the pictures in that order; returns the rows of their probabilities (N, num_classes) in it."""
    first, second = probabilities.topk(2).values.unbind(dim=1)
    scores = torch.tensor(pictures.scores or [0.0] * len(first))
    order = torch.where(scores > 1, -scores, first - second).argsort(stable=True)  # an unsure one comes below 0
    for name in ("paths", "images", "scores"):
        values = getattr(pictures, name)
        setattr(pictures, name, [values[place] for place in order.tolist()] if values else values)
    return probabilities[order]


def _print_table(pictures: Pictures, top: Sequence[Sequence[tuple[str, float]]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right", style="dim")
    table.add_column("picture", overflow="fold")
    for title in ("likeliest class", "second", "third", *(["unfamiliar"] if pictures.scores else [])):
        table.add_column(title, no_wrap=True)
    for number, (path, guesses) in enumerate(zip(pictures.paths, top, strict=True), start=1):
        cells = [f"{name} {probability:.1%}" for name, probability in guesses] + [""] * (TOP - len(guesses))
        cells += [_in_words(pictures.scores[number - 1])] if pictures.scores else []
        table.add_row(str(number), Text(printable(path)), *map(Text, cells))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=Console(width=10_000).measure(table).maximum)  # one line a picture
    console.print(table)
    if unsure := sum(score > 1 for score in pictures.scores):
        print(f"Not sure of {count(unsure, 'picture')}: stranger than 95 % of the validation images.")


def _in_words(score: float) -> str:
    return f"{score:.1f} not sure" if score > 1 else f"{score:.1f}"


def _write(
    path: Path,
    pictures: Pictures,
    probabilities: Tensor,
    top: Sequence[Sequence[tuple[str, float]]],
    class_names: Sequence[str],
) -> list[Path]:
    """Write one file, or the pages of a contact sheet; returns their paths."""
    scores: list[Any] = pictures.scores or [None] * len(top)
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ranks = [f"{what}_{rank}" for rank in range(1, len(top[0]) + 1) for what in ("class", "probability")]
        writer.writerow(["picture", *ranks, *class_names, *(["out_of_distribution"] if pictures.scores else [])])
        for picture, guesses, row, score in zip(pictures.paths, top, probabilities.tolist(), scores, strict=True):
            cells = [cell for name, probability in guesses for cell in (name, f"{probability:.6f}")]
            values = [*row, *([] if score is None else [score])]
            writer.writerow([_text(picture), *cells, *(f"{value:.6f}" for value in values)])
        content = text.getvalue().encode()
    elif path.suffix == ".json":
        rows = [
            {
                "picture": _text(picture),
                "top": [{"class": name, "probability": probability} for name, probability in guesses],
                "probabilities": dict(zip(class_names, row, strict=True)),
                **({} if score is None else {"out_of_distribution": score, "not_sure": score > 1}),
            }
            for picture, guesses, row, score in zip(pictures.paths, top, probabilities.tolist(), scores, strict=True)
        ]
        skipped = [{"picture": _text(picture), "reason": reason} for picture, reason in pictures.skipped]
        content = (json.dumps({"pictures": rows, "skipped": skipped}, indent=1, ensure_ascii=False) + "\n").encode()
    else:
        return _write_sheets(path, pictures, top, scores)
    _write_bytes(path, content)
    return [path]


def _write_sheets(
    path: Path, pictures: Pictures, top: Sequence[Sequence[tuple[str, float]]], scores: Sequence[float | None]
) -> list[Path]:
    """Contact sheets of up to `ON_SHEET` pictures: a.png, a-2.png, a-3.png, ..."""
    written = []
    for first in range(0, min(len(pictures.paths), ON_SHEET * PAGES), ON_SHEET):
        tiles = []
        for place in range(first, min(first + ON_SHEET, len(pictures.paths))):
            file, image, score = pictures.paths[place], pictures.images[place], scores[place]
            try:
                small = thumbnail(read_picture(file))
            except PictureError:  # removed meanwhile
                small = thumbnail(Image.fromarray(image))
            note = "" if score is None or score <= 1 else f"not sure (unfamiliar {score:.1f})"
            tiles.append(Tile(printable(Path(file.name)), small, image, top[place], note))
        png = io.BytesIO()
        contact_sheet(tiles, first + 1).save(png, "PNG", optimize=True)
        written.append(_sheet(path, first // ON_SHEET + 1))
        _write_bytes(written[-1], png.getvalue())
    return written


def _sheet(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_stem(f"{path.stem}-{number}")


def _write_overlays(
    trainer: Trainer,
    model: LitClassifier,
    data: FashionMNISTDataModule,
    pictures: Pictures,
    top: Sequence[Sequence[tuple[str, float]]],
    class_names: Sequence[str],
    folder: Path,
) -> list[Path]:
    device = trainer.strategy.root_device
    net = model.to(device).eval().net
    width = len(str(len(pictures.paths)))
    numbers = iter(range(1, len(pictures.paths) + 1))
    for first in range(0, len(pictures.paths), CAM_BATCH):
        images = pictures.images[first : first + CAM_BATCH]
        batch = data.preprocess(as_batch(images).to(device))
        guesses = torch.tensor([class_names.index(row[0][0]) for row in top[first : first + CAM_BATCH]], device=device)
        for image, cam in zip(images, layer_cam(net, batch, guesses), strict=True):
            number = next(numbers)
            path, (name, probability) = pictures.paths[number - 1], top[number - 1][0]
            png = io.BytesIO()
            overlay(image, cam, f"{printable(Path(path.name))}: {name} {probability:.1%}").save(png, "PNG")
            stem = os.fsencode(path.stem)[:200].decode(errors="ignore")  # a file's name may have 255 bytes
            _write_bytes(folder / f"{number:0{width}}-{stem}.png", png.getvalue())
    return [folder]


def _write_bytes(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"{printable(path)} can't be written: {error.strerror}") from None


def _text(path: Path) -> str:
    """The path as text that can be encoded, whatever bytes a file's name has."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")
