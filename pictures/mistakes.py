"""The most confident mistakes, each beside its LayerCAM for the guess and for the true class."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from inspection.layer_cam import layer_cam
from pictures.heat_map import heat_map
from pictures.sheet import TRUE, WRONG, Entry, Line, drawable, sheet, square

EDGE = 112  # pixels of an image on the sheet
COLUMNS = 2
BATCH = 8  # their gradients take memory
HEADING = (
    "Each image, then the parts that made the network guess its class, and those that point to the true one.",
    "LayerCAM: from dark violet (nothing) to yellow (most); each heat map has its own scale.",
)


class Mistake(NamedTuple):
    """An image that the network got wrong with high confidence.

    Attributes:
        image: Place of the image in its evaluation set.
        label: Its true class.
        guess: The class that the network predicted.
        probability: How sure the network was, 0 to 1.
    """

    image: int
    label: int
    guess: int
    probability: float


def explain_mistakes(
    net: nn.Module, data: Any, images: Tensor, mistakes: Sequence[Mistake], class_names: Sequence[str]
) -> Image.Image:
    """A sheet of the mistakes, two in a row, with two heat maps each.

    Args:
        net: The network that made them.
        data: The data module; its `preprocess` gives what the network sees.
        images: The mistaken images (N, H, W) or (N, C, H, W) uint8, in the order of `mistakes`.
        mistakes: At least one.
        class_names: Names of the classes, in order.

    Raises:
        UserError: If the network has no feature maps.
    """
    device = next(net.parameters()).device
    labels = torch.tensor([mistake.label for mistake in mistakes], device=device)
    guesses = torch.tensor([mistake.guess for mistake in mistakes], device=device)
    heats: list[tuple[Tensor, Tensor]] = []
    for few, guess, label in zip(images.split(BATCH), guesses.split(BATCH), labels.split(BATCH), strict=True):
        batch = data.preprocess(few.to(device))
        heats += zip(layer_cam(net, batch, guess), layer_cam(net, batch, label), strict=True)
    entries = []
    for image, mistake, (wrong, true) in zip(map(drawable, images), mistakes, heats, strict=True):
        label_name, guess_name = class_names[mistake.label], class_names[mistake.guess]
        # In the image's own pixels: smooth pictures would take ten times the space in TensorBoard's logs.
        size = min(len(image), EDGE)
        small = [heat_map(image, heat, size) for heat in (wrong, true)]
        maps = [one.resize((EDGE, EDGE), Image.Resampling.NEAREST) for one in small]
        captions = (
            [Line(f"is {label_name}", TRUE)],
            [Line(f"{guess_name} {mistake.probability:.1%}", WRONG)],
            [Line(label_name, TRUE)],
        )
        entries.append(Entry((square(image, EDGE), *maps), captions))
    return sheet(entries, COLUMNS, EDGE, HEADING)
