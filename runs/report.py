"""The comparison of runs as a table on the terminal, as Markdown and CSV, and as plots."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from errors import MissingPackage, UserError
from runs.reading import Group, Run, wilson

COLUMNS = (
    "network",
    "seeds",
    "test accuracy",
    "95 % interval",
    "parameters",
    "FLOPs/image",
    "images/s",
    "epoch",
    "peak memory",
    "epochs",
)
# Okabe and Ito's colours, which people with any colour vision can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B8000")
MARKERS = "osD^vPX*"
CSV_FIELDS = (
    "network",
    "recipe",
    "seed",
    "test_accuracy",
    "interval_low",
    "interval_high",
    "test_loss",
    "best_val_accuracy",
    "parameters",
    "flops",
    "images_per_second",
    "epoch_seconds",
    "fit_seconds",
    "peak_memory_bytes",
    "epochs",
    "batch_size",
    "image_size",
    "precision",
    "machine",
    "commit",
    "folder",
)


def print_table(groups: Sequence[Group]) -> None:
    """Show the comparison on the terminal.

    Raises:
        UserError: If Rich is not installed.
    """
    console = terminal()
    rows = [dict(zip(COLUMNS, cells(group), strict=True)) for group in groups]

    def table(columns: Sequence[str]) -> Any:
        lines = [[row[column] for column in columns] for row in rows]
        return rich_table(columns, lines, left=COLUMNS[:1], bold_first=len(rows) > 1)

    whole = table(COLUMNS)
    fits = console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width
    for part in [whole] if fits else [table(COLUMNS[:4]), table((COLUMNS[0], *COLUMNS[4:]))]:
        console.print(part)
    for line in notes(groups):
        console.print(line, style="dim", highlight=False)


def terminal() -> Any:
    """Rich's console; a wide one where there is no terminal.

    Raises:
        UserError: If Rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError:
        raise UserError("the table needs the package rich: pip install rich") from None
    console = Console()
    return console if console.is_terminal else Console(width=160)


def rich_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = (), bold_first: bool = False
) -> Any:
    """A table for Rich's console, its columns but the left ones aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for number, row in enumerate(rows):
        table.add_row(*row, style="bold" if bold_first and number == 0 else "")
    return table


def cells(group: Group) -> list[str]:
    """One line of the table."""
    low, high = group.interval
    deviation = f" ± {group.deviation:.4f}" if group.deviation is not None else ""
    return [
        group.name,
        _ranges([run.seed for run in group.runs]),
        f"{group.accuracy:.4f}{deviation}",
        f"{low:.4f} to {high:.4f}",
        _short(group.mean("parameters")),
        _short(group.mean("flops")),
        _or_dash(group.mean("images_per_second"), "{:,.0f}"),
        _time(group.epoch_seconds),
        _memory(group.mean("peak_memory_bytes")),
        _ranges([len(run.record["epochs"]) for run in group.runs]),
    ]


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader of the table must know."""
    images = sorted({run.record["test"]["images"] for group in groups for run in group.runs})
    machines = dict.fromkeys(run.machine for group in groups for run in group.runs)
    precisions = dict.fromkeys(run.record["precision"] for group in groups for run in group.runs)
    lines = [f"Test accuracy on {' or '.join(f'{count:,}' for count in images)} images, with its Wilson interval."]
    if any(group.deviation is not None for group in groups):
        lines[0] += " ±: standard deviation between seeds."
    lines.append(f"Speed and memory on {'; '.join(machines)}; precision {', '.join(precisions)}.")
    if any("gpu" not in run.record["machine"] for group in groups for run in group.runs):
        lines[-1] += " Without a GPU, memory is that of the whole process."
    return lines


