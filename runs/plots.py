"""The comparison of runs as plots.

Matplotlib is imported only where a report is drawn.
"""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from errors import MissingPackage, plain
from runs.groups import Group

# Okabe and Ito's colours, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B8000")
MARKERS = "osD^vPX*"
WIDE = 34  # characters of a name beside a plot, before the line is broken


def draw(groups: Sequence[Group], folder: Path) -> dict[str, str]:
    """Draw what there is data for into a folder; returns title to file name.

    Raises:
        MissingPackage: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage("the plots need", "matplotlib") from None
    plots = {}

    def save(figure: Figure, title: str, name: str) -> None:
        figure.savefig(folder / name, dpi=110)
        plots[title] = name

    times = [(group, group.mean("fit_seconds") or 0) for group in groups]
    unit, size = ("minutes", 60) if max(seconds for _, seconds in times) > 300 else ("seconds", 1)
    scaled = [(group, seconds / size) for group, seconds in times]
    save(_scatter(scaled, f"training time in {unit}"), "Test accuracy against training time", "accuracy_time.png")
    flops = [(group, value / 1e6) for group in groups if (value := group.mean("flops"))]
    if flops:
        save(
            _scatter(flops, "million floating-point operations per image (forward)"),
            "Test accuracy against FLOPs",
            "accuracy_flops.png",
        )
    save(_curves(groups), "Loss and accuracy by epoch", "curves.png")
    if all(group.class_accuracy for group in groups):
        save(_class_accuracy(groups), "Test accuracy by class", "class_accuracy.png")
    return plots


def _scatter(points: Sequence[tuple[Group, float]], label: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    names = [_drawable(group.name, WIDE) for group, _ in points]
    figure = Figure(figsize=_size(6, 4.6, names), layout="constrained")
    axes = figure.subplots()
    handles = []
    for number, (group, x) in enumerate(points):
        low, high = group.interval
        errors = [[max(0.0, group.accuracy - low)], [max(0.0, high - group.accuracy)]]
        colour, marker = _style(number)
        handles.append(axes.errorbar(x, group.accuracy, errors, fmt=marker, color=colour, capsize=3, markersize=7))
    values = [x for _, x in points]
    if max(values) > 8 * min(values) > 0:
        axes.set_xscale("log")
        decades = math.log10(max(values) / min(values))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=label, ylabel="test accuracy, 95 % interval")
    axes.margins(0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _tidy(axes)
    _legend(figure, handles, names)
    return figure


def _curves(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names = [*(label for _, label in _STAGES), *(_drawable(group.name, WIDE) for group in groups)]
    figure = Figure(figsize=_size(9.5, 4.4, names), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("loss", "accuracy"), strict=True):
        for number, group in enumerate(groups):
            colour, marker = _style(number)
            for stage, line in (("train", "--"), ("val", "-")):
                curve = group.curve(f"{stage}/{metric}")
                if not curve:
                    continue
                epochs, mean, low, high = zip(*curve, strict=True)
                solid = stage == "val"
                axes.plot(epochs, mean, line, color=colour, marker=marker if solid else None, markersize=4)
                if len(group.runs) > 1 and solid:
                    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="epoch", ylabel=metric)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _tidy(axes)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    handles = [Line2D([], [], color="#555555", linestyle=line) for line, _ in _STAGES]
    for number in range(len(groups)):
        colour, marker = _style(number)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4))
    _legend(figure, handles, names)
    return figure


_STAGES: tuple[tuple[Literal["-", "--"], str], ...] = (("-", "validation"), ("--", "training"))


def _class_accuracy(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure

    classes = list(groups[0].class_accuracy)
    table = [[group.class_accuracy.get(name, 0.0) for name in classes] for group in groups]
    names = [_drawable(group.name, WIDE) for group in groups]
    rows = [0.5 + 0.17 * name.count("\n") for name in names]
    figure = Figure(figsize=(9.5, 1.9 + len(rows) * max(rows)), layout="constrained")
    axes = figure.subplots()
    lowest = min(map(min, table))
    # The scale starts at the weakest class, but is never so narrow that noise looks like a difference.
    axes.imshow(table, cmap="Blues", vmin=min(lowest, 0.8) - 0.05, vmax=1.05, aspect="auto")
    axes.set_xticks(
        range(len(classes)),
        [_drawable(name, WIDE // 2) for name in classes],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(groups)), names)
    middle = (min(lowest, 0.8) + 1) / 2
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            ink = "white" if value > middle else "#222222"
            axes.text(column, row, f"{100 * value:.1f}", ha="center", va="center", color=ink, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("test accuracy by class, in per cent", fontsize=11)
    return figure


def _style(number: int) -> tuple[str, str]:
    """Colour and marker: 64 pairs before one repeats."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _size(width: float, height: float, names: Sequence[str]) -> tuple[float, float]:
    """Inches of a figure whose plots keep their size beside a legend with these names."""
    lines = [line for name in names for line in name.split("\n")]
    return width + 0.5 + 0.075 * max(map(len, lines)), max(height, 0.4 + 0.185 * len(lines))


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str]) -> None:
    """The names beside the plots."""
    # Set afterwards: Matplotlib leaves out labels that begin with an underscore.
    legend = figure.legend(handles, ["-"] * len(names), loc="outside right upper", frameon=False, fontsize=9)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _drawable(name: str, wide: int) -> str:
    """A name in at most three lines of this length; what the font lacks is escaped, and $ doesn't start a formula."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    name = "".join(char if ord(char) in known else char.encode("unicode_escape").decode() for char in plain(name))
    lines = textwrap.wrap(name, wide, max_lines=3, placeholder=" ...") or ["-"]
    return "\n".join(lines).replace("$", r"\$")


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
