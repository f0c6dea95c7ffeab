"""The pictures of the pages in docs/, drawn as SVG from the networks themselves."""

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import nn

from cli.recipes import read_recipe
from errors import UserError
from inspection.stages import stages
from inspection.table import by, leaves, words_of

Shape = tuple[int, ...]
KINDS: dict[type, str] = {nn.Conv2d: "conv", nn.Linear: "linear"}  # names of colours
SHORT = {"Conv2d": ("conv",), "Linear": ("linear",), "MaxPool2d": ("pool", "max")}
SHORT |= {"AvgPool2d": ("pool", "average"), "AdaptiveAvgPool2d": ("pool", "average")}

# Recipe, and the text beside its network in the picture of all five.
FAMILY = (
    ("lenet", "LeNet 1998"),
    ("alexnet", "AlexNet 2012"),
    ("vgg11", "VGG-11 2014"),
    ("nin", "NiN 2013"),
    ("googlenet", "GoogLeNet 2014"),
)
LEGEND = {"input": "input", "conv": "convolution", "pool": "pooling", "linear": "linear layer", "other": "Inception"}
PIXEL, SLANT = 0.5, 0.22  # of that picture: units for each pixel of a map's side, and how far a map leans back


class Block(NamedTuple):
    """One solid of a picture: a layer, or several alike in a row; `layers` holds the words for each."""

    kind: str
    layers: tuple[tuple[str, ...], ...]
    shape: Shape
    parameters: int
    flops: int