def write_report(groups: Sequence[Group], folder: Path) -> None:
    """Write report.md, runs.csv and the plots.

    Raises:
        UserError: If Matplotlib is not installed, or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots = _plots(groups, folder)
        _write_csv(groups, folder / "runs.csv")
        (folder / "report.md").write_text(markdown(groups, plots), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report can't be written to {folder}: {error.strerror or error}") from None


def markdown(groups: Sequence[Group], plots: dict[str, str]) -> str:
    """The report, with the plots (title to file name) below the table."""
    lines = ["# Comparison", "", *_markdown_table([list(COLUMNS), *(cells(group) for group in groups)])]
    lines += ["", *(f"{note}  " for note in notes(groups))]
    classes = list(groups[0].class_accuracy)
    if classes:
        rows = [["test accuracy of", *(group.name for group in groups)]]
        for name in classes:
            rows.append([name, *(_or_dash(group.class_accuracy.get(name), "{:.3f}") for group in groups)])
        lines += ["", *_markdown_table(rows)]
    for title, file in plots.items():
        lines += ["", f"![{title}]({file})"]
    lines += ["", "Runs:", ""]
    for group in groups:
        for run in group.runs:
            versions = run.record["versions"]
            commit = (run.record.get("commit") or "unknown")[:12]
            lines.append(
                f"- {group.name}, seed {run.seed}: {run.accuracy:.4f} ({run.folder.as_posix()}, commit {commit}, "
                f"torch {versions['torch']}, Python {versions['python']})"
            )
    return "\n".join(lines) + "\n"


def _write_csv(groups: Sequence[Group], path: Path) -> None:
    classes = list(dict.fromkeys(name for group in groups for name in group.class_accuracy))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*CSV_FIELDS, *(f"accuracy of {name}" for name in classes)])
        writer.writeheader()
        for group in groups:
            for run in group.runs:
                writer.writerow(_csv_row(group, run))


def _csv_row(group: Group, run: Run) -> dict[str, Any]:
    record, test = run.record, run.record["test"]
    low, high = wilson(run.accuracy, test["images"])
    row = {name: record[name] for name in CSV_FIELDS if name in record}
    row |= {"network": group.name, "test_accuracy": run.accuracy, "interval_low": low, "interval_high": high}
    row |= {"test_loss": test["loss"], "epoch_seconds": run.epoch_seconds, "epochs": len(record["epochs"])}
    row |= {"machine": run.machine, "folder": run.folder.as_posix()}
    return row | {f"accuracy of {name}": value for name, value in test.get("class_accuracy", {}).items()}


def _plots(groups: Sequence[Group], folder: Path) -> dict[str, str]:
    """Draw what there is data for; returns title to file name."""
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
            _scatter(flops, "million floating-point operations an image (forward)"),
            "Test accuracy against FLOPs",
            "accuracy_flops.png",
        )
    save(_curves(groups), "Loss and accuracy by epoch", "curves.png")
    if all(group.class_accuracy for group in groups):
        save(_class_accuracy(groups), "Test accuracy by class", "class_accuracy.png")
    return plots


def _scatter(points: Sequence[tuple[Group, float]], label: str) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (group, x) in enumerate(points):
        low, high = group.interval
        errors = [[group.accuracy - low], [high - group.accuracy]]
        colour, marker = _style(number)
        axes.errorbar(x, group.accuracy, errors, fmt=marker, color=colour, capsize=3, markersize=7, label=group.name)
    values = [x for _, x in points]
    if max(values) > 8 * min(values) > 0:
        axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="test accuracy, 95 % interval")
    axes.margins(0.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _tidy(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _curves(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(11, 4.4), layout="constrained")
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
    handles = [Line2D([], [], color="#555555", linestyle=line, label=label) for line, label in _STAGES]
    for number, group in enumerate(groups):
        colour, marker = _style(number)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, label=group.name))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    return figure


_STAGES: tuple[tuple[Literal["-", "--"], str], ...] = (("-", "validation"), ("--", "training"))


def _class_accuracy(groups: Sequence[Group]) -> Any:
    from matplotlib.figure import Figure

    classes = list(groups[0].class_accuracy)
    table = [[group.class_accuracy.get(name, 0.0) for name in classes] for group in groups]
    figure = Figure(figsize=(9.5, 1.5 + 0.5 * len(groups)), layout="constrained")
    axes = figure.subplots()
    lowest = min(map(min, table))
    # As light as the weakest class, but never so narrow that noise looks like a difference.
    axes.imshow(table, cmap="Blues", vmin=min(lowest, 0.8) - 0.05, vmax=1.05, aspect="auto")
    axes.set_xticks(range(len(classes)), classes, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(groups)), [group.name for group in groups])
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
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return [f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])]


def _short(number: float | None) -> str:
    """Four digits and a unit: 61.71 k, 128.8 M, 15.09 G."""
    if number is None:
        return "-"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s"


def _memory(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _ranges(numbers: Sequence[int | None]) -> str:
    """'0-2', '3' or '0, 4'."""
    known = sorted({number for number in numbers if number is not None})
    if not known:
        return "-"
    if len(known) > 2 and known == list(range(known[0], known[-1] + 1)):
        return f"{known[0]}-{known[-1]}"
    return ", ".join(map(str, known))
