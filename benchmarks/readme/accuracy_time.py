"""The plot of test accuracy against training time, from the records of `python -m benchmarks.results`."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.harness.side_by_side import PROJECT
from benchmarks.readme.entries import Results, machines
from benchmarks.readme.rounding import accuracies
from errors import MissingPackage
from runs.plots import COLOURS, tidy

PICTURE = PROJECT / "docs" / "images" / "accuracy-time.png"
DIGEST = "points-sha256"  # a text in the PNG: the digest of what it was drawn from
FAMILIES = {"reproduction": "tutorial's recipe", "best": "most accuracy", "fast": "most accuracy in little time"}
UNITS = {"s": 1, "min": 60, "h": 3600}
TIMES = {count * size: f"{count} {unit}" for unit, size in UNITS.items() for count in (1, 2, 5, 10, 30)}
MARKERS = "osD^v<>"  # one for each machine, as times on two of them are not compared
ACCURACIES = (0.1, 0.5, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97)


class Point(NamedTuple):
    """One entry on one device: test accuracy and seconds of training, each as mean, least and greatest of its seeds."""

    name: str
    family: str
    device: str
    machine: str
    accuracy: tuple[float, float, float]
    seconds: tuple[float, float, float]


def points(results: Results) -> list[Point]:
    """All entries that have records, without plain recipes that are also trained in another way."""
    found = []
    for (entry, device), runs in results.runs.items():
        runs = [run for run in runs if "background" not in run.record]
        if entry.family in FAMILIES and runs:
            seconds = [run.record["fit_seconds"] for run in runs]
            shares = [float(value) for value in accuracies(runs)]
            name, machine = entry.recipe + entry.suffix, machines(runs)
            found.append(Point(name, entry.family, device, machine, _spread(shares), _spread(seconds)))
    return sorted(found, key=lambda point: (point.device, point.name))


def draw(found: Sequence[Point], path: Path) -> None:
    """Draw the points into a PNG.

    Raises:
        MissingPackage: If Matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise MissingPackage("the plot needs", "matplotlib") from None
    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)  # needed to measure how wide a text is
    axes: Any = figure.subplots()
    colours = dict(zip(FAMILIES, COLOURS, strict=False))
    places = sorted({(point.device, point.machine) for point in found})
    markers = dict(zip(places, itertools.cycle(MARKERS), strict=False))
    for point in found:
        (y, low, high), (x, least, most) = point.accuracy, point.seconds
        # As errors, on a logarithmic axis: from 95 to 96 % is further than from 75 to 76 %.
        fill = colours[point.family] if point.device == "gpu" else "white"
        marker = markers[point.device, point.machine]
        style: Any = {"color": colours[point.family], "markerfacecolor": fill, "marker": marker, "capsize": 2}
        axes.errorbar(x, 1 - y, [[high - y], [y - low]], [[x - least], [most - x]], markersize=7, linewidth=1, **style)
    axes.set(xscale="log", yscale="log", xlabel="training time", ylabel="test accuracy")
    axes.margins(y=0.15)
    soonest, latest = min(point.seconds[1] for point in found) / 2, max(point.seconds[2] for point in found) * 3
    axes.set_xlim(soonest, max(latest, 10 * soonest))  # never so narrow that noise looks like a difference
    axes.invert_yaxis()
    for axis, ticks in ((axes.xaxis, TIMES), (axes.yaxis, {1 - share: f"{share:.0%}" for share in ACCURACIES})):
        least, greatest = sorted(axis.get_view_interval())
        inside = {place: text for place, text in ticks.items() if least <= place <= greatest}
        axis.set_ticks(list(inside), list(inside.values()))
        axis.set_ticks([], minor=True)
    tidy(axes)
    shown = {point.family for point in found}
    handles = [Line2D([], [], color=colours[name], marker="o", ls="", label=FAMILIES[name]) for name in sorted(shown)]
    for (device, machine), marker in markers.items():
        fill = "#555555" if device == "gpu" else "white"
        symbol: Any = {"color": "#555555", "markerfacecolor": fill, "marker": marker, "ls": ""}
        handles.append(Line2D([], [], label=f"on {machine}", **symbol))
    axes.legend(handles=handles, loc="best", frameon=False, fontsize=9)
    _label(figure, axes, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={DIGEST: digest(found)})


def digest(found: Sequence[Point]) -> str:
    """SHA-256 of what the plot shows."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def is_current(found: Sequence[Point], path: Path) -> bool:
    """Whether a PNG was drawn from these points."""
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(DIGEST) == digest(found)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return fmean(values), min(values), max(values)


def _label(figure: Any, axes: Any, found: Sequence[Point]) -> None:
    """Write each name beside its point, where it hides neither points nor other names."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # everything stays where it is measured
    renderer = figure.canvas.get_renderer()
    taken = [axes.get_legend().get_window_extent(renderer)]
    for point in found:
        (y, low, high), (x, least, most) = point.accuracy, point.seconds
        ends = axes.transData.transform([(x, 1 - y), (least, 1 - low), (most, 1 - high)])
        (x, y), (left, bottom), (right, top) = ends
        taken += [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6), Bbox.from_extents(left, y - 3, right, y + 3)]
        taken.append(Bbox.from_extents(x - 3, bottom, x + 3, top))
    for point in found:
        place = point.seconds[0], 1 - point.accuracy[0]
        text = None
        for far, offset, sides in _offsets():
            if text:
                text.remove()
            line: Any = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
            arrow = line if far else None
            text = axes.annotate(
                point.name, place, offset, textcoords="offset points", fontsize=8.5, arrowprops=arrow, **sides
            )
            text.set_in_layout(False)
            text.update_positions(renderer)
            words = Text.get_window_extent(text, renderer)  # without the connecting line
            inside = axes.bbox.x0 < words.x0 and words.x1 < axes.bbox.x1 and axes.bbox.y0 < words.y0
            if inside and not words.count_overlaps(taken):
                break
        taken.append(words)


def _offsets() -> Iterator[tuple[bool, tuple[float, float], dict[str, Any]]]:
    """Whether a line leads to the name, and where the name goes, in points from its mark; the best place first."""
    for distance in (8, 20, 34, 50, 70):
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            sides = {"ha": ("right", "center", "left")[x + 1], "va": ("top", "center", "bottom")[y + 1]}
            yield distance > 8, (x * distance, y * distance), sides