def build(recipe: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network of a recipe, without memory for its weights, and the shape (C, H, W) of the images it is trained on.

    Raises:
        UserError: If there is no such recipe.
    """
    config = read_recipe(recipe)
    class_path, arguments = class_and_arguments(config["model"]["net"])
    network = resolve_name(class_path)
    size = config["data"].get("image_size", 28)
    if "image_size" in inspect.signature(network).parameters:
        arguments |= {"image_size": size}
    with torch.device("meta"):
        return network(**arguments), (config["data"].get("channels", 1), size, size)


def picture(recipe: str) -> str:
    """SVG of a network's stages at their real sizes, and each one's share of the cost.

    Raises:
        UserError: If there is no such recipe, or its network is not a plain sequence of layers and blocks.
    """
    net, input_shape = build(recipe)
    blocks = [Block("input", (("input",),), input_shape, 0, 0), *_blocks(net.children(), input_shape)]
    total = stages(net, input_shape)[1]
    if sum(block.parameters for block in blocks) != total.parameters or math.prod(blocks[-1].shape) != math.prod(
        total.shape
    ):
        raise UserError(f"the network of {recipe} does not run stage after stage, so its picture would be wrong")
    left, column, base = 84, 876 / len(blocks), 222
    parts = []
    for index, block in enumerate(blocks):
        middle = left + (index + 0.5) * column
        parts.append(_solid(block, middle, base, input_shape[1], column))
        for line, text in enumerate(_lines(block)):
            parts.append(_text(middle, 20 + 15 * line, text, "strong" if line == 0 else ""))
        parts.append(_text(middle, base + 20, str(block.shape[0]), "strong"))
        parts.append(_text(middle, base + 36, by(block.shape[1:]), "small"))
        for bottom, share in ((318, block.parameters / total.parameters), (382, block.flops / total.flops)):
            if share:
                height = max(1, 34 * share)
                parts.append(f'<rect class="bar" x="{middle - 13:.1f}" y="{bottom - height:.1f}" {_size(26, height)}/>')
                parts.append(_text(middle, bottom - height - 5, f"{100 * share:.0f}%" if share >= 0.005 else "<1%"))
    for y, text in ((base + 20, "channels"), (base + 36, "size"), (318, "parameters"), (382, "FLOPs")):
        parts.append(_text(10, y, text, "muted"))
    for y in (318, 382):
        parts.append(f'<path class="rule" d="M{left} {y + 0.5}H960"/>')
    return _svg(f"{type(net).__name__}, stage by stage", 396, parts)


def inception_picture(recipe: str = "googlenet", name: str = "features.stage3.0") -> str:
    """SVG of the branches of one Inception block, `name`, of a recipe's network."""
    net, input_shape = build(recipe)
    stage, _, _ = name.rpartition(".")
    modules = leaves(net.children())
    block = net.get_submodule(name)
    before = nn.Sequential(*modules[: modules.index(block)])
    shape = stages(before, input_shape)[1].shape
    total = stages(nn.Sequential(block), shape)[1]  # type: ignore[arg-type]
    parts = [_box(10, 115, 104, 60, "input", ("input", by(shape)))]
    for row, (_, branch) in enumerate(block.named_children()):
        y = 18 + 70 * row
        middle = y + 25
        blocks = _blocks([branch], shape)
        parts.append(
            f'<path class="arrow" d="M114 145C150 145 140 {middle} 176 {middle}H740C780 {middle} 770 145 806 145"/>'
        )
        for position, one in enumerate(blocks, start=2 - len(blocks)):
            cost = f"{one.parameters:,} parameters" if one.parameters else "no parameters"
            parts.append(
                _box(190 + 280 * position, y, 250, 50, one.kind, (f"{' '.join(_lines(one))} → {by(one.shape)}", cost))
            )
    parts.append(_box(806, 115, 144, 60, "other", ("concatenated", by(total.shape))))
    title = f"The Inception block {stage}.{name.rpartition('.')[2]}: {total.parameters:,} parameters"
    return _svg(title, 306, parts)


def family_picture(rows: Sequence[tuple[str, str]] = FAMILY) -> str:
    """SVG of several networks one below the other, everything to one scale.

    The side of a map is drawn to scale, its channels by their root, the units of a linear layer by their root; the
    areas of the squares on the right are to scale too.

    Args:
        rows: Recipe and title of each network.
    """
    parts = [_text(x, 22, text, "strong") for x, text in ((772, "parameters"), (892, "FLOPs"))]
    for left, (kind, text) in zip((118, 180, 278, 350, 442), LEGEND.items(), strict=True):
        parts.append(f'<g class="{kind}"><rect x="{left}" y="12" {_size(11, 11)}/></g>')
        parts.append(_text(left + 17, 22, text, "left"))
    networks = [(title, *build(recipe)) for recipe, title in rows]
    totals = [stages(net, shape)[1] for _, net, shape in networks]
    most = max(total.parameters for total in totals), max(total.flops for total in totals)
    base = 30.0
    for (title, net, input_shape), total in zip(networks, totals, strict=True):
        shares = total.parameters / most[0], total.flops / most[1]
        base += 56 + max(PIXEL * input_shape[1] * (1 + 0.6 * SLANT), 108 * math.sqrt(max(shares)))
        parts += [
            _text(10, base - 17, title.partition(" ")[0], "name"),
            _text(10, base, title.partition(" ")[2], "muted"),
        ]
        x = 118.0
        for block in [Block("input", (), input_shape, 0, 0), *_blocks(net.children(), input_shape)]:
            flat = len(block.shape) == 1 or block.shape[1] == 1
            height = 1.75 * math.sqrt(block.shape[0]) if flat else max(2.5, PIXEL * block.shape[1])
            width, depth = (6.0, 0.0) if flat else (1.1 * math.sqrt(block.shape[0]), SLANT * height)
            parts.append(_slab(block.kind, x, base, height, depth, width))
            parts.append(_text(x + width / 2, base + 16, str(block.shape[0 if flat else 1]), "small"))
            x += max(width + depth, 20) + 14
        for middle, share, count in ((772, shares[0], total.parameters), (892, shares[1], total.flops)):
            side = max(1.5, 108 * math.sqrt(share))
            parts.append(f'<rect class="bar" x="{middle - side / 2:.1f}" y="{base - side:.1f}" {_size(side, side)}/>')
            parts.append(_text(middle, base + 16, f"{count / 1e6:,.2f} M" if count < 1e9 else f"{count / 1e9:.2f} G"))
    return _svg("The five networks to one scale", round(base) + 36, parts)


def _blocks(modules: Iterable[nn.Module], input_shape: Shape) -> list[Block]:
    """The layers that a picture shows, in order; convolutions of one output shape in a row are one block."""
    layers = leaves(modules)
    rows, _ = stages(nn.Sequential(*layers), input_shape)  # type: ignore[arg-type]
    blocks: list[Block] = []
    for leaf, row in zip(layers, rows, strict=True):
        words = words_of(leaf)
        if not words:
            continue
        kind = KINDS.get(type(leaf), "pool" if "Pool" in words[0] else "other")
        block = Block(kind, (words,), row.shape, row.parameters, row.flops)
        before = blocks[-1] if blocks else block
        alike = (kind == before.kind == "conv" and row.shape == before.shape) or kind == before.kind == "other"
        if blocks and alike and row.shape[1:] == before.shape[1:]:
            costs = before.parameters + row.parameters, before.flops + row.flops
            blocks[-1] = Block(kind, (*before.layers, words), row.shape, *costs)
        else:
            blocks.append(block)
    return blocks


def _lines(block: Block) -> list[str]:
    """The text over a block, in a column that may be narrow."""
    lines: list[str] = []
    for (name, *details), run in groupby(block.layers):
        count = len(list(run))
        words = [*SHORT.get(name, (name,)), *details, *([f"×{count}"] if count > 1 else [])]
        lines += [" ".join(words)] if lines else words
    return lines


def _solid(block: Block, middle: float, base: float, image_size: int, column: float) -> str:
    """A box: its height stands for the map's side (by its root), its thickness for the channels (by their log)."""
    channels = block.shape[0]
    if len(block.shape) == 1:
        return _slab(block.kind, middle - 4.5, base, 10 + 9 * math.log2(channels), 0, 9)
    height = 118 * math.sqrt(block.shape[1] / image_size)
    width, depth = 3 + (column - 45) * min(1.0, math.log2(channels) / 10), 0.28 * height
    return _slab(block.kind, middle - (width + depth) / 2, base, height, depth, width)


def _slab(kind: str, x: float, base: float, height: float, depth: float, width: float) -> str:
    """A box seen from the front, the left and above, standing on `base`."""
    top, rise = base - height, depth * 0.6
    faces = f'<g class="{kind}"><rect x="{x:.1f}" y="{top:.1f}" {_size(width, height)}/>'
    if depth:
        faces += f'<path d="M{x:.1f} {top:.1f}l{depth:.1f} {-rise:.1f}h{width:.1f}l{-depth:.1f} {rise:.1f}z"/>'
        side = f"M{x + width:.1f} {top:.1f}l{depth:.1f} {-rise:.1f}v{height:.1f}l{-depth:.1f} {rise:.1f}z"
        faces += f'<path d="{side}"/><path class="shade" d="{side}"/>'
    return faces + "</g>"


def _box(x: float, y: float, width: float, height: float, kind: str, lines: tuple[str, ...]) -> str:
    middle = x + width / 2
    first = y + height / 2 + 4.5 - 8 * (len(lines) - 1)
    texts = "".join(_text(middle, first + 17 * index, line, "on") for index, line in enumerate(lines))
    return f'<g class="{kind}"><rect x="{x}" y="{y}" rx="5" {_size(width, height)}/></g>{texts}'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;")
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escaped}</text>'
        if style
        else f'<text x="{x:.1f}" y="{y:.1f}">{escaped}</text>'
    )


