"""The most confident mistakes, each beside what spoke for the class it was taken for and for its true class."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from callbacks.confusion import Mistake
from inspection.grad_cam import grad_cam, heat_map
from pictures.contact_sheet import FAINT, PAPER

SIZE, EDGE = 28, 112  # pixels of an image, and of its picture
GAP, LINE, MARGIN = 8, 20, 12
ROW = 3 * EDGE + 2 * GAP, EDGE + LINE
COLUMNS = 2
TRUE, WRONG = "#08519c", "#d94801"
BATCH = 8  # their gradients take memory
HEADING = (
    "Each image, then what spoke for the class it was taken for, and what for its true class.",
    "Grad-CAM: dark violet is nothing, yellow the most; each heat map has its own scale.",
)


def explain_mistakes(
    net: nn.Module, data: Any, images: Tensor, mistakes: Sequence[Mistake], class_names: Sequence[str]
) -> Image.Image:
    """A sheet of the mistakes, two in a row, with two heat maps each.

    Args:
        net: The network that made them.
        data: The data module; its `preprocess` tells what the network sees.
        images: Grey values (N, 28, 28) uint8 of the mistaken images, in the order of `mistakes`.
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
        heats += zip(grad_cam(net, batch, guess), grad_cam(net, batch, label), strict=True)

    columns = min(COLUMNS, len(mistakes))
    step = ROW[0] + 2 * MARGIN, ROW[1] + MARGIN
    font = ImageFont.load_default(13)
    head = MARGIN + len(HEADING) * LINE
    width = max(columns * step[0], round(max(map(font.getlength, HEADING))) + 2 * MARGIN)
    sheet = Image.new("RGB", (width, head + -(-len(mistakes) // columns) * step[1] + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(HEADING):
        draw.text((MARGIN, MARGIN // 2 + number * LINE), line, FAINT, font)
    for index, (image, mistake, (wrong, true)) in enumerate(zip(images.numpy(), mistakes, heats, strict=True)):
        left, top = MARGIN + index % columns * step[0], head + index // columns * step[1]
        label, guess = class_names[mistake.label], class_names[mistake.guess]
        for place, (picture, caption, ink) in enumerate(
            (
                (Image.fromarray(image), f"is {label}", TRUE),
                # In the image's own pixels: smooth pictures would take ten times the space in TensorBoard's logs.
                (heat_map(image, wrong, SIZE), f"{guess} {mistake.probability:.1%}", WRONG),
                (heat_map(image, true, SIZE), label, TRUE),
            )
        ):
            x = left + place * (EDGE + GAP)
            sheet.paste(picture.resize((EDGE, EDGE), Image.Resampling.NEAREST), (x, top))
            draw.text((x, top + EDGE + 1), caption, ink, font)
    return sheet
