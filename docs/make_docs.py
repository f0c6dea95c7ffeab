"""Writes the tables of the pages in docs/ and docs/zh-CN/, and the pictures they show, from networks and recipes.

    python -m docs.make_docs            # after a change to a network, a recipe or a page
    python -m docs.make_docs --check    # write nothing; exit 1 and name every page or picture that is stale

In a page, what stands between `<!-- table RECIPE -->` and `<!-- /table -->` becomes the table of the recipe's stages,
between `<!-- recipes NAME NAME ... -->` and `<!-- /recipes -->` the table of these recipes, and between
`<!-- weights files -->` (or `classes`) and `<!-- /weights -->` what weights/weights.json says. A page that shows
`images/stages-RECIPE.svg` has that picture drawn; `stages-all.svg` shows the five networks to one scale, and
`stages-inception.svg` one block. `<!-- results ... -->` is left alone.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from checkpoints.reading import listed
from cli.recipes import read_recipe
from docs.drawing import (
    build,
    class_and_arguments,
    family_picture,
    inception_picture,
    picture,
)
from errors import OneLineParser, UserError, run_program
from inspection.stages import stages
from inspection.table import by, table_rows
from weights import WEIGHTS
from weights.trained import load_trained

DOCS = Path(__file__).resolve().parent
CHINESE = "zh-CN"  # the folder of the Chinese pages
SECTION = re.compile(r"(<!-- (table|recipes|weights) ([^>]*?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- (?:table|recipes|weights) ")
PICTURE = re.compile(r"images/stages-([\w-]+)\.svg")
SPECIAL: dict[str, Callable[[], str]] = {
    "inception": inception_picture,
    "all": family_picture,
}  # pictures that show something other than a recipe
# The words of the tables, in English and Chinese.
STAGES = (
    ("stage", "module", "output shape", "receptive field", "parameters", "FLOPs"),
    ("层", "模块", "输出形状", "感受野", "参数量", "FLOPs"),
)
RECIPES = (
    ("recipe", "network", "image", "parameters", "FLOPs", "optimiser", "schedule", "batch", "epochs"),
    ("配方", "网络", "图片", "参数量", "FLOPs", "优化器", "学习率调度", "批量大小", "轮数"),
)
FILES = (
    ("file", "network", "image", "parameters", "MB", "recipe", "epoch", "validation accuracy", "test accuracy"),
    ("文件", "网络", "图片", "参数量", "MB", "配方", "轮次", "验证准确率", "测试准确率"),
)
OF = (" of ", " / ")
OF_THE_DATA = ("in_channels", "num_classes", "image_size")  # arguments of a network that its data decides
INPUT, TOTAL = ("input", "输入"), ("total", "合计")
EVERYTHING, CONSTANT = ("whole image", "整幅图"), ("constant", "恒定")


def stage_table(recipe: str, chinese: bool = False) -> str:
    """Markdown table of a network's stages, leaving out those that have no weights and keep the shape."""
    net, input_shape = build(recipe)
    rows, total = table_rows(net, input_shape)
    lines = [STAGES[chinese], (INPUT[chinese], "", by(input_shape), "", "", "")]
    for row in rows:
        field = row.field or EVERYTHING[chinese]
        lines.append((f"`{row.name}`", row.what, row.shape, field, f"{row.parameters:,}", f"{row.flops:,}"))
    costs = f"**{total.parameters:,}**", f"**{total.flops:,}**"
    lines.append((f"**{TOTAL[chinese]}**", total.kind, by(total.shape), "", *costs))
    return _markdown(lines, right=(4, 5))


