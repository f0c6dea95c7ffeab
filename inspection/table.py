"""The table of a network's stages, as the pages in docs/ and `--print_model` show it."""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

from torch import nn

from inspection.receptive_field import WHOLE, receptive_fields
from inspection.stages import Stage, stages

_MOST_ROWS = 25  # as many as a terminal shows without scrolling


class Row(NamedTuple):
    """A stage in words.

    Attributes:
        name: Name of the module within the network.
        what: Its layers: "2 × Conv2d 3×3".
        shape: Of its output for one image: "96×54×54".
        field: Its receptive field in pixels: "11×11"; None for the whole image.
        parameters: Number of its parameters.
        flops: Floating-point operations of its forward pass for one image.
    """

    name: str
    what: str
    shape: str
    field: str | None
    parameters: int
    flops: int


def table_rows(net: nn.Module, input_shape: tuple[int, int, int]) -> tuple[list[Row], Stage]:
    """The stages that have weights or change the shape, and the total; activations and dropout do neither.

    Args:
        net: The network.
        input_shape: Shape (C, H, W) of one image.

    Raises:
        NotImplementedError: If the network needs data.
        Exception: Whatever else the network raises for an image of that shape.
    """
    found, total = stages(net, input_shape)
    fields = receptive_fields(net, input_shape)
    rows, shape = [], input_shape
    for stage in found:
        if stage.parameters or stage.shape != shape:
            side = fields.get(stage.name, WHOLE)
            field = None if side == WHOLE else by((side, side))
            what = describe(net.get_submodule(stage.name))
            rows.append(Row(stage.name, what, by(stage.shape), field, stage.parameters, stage.flops))
        shape = stage.shape  # type: ignore[assignment]
    return rows, total


def table(net: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The stages as aligned text, 25 rows at most; "field" is the side of the receptive field in pixels."""
    try:
        rows, total = table_rows(net, input_shape)
    except NotImplementedError:
        return _without_stages(net)
    lines = [("stage", "layers", "output", "field", "parameters", "FLOPs"), ("input", "", by(input_shape), "", "", "")]
    lines += [
        (
            row.name,
            row.what,
            row.shape,
            (row.field or "all").partition("×")[0],
            f"{row.parameters:,}",
            _millions(row.flops),
        )
        for row in rows
    ]
    if len(rows) > _MOST_ROWS:
        half = _MOST_ROWS // 2
        left_out = f"... {len(rows) - 2 * half} more"
        lines = [*lines[: 2 + half], (left_out, "", "", "", "", ""), *lines[-half:]]
    lines.append(("total", total.kind, by(total.shape), "", f"{total.parameters:,}", _millions(total.flops)))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = [
        "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(len(line) for line in text)
    return _plain("\n".join([text[0], rule, *text[1:-1], rule, text[-1]]))


def short_table(net: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The network in three lines: its size, its parts, and how to see everything."""
    try:
        found, total = stages(net, input_shape)
    except NotImplementedError:
        return _without_stages(net)
    # A part is named by the network: features, classifier; its output is that of its last stage.
    parts = {stage.name.partition(".")[0]: stage.shape for stage in found}
    way = " -> ".join(["image " + by(input_shape), *(f"{name} {by(shape)}" for name, shape in parts.items())])
    return _plain(
        f"{total.kind}: {total.parameters:,} parameters, {_millions(total.flops)} FLOPs per image\n"
        f"{way if len(parts) < 6 else f'image {by(input_shape)} -> {len(parts)} parts -> {by(total.shape)}'}\n"
        "--print_model shows all stages"
    )


def _without_stages(net: nn.Module) -> str:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return f"{type(net).__name__}: {parameters:,} parameters; what it computes depends on data, so no shapes are known"


def describe(module: nn.Module) -> str:
    """What a stage consists of: `Conv2d 11×11 stride 4, 2 × Conv2d 1×1`."""
    parts = [" ".join(words) for words in map(words_of, leaves([module])) if words]
    runs = [(part, len(list(run))) for part, run in groupby(parts)]
    return ", ".join(f"{count} × {part}" if count > 1 else part for part, count in runs) or type(module).__name__


def leaves(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers in order, those inside Sequentials included; a block with its own class counts as one."""
    return [
        leaf
        for module in modules
        for leaf in (leaves(module.children()) if type(module) is nn.Sequential else [module])
    ]


def words_of(module: nn.Module) -> tuple[str, ...]:
    """Its class and what distinguishes it; empty for a module that has no weights and does no pooling."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        sides = (module.kernel_size, module.stride)
        kernel, stride = ((side, side) if isinstance(side, int) else tuple(side) for side in sides)
        step = str(stride[0]) if stride[0] == stride[1] else by(stride)
        return (name, by(kernel), f"stride {step}") if max(stride) > 1 else (name, by(kernel))
    weights = any(True for _ in module.parameters()) and not isinstance(module, nn.BatchNorm2d)
    return (name,) if weights or isinstance(module, nn.AdaptiveAvgPool2d) else ()


def by(shape: tuple[int, ...]) -> str:
    """A shape in words: "96×54×54"."""
    return "×".join(map(str, shape))


def _millions(flops: int) -> str:
    return f"{flops / 1e6:,.1f} M" if flops else "0"


def _plain(text: str) -> str:
    """The text for terminals of any encoding."""
    return text.replace("×", "x")
