"""Writes the tables of the pages in docs/, and the pictures they show, from the networks and recipes themselves.

    python -m docs.make_docs            # after a change to a network, a recipe or a page
    python -m docs.make_docs --check    # write nothing; exit 1 and name every page or picture that is stale

In a page, what stands between `<!-- table RECIPE -->` and `<!-- /table -->` becomes the table of the recipe's stages,
and between `<!-- recipes NAME NAME ... -->` and `<!-- /recipes -->` the table of these recipes. A page that shows
`images/stages-RECIPE.svg` has that picture drawn. `<!-- results ... -->` is left alone.
"""

import argparse
import inspect
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import nn

from cli.recipes import load_yaml, recipes
from errors import UserError, run_program
from inspection.stages import stages

DOCS = Path(__file__).resolve().parent
SECTION = re.compile(r"(<!-- (table|recipes) ([^>]*?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- (?:table|recipes) ")
PICTURE = re.compile(r"images/stages-([\w-]+)\.svg")
INCEPTION = "inception"  # the one picture that shows a block and not a recipe's network
Shape = tuple[int, ...]
KINDS: dict[type, str] = {nn.Conv2d: "conv", nn.Linear: "linear"}  # names of colours
SHORT = {"Conv2d": ("conv",), "Linear": ("linear",), "MaxPool2d": ("pool", "max")}
SHORT |= {"AvgPool2d": ("pool", "average"), "AdaptiveAvgPool2d": ("pool", "average")}


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
    config = _config(recipe)
    class_path, arguments = _class(config["model"]["net"])
    network = resolve_name(class_path)
    size = config["data"].get("image_size", 28)
    if "image_size" in inspect.signature(network).parameters:
        arguments |= {"image_size": size}
    with torch.device("meta"):
        return network(**arguments), (config["data"].get("channels", 1), size, size)


def stage_table(recipe: str) -> str:
    """Markdown table of a network's stages, leaving out those that have no weights and keep the shape."""
    net, input_shape = build(recipe)
    rows, total = stages(net, input_shape)
    lines = [("stage", "module", "output shape", "parameters", "FLOPs"), ("input", "", _by(input_shape), "", "")]
    shape: Shape = input_shape
    for row in rows:
        if row.parameters or row.shape != shape:
            what = describe(net.get_submodule(row.name))
            lines.append((f"`{row.name}`", what, _by(row.shape), f"{row.parameters:,}", f"{row.flops:,}"))
        shape = row.shape
    lines.append(("**total**", total.kind, _by(total.shape), f"**{total.parameters:,}**", f"**{total.flops:,}**"))
    return _markdown(lines, right=(3, 4))


def recipes_table(names: str) -> str:
    """Markdown table of recipes: network, cost, and how it is trained."""
    lines = [("recipe", "network", "image", "parameters", "FLOPs", "optimiser", "schedule", "batch", "epochs")]
    for name in names.split():
        config = _config(name)
        net, input_shape = build(name)
        _, total = stages(net, input_shape)
        optimizer, settings = _class(config["model"]["optimizer"])
        lines.append(
            (
                f"[`{name}`](../configs/{name}.yaml)",
                _call(config["model"]["net"]),
                _by(input_shape[1:]),
                f"{total.parameters:,}",
                f"{total.flops / 1e6:,.1f} M",
                f"{optimizer.rpartition('.')[2]}, lr {settings['lr']:g}",
                _call(config["model"].get("scheduler")) or "constant",
                str(config["data"]["batch_size"]),
                str(config["trainer"]["max_epochs"]),
            )
        )
    return _markdown(lines, right=(2, 3, 4, 7, 8))


def describe(module: nn.Module) -> str:
    """What a stage consists of: `Conv2d 11×11 stride 4, 2 × Conv2d 1×1`."""
    parts = [" ".join(words) for words in map(_words, _leaves([module])) if words]
    runs = [(part, len(list(run))) for part, run in groupby(parts)]
    return ", ".join(f"{count} × {part}" if count > 1 else part for part, count in runs) or type(module).__name__


