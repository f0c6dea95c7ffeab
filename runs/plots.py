"""The comparison of runs as plots.

Matplotlib is imported only where a report is drawn.
"""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from errors import MissingPackage, plain
from runs.groups import Group, marks
from runs.search_space import Choice, Space

# Okabe and Ito's colours, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B8000")
MARKERS = "osD^vPX*"
GREY = "#c8c8c8"
MOST, BEST = 20, 12  # of more groups than the first number only the best ones have a colour and a name
WIDE = 40  # characters of a name beside a plot, before the line is broken
_STAGES: tuple[tuple[Literal["-", "--"], str], ...] = (("-", "validation"), ("--", "training"))


def check_matplotlib(what: str = "the plots need") -> None:
    """Refuse to begin what ends in a plot.

    Raises:
        MissingPackage: If Matplotlib is not installed; `what` needs it.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingPackage(what, "matplotlib") from None


def draw(groups: Sequence[Group], folder: Path) -> dict[str, str]:
    """Draw what there is data for into a folder; returns title to file name.

    Raises:
        MissingPackage: If Matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    plots = {}

    def save(figure: Figure, title: str, name: str) -> None:
        width = int(13 * figure.get_size_inches()[0])  # characters of this size in a line
        few = found if len(found := marks(groups)) <= 4 else [*found[:3], "* others: see the table"]
        lines = [line for mark in few for line in _drawable(mark, width).split("\n")]
        if lines:
            figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color="#555555", linespacing=1.4)
            figure.set_figheight(figure.get_figheight() + 0.17 * len(lines))
        figure.savefig(folder / name, dpi=110)
        plots[title] = name

    times = [group.mean("fit_seconds") or 0 for group in groups]
    unit, size = ("minutes", 60) if max(times) > 300 else ("seconds", 1)
    scaled = [seconds / size for seconds in times]
    save(
        _scatter(groups, scaled, f"training time in {unit}"), "Test accuracy against training time", "accuracy_time.png"
    )
    flops = [value / 1e6 if (value := group.mean("flops")) else None for group in groups]
    if any(flops):
        save(
            _scatter(groups, flops, "million floating-point operations per image (forward)"),
            "Test accuracy against FLOPs",
            "accuracy_flops.png",
        )
    save(_curves(groups), "Loss and accuracy by epoch", "curves.png")
    if all(group.class_accuracy for group in groups):
        save(_class_accuracy(groups), "Test accuracy by class", "class_accuracy.png")
    return plots