def recipes_table(names: str, chinese: bool = False) -> str:
    """Markdown table of recipes: network, cost, and how it is trained."""
    lines = [RECIPES[chinese]]
    for name in names.split():
        config = read_recipe(name)
        net, input_shape = build(name)
        _, total = stages(net, input_shape)
        optimizer, settings = class_and_arguments(config["model"]["optimizer"])
        lines.append(
            (
                f"[`{name}`]({'../' * (1 + chinese)}configs/{name}.yaml)",
                _call(config["model"]["net"]),
                by(input_shape[1:]),
                f"{total.parameters:,}",
                f"{total.flops / 1e6:,.1f} M",
                f"{optimizer.rpartition('.')[2]}, lr {settings['lr']:g}",
                _call(config["model"].get("scheduler")) or CONSTANT[chinese],
                str(config["data"]["batch_size"]),
                str(config["trainer"]["max_epochs"]),
            )
        )
    return _markdown(lines, right=(2, 3, 4, 7, 8))


def weights_table(what: str, chinese: bool = False) -> str:
    """Markdown table of the files in weights/: what each holds, or its test accuracy by class."""
    entries = {path.name: listed(path) for path in sorted(WEIGHTS.glob("*.ckpt"))}
    if what == "classes":
        names = [*next(iter(entries.values()))["class_accuracy"]]
        rows = [(f"`{file}`", *map(_share, entry["class_accuracy"].values())) for file, entry in entries.items()]
        return _markdown([(FILES[chinese][0], *names), *rows], right=tuple(range(1, 1 + len(names))))
    lines = [FILES[chinese]]
    for file, entry in entries.items():
        classifier, data, checkpoint = load_trained(WEIGHTS / file)
        config = yaml.safe_load(checkpoint["config"])
        net = config["model"]["net"]
        own = {name: value for name, value in net["init_args"].items() if name not in OF_THE_DATA}
        of_run = "" if "origin" in entry else f"{OF[chinese]}{config['trainer']['max_epochs']}"
        lines.append(
            (
                f"`{file}`",
                _call(net | {"init_args": own}),
                by((data.image_size, data.image_size)),
                f"{sum(weight.numel() for weight in classifier.net.parameters()):,}",
                f"{entry['bytes'] / 1e6:.1f}",
                f"`{entry['recipe']}`",
                f"{entry['epoch']}{of_run}",
                _share(entry["val_accuracy"]),
                _share(entry["test_accuracy"]),
            )
        )
    return _markdown(lines, right=(2, 3, 4, 6, 7, 8))


def _share(value: float) -> str:
    return f"{value:.4f}".lstrip("0")


def _markdown(lines: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> str:
    rule = tuple("---:" if column in right else "---" for column in range(len(lines[0])))
    return "".join(f"| {' | '.join(line)} |\n" for line in (lines[0], rule, *lines[1:]))


def _call(value: Any) -> str:
    """A class and its arguments from a recipe, as you would write them."""
    if value is None:
        return ""
    class_path, arguments = class_and_arguments(value)
    inside = ", ".join(f"{name}={argument}" for name, argument in arguments.items())
    return f"{class_path.rpartition('.')[2]}({inside})"


MAKE = {"table": stage_table, "recipes": recipes_table, "weights": weights_table}


def updates(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every page and picture of a folder of pages with the content that they should have.

    Raises:
        UserError: If a page names a recipe that does not exist, or leaves a section open.
    """
    drawn: set[str] = set()
    for page in [*sorted(folder.glob("*.md")), *sorted(folder.glob(f"{CHINESE}/*.md"))]:
        text = page.read_text(encoding="utf-8")
        chinese = page.parent.name == CHINESE
        if len(OPENING.findall(text)) != len(SECTION.findall(text)):
            raise UserError(f"{page.name}: a section <!-- table ... --> or another is not closed")
        yield page, SECTION.sub(lambda found: found[1] + MAKE[found[2]](found[3], chinese) + found[4], text)  # noqa: B023
        for name in sorted(set(PICTURE.findall(text)) - drawn):
            drawn.add(name)
            yield folder / "images" / f"stages-{name}.svg", SPECIAL[name]() if name in SPECIAL else picture(name)


def main(arguments: list[str]) -> int:
    """Write what is stale, or with --check only name it; returns the exit code."""
    return run_program("make_docs", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    parser = OneLineParser(prog="python -m docs.make_docs", description=(__doc__ or "").partition("\n")[0])
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