def picture(recipe: str) -> str:
    """SVG of a network's stages at the sizes that they really have, and each one's share of the cost.

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
        parts.append(_text(middle, base + 36, _by(block.shape[1:]), "small"))
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
    modules = _leaves(net.children())
    block = net.get_submodule(name)
    before = nn.Sequential(*modules[: modules.index(block)])
    shape = stages(before, input_shape)[1].shape
    total = stages(nn.Sequential(block), shape)[1]  # type: ignore[arg-type]
    parts = [_box(10, 115, 104, 60, "input", ("input", _by(shape)))]
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
                _box(190 + 280 * position, y, 250, 50, one.kind, (f"{' '.join(_lines(one))} → {_by(one.shape)}", cost))
            )
    parts.append(_box(806, 115, 144, 60, "other", ("concatenated", _by(total.shape))))
    title = f"The Inception block {stage}.{name.rpartition('.')[2]}: {total.parameters:,} parameters"
    return _svg(title, 306, parts)


def _blocks(modules: Iterable[nn.Module], input_shape: Shape) -> list[Block]:
    """The layers that a picture shows, in order; convolutions of one output shape in a row are one block."""
    leaves = _leaves(modules)
    rows, _ = stages(nn.Sequential(*leaves), input_shape)  # type: ignore[arg-type]
    blocks: list[Block] = []
    for leaf, row in zip(leaves, rows, strict=True):
        words = _words(leaf)
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


def _leaves(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers in order, Sequentials opened; a block of a class of its own counts as one."""
    return [
        leaf
        for module in modules
        for leaf in (_leaves(module.children()) if type(module) is nn.Sequential else [module])
    ]


def _words(module: nn.Module) -> tuple[str, ...]:
    """Its class and what distinguishes it; none for a module without weights that pools nothing."""
    name = type(module).__name__
    if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        size, stride = (value if isinstance(value, int) else value[0] for value in (module.kernel_size, module.stride))
        return (name, f"{size}×{size}", f"stride {stride}") if stride > 1 else (name, f"{size}×{size}")
    weights = any(True for _ in module.parameters()) and not isinstance(module, nn.BatchNorm2d)
    return (name,) if weights or isinstance(module, nn.AdaptiveAvgPool2d) else ()


def _lines(block: Block) -> list[str]:
    """What is written over a block, in a column that may be narrow."""
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
        height, depth, width = 10 + 9 * math.log2(channels), 0.0, 9.0
    else:
        height = 118 * math.sqrt(block.shape[1] / image_size)
        depth, width = 0.28 * height, 3 + (column - 45) * min(1.0, math.log2(channels) / 10)
    x, top = middle - (width + depth) / 2, base - height
    rise = depth * 0.6
    faces = f'<g class="{block.kind}"><rect x="{x:.1f}" y="{top:.1f}" {_size(width, height)}/>'
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
.strong{font-weight:600}.small{font-size:11.5px}.muted{text-anchor:start;fill:#59636e}.on{fill:#fff;font-weight:600}
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


def _markdown(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    rule = tuple("---:" if column in right else "---" for column in range(len(lines[0])))
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _by(shape: Shape) -> str:
    return "×".join(map(str, shape))


def _config(recipe: str) -> dict[str, Any]:
    known = recipes()
    if recipe not in known:
        raise UserError(f"there is no recipe {recipe!r}; there are: {', '.join(known)}")
    return load_yaml(known[recipe])


def _class(value: Any) -> tuple[str, dict[str, Any]]:
    return (value, {}) if isinstance(value, str) else (value["class_path"], dict(value.get("init_args") or {}))


def _call(value: Any) -> str:
    """A class and its arguments from a recipe, as one would write them."""
    if value is None:
        return ""
    class_path, arguments = _class(value)
    inside = ", ".join(f"{name}={argument}" for name, argument in arguments.items())
    return f"{class_path.rpartition('.')[2]}({inside})"


MAKE = {"table": stage_table, "recipes": recipes_table}


def updates(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every page and picture of a folder of pages with the content that it should have.

    Raises:
        UserError: If a page names a recipe that does not exist, or leaves a section open.
    """
    for page in sorted(folder.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if len(OPENING.findall(text)) != len(SECTION.findall(text)):
            raise UserError(f"{page.name}: a section <!-- table ... --> or <!-- recipes ... --> is not closed")
        yield page, SECTION.sub(lambda found: found[1] + MAKE[found[2]](found[3]) + found[4], text)
        for name in sorted(set(PICTURE.findall(text))):
            path = folder / "images" / f"stages-{name}.svg"
            yield path, inception_picture() if name == INCEPTION else picture(name)


def main(arguments: list[str]) -> int:
    """Write what is stale, or with --check only name it; returns the exit code."""
    return run_program("make_docs", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.make_docs", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything is stale")
    parser.add_argument("--folder", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args(arguments)
    contents = dict(updates(options.folder))
    stale = [path for path, text in contents.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.relative_to(options.folder)} is stale: run python -m docs.make_docs")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(contents[path], encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(options.folder)}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