def draw_trials(space: Space, tried: Sequence[tuple[Mapping[str, Any], float]], path: Path) -> None:
    """Draw the validation accuracy of a sweep's trials against each setting, a panel each.

    Args:
        space: What was searched.
        tried: The settings of each trial, and its accuracy; the best first.
        path: A PNG file.

    Raises:
        MissingPackage: If Matplotlib is not installed.
    """
    check_matplotlib("the picture needs")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    columns = min(4, len(space))
    rows = -(-len(space) // columns)
    figure = Figure(figsize=(1.6 + 2.8 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    accuracies = [accuracy for _, accuracy in tried]
    for (name, values), axes in zip(space.items(), panels, strict=False):
        at: list[Any] = [settings[name] for settings, _ in tried]
        if isinstance(values, Choice):
            at = [values.values.index(value) for value in at]
            names = [
                _drawable(value.rpartition(".")[2] if value[:1].isalpha() else value, 12) for value in values.values
            ]
            axes.set_xticks(range(len(names)), names, rotation=35 if max(map(len, names)) > 4 else 0)
            axes.set_xlim(-0.5, len(names) - 0.5)
        elif values.log:
            axes.set_xscale("log")
        axes.scatter(at, accuracies, s=24, color=COLOURS[0])
        axes.scatter(at[0], accuracies[0], s=40, color=COLOURS[1], zorder=3)
        axes.set_xlabel(name.rpartition(".")[2])
        tidy(axes)
    for axes in panels:  # those left over
        axes.remove()
    figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.supylabel("validation accuracy of the finished trials\n(orange: the best)", fontsize=9)
    figure.savefig(path, dpi=110)


def _scatter(groups: Sequence[Group], values: Sequence[float | None], label: str) -> Any:
    """Test accuracy against a value of each group; those without one are left out, the others keep their numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    points = [
        (number, group, x) for number, (group, x) in enumerate(zip(groups, values, strict=True), 1) if x is not None
    ]
    drawn = {number for number, _, _ in points}
    named = [(number, group) for number, group in _named(groups) if number in drawn]
    names, handles = [_beside(number, group) for number, group in named], []
    figure = Figure(figsize=_size(6, 4.6, names), layout="constrained")
    axes = figure.subplots()
    for number, group, x in reversed(points):  # the best on top
        low, high = group.interval
        errors = [[max(0.0, group.accuracy - low)], [max(0.0, high - group.accuracy)]]
        colour, marker = _style(number, len(_named(groups)))
        look: dict[str, Any] = {"color": colour, "markerfacecolor": "white" if group.partial else colour}
        handles.append(axes.errorbar(x, group.accuracy, errors, fmt=marker, capsize=3, markersize=7, **look))
    _log_if_wide(axes, [x for *_, x in points])
    axes.set(xlabel=label, ylabel="test accuracy, 95 % interval")
    axes.margins(0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    tidy(axes)
    _legend(figure, handles[::-1], names, len(points))
    return figure


def _curves(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    named = _named(groups)
    names = [*(label for _, label in _STAGES), *(_beside(number, group) for number, group in named)]
    figure = Figure(figsize=_size(9.5, 4.4, names), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("loss", "accuracy"), strict=True):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for number, group in reversed([*enumerate(groups, 1)]):  # the best on top
            colour, marker = _style(number, len(named))
            for stage, line in (("train", "--"), ("val", "-")):
                curve = group.curve(f"{stage}/{metric}")
                if not curve or (stage == "train" and number > len(named)):
                    continue
                epochs, mean, low, high = zip(*curve, strict=True)
                look: dict[str, Any] = {"color": colour, "markersize": 4, "linewidth": 1.2}
                if len(epochs) == 1:  # no line is drawn
                    look |= {"marker": marker, "markerfacecolor": colour if stage == "val" else "white"}
                elif stage == "val" and number <= len(named):
                    look |= {"marker": marker, "markevery": 0.1}
                axes.plot(epochs, mean, line, **look)
                if len(group.runs) > 1 and "marker" in look:
                    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="epoch", ylabel=metric)
        _log_if_wide(axes, [len(run.record["epochs"]) for group in groups for run in group.runs])
        tidy(axes)
    panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    handles = [Line2D([], [], color="#555555", linestyle=line) for line, _ in _STAGES]
    for number, _ in named:
        colour, marker = _style(number, len(named))
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4))
    if len(groups) > len(named):
        handles.append(Line2D([], [], color=GREY))
    _legend(figure, handles, names, len(groups) + len(_STAGES))
    return figure


def _class_accuracy(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure

    classes = list(dict.fromkeys(name for group in groups for name in group.class_accuracy))
    table = [[group.class_accuracy.get(name, math.nan) for name in classes] for group in groups]
    names = [_beside(number, group, 60) for number, group in enumerate(groups, 1)]
    longest = max(len(line) for name in names for line in name.split("\n"))
    height = 0.3 + 0.15 * max(name.count("\n") for name in names)
    size = 1 + 0.65 * len(classes) + 0.075 * longest, 1.9 + len(names) * height
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    # The scale starts at the weakest class, but is never so narrow that noise looks like a difference.
    lowest = min(0.8, *(value for group in groups for value in group.class_accuracy.values())) - 0.05
    axes.imshow(table, cmap="Blues", vmin=lowest, vmax=1.05, aspect="auto")
    axes.set_xticks(
        range(len(classes)),
        [_drawable(name, WIDE // 2) for name in classes],
        rotation=35,
        ha="left",
        rotation_mode="anchor",
    )
    axes.set_yticks(range(len(groups)), names, fontsize=9)
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            ink = "white" if value > lowest + 0.6 * (1.05 - lowest) else "#222222"
            text = "" if math.isnan(value) else f"{100 * value:.1f}"  # not tested
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    axes.set_title("test accuracy by class, in per cent", fontsize=11)
    return figure


def _named(groups: Sequence[Group]) -> list[tuple[int, Group]]:
    """Number and group of those that have a colour and a name."""
    return list(enumerate(groups[: MOST if len(groups) <= MOST else BEST], 1))


def _style(number: int, named: int) -> tuple[str, str]:
    """Colour and marker of a group by its number, from 1: 64 pairs before one repeats."""
    if number > named:
        return GREY, "o"
    number -= 1
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _log_if_wide(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic scale with numbers that one can read, if the values lie far apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not max(values) > 8 * min(values) > 0:
        return
    axes.set_xscale("log")
    decades = math.log10(max(values) / min(values))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _size(width: float, height: float, names: Sequence[str]) -> tuple[float, float]:
    """Inches of a figure whose plots keep their size beside a legend with these names."""
    lines = [line for name in names for line in name.split("\n")]
    return width + 0.5 + 0.075 * max(map(len, lines)), max(height, 0.6 + 0.185 * len(lines))


def _legend(figure: Any, handles: Sequence[Any], names: Sequence[str], all_there_are: int) -> None:
    """The names beside the plots, and how many there are without one."""
    if more := all_there_are - len(names):
        names = [*names, f"{more} others, see the table"]
    # Set afterwards: Matplotlib leaves out labels that begin with an underscore.
    look = {"frameon": False, "fontsize": 9}
    legend = figure.legend(handles[: len(names)], ["-"] * len(names), loc="outside right upper", **look)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)


def _beside(number: int, group: Group, wide: int = WIDE) -> str:
    """The number in the table and the name, for beside a plot."""
    return _drawable(f"{number} {group.marked}", wide)


def _drawable(name: str, wide: int) -> str:
    """A name in at most four lines of this length; what the font lacks is escaped, and $ doesn't start a formula."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    name = "".join(char if ord(char) in known else char.encode("unicode_escape").decode() for char in plain(name))
    name = re.sub(r"(?<!,) (?=[^ ,(]+[,)])", "\xa0", name)  # a setting and its value stay together
    return "\n".join(textwrap.wrap(name, wide, max_lines=4, placeholder=" ...") or ["-"]).replace("$", r"\$")


def tidy(axes: Any) -> None:
    """Two axes, and a light grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