def _size(width: float, height: float) -> str:
    return f'width="{width:.1f}" height="{height:.1f}"'


STYLE = """
text{font:12.5px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328;text-anchor:middle}
.strong{font-weight:600}.name{font-weight:600;text-anchor:start}.left{text-anchor:start}.small{font-size:11.5px}.muted{text-anchor:start;fill:#59636e}.on{fill:#fff;font-weight:600}
.paper{fill:#fff}.rule{stroke:#d1d9e0}.bar{fill:#8c959f}.shade{fill:#000;fill-opacity:.25}
.arrow{fill:none;stroke:#8c959f;stroke-width:1.5}
g rect,g path{stroke:#fff;stroke-width:.8;stroke-linejoin:round}
.input{fill:#6e7781}.conv{fill:#2f6fc4}.pool{fill:#b35900}.linear{fill:#2a7f4f}.other{fill:#8250c4}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.muted{fill:#9198a1}.on{fill:#fff}.paper{fill:#0d1117}.rule{stroke:#3d444d}
g rect,g path{stroke:#0d1117}.conv{fill:#4184e4}.pool{fill:#c9721a}.linear{fill:#3a9a63}.other{fill:#986ee2}}
"""


def _svg(title: str, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 {height}" role="img"><title>{title}</title>'
    return "\n".join(
        [head, f"<style>{STYLE}</style>", f'<rect class="paper" {_size(960, height)}/>', *parts, "</svg>\n"]
    )


def class_and_arguments(value: Any) -> tuple[str, dict[str, Any]]:
    """The dotted name of a class in a recipe, and the arguments it is given there."""
    return (value, {}) if isinstance(value, str) else (value["class_path"], dict(value.get("init_args") or {}))
