"""What compare.py does: the comparison of runs as a table on the terminal, and as Markdown and CSV."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errors import UserError, count, plain, print_error, shown, writable
from runs.differences import POINTS, Difference, differences
from runs.groups import Group, by_data, marks, ranges, wilson
from runs.plots import check_matplotlib, draw
from runs.reading import Run, find_runs
from runs.training import Request, train_missing

SCORES = ("#", "network", "seeds", "test accuracy", "95 % interval")
COSTS = ("parameters", "FLOPs/image", "images/s", "epoch", "peak memory", "epochs")
COLUMNS = SCORES + COSTS
SHOWN = 8  # differences on the terminal


def compare(request: Request) -> int:
    """Train what is missing, show the table, write the report; returns the exit code.

    Raises:
        UserError: If there is nothing to compare, or the configuration of a run to train is not valid.
    """
    failed: list[str] = []
    if request.output:  # before anything is trained
        check_matplotlib()
        _check_folder(request.output)
    if request.recipes:
        runs, failed = train_missing(request)
    else:
        if not request.paths and not request.log_dir.exists():
            raise UserError(f"there are no runs in {request.log_dir}; start with: python train.py --model lenet")
        runs = find_runs(request.paths or [request.log_dir])
    finished = [run for run in runs if run.finished]
    if not finished and not failed:
        where = ", ".join(map(str, request.paths or [request.log_dir]))
        hint = _untested(runs) or "start with: python train.py --model lenet"
        raise UserError(f"there is no finished run in {where}; {hint}")
    tables = by_data(finished)
    for data, groups in tables.items():
        if len(tables) > 1:
            print(f"{data}:")
        print_table(groups)
    if left_out := sum(not run.trained for run in runs):
        print(f"{count(left_out, 'unfinished run')} left out")
    if untested := _untested(runs):
        print(plain(f"left out: {untested}"))
    if older := len(finished) - sum(len(group.runs) for groups in tables.values() for group in groups):
        print(f"{count(older, 'older run')} of the same seed left out")
    if request.output:
        for number, (data, groups) in enumerate(tables.items(), 1):
            folder = request.output / f"data_{number}" if len(tables) > 1 else request.output
            write_report(groups, folder, data)
            print(f"Wrote {plain(str(folder / 'report.md'))}")
    for failure in failed:
        print_error("compare.py", failure)
    return 1 if failed else 0


def _untested(runs: Sequence[Run]) -> str:
    """How many runs were trained, but never tested, and the command that tests the first of them; "" if none was."""
    found = [run for run in runs if run.trained and not run.finished]
    commands = [run.test_command for run in found if run.test_command]
    what = f"{count(len(found), 'run')} trained but not tested" if found else ""
    return f"{what}; {'to test it' if len(found) == 1 else 'to test one'}: {commands[0]}" if commands else what


def _check_folder(folder: Path) -> None:
    """Refuse a folder that can't be made, or be written to.

    Raises:
        UserError: If so.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not writable(folder / "report.md"):
        reason = "can't be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"the report can't be written to {folder}: {shown(nearest)} {reason}; give another --output")


def print_table(groups: Sequence[Group]) -> None:
    """Show the comparison on the terminal."""
    console = terminal()
    rows = [dict(zip(COLUMNS, cells(number, group), strict=True)) for number, group in enumerate(groups, 1)]

    def table(columns: Sequence[str]) -> Any:
        lines = [[row[column] for column in columns] for row in rows]
        return rich_table(columns, lines, left=("network",), bold_first=len(rows) > 1)

    whole = table(COLUMNS)
    fits = console.measure(whole, options=console.options.update(max_width=1000)).maximum <= console.width
    for part in [whole] if fits else [table(SCORES), table((COLUMNS[0], *COSTS))]:
        console.print(part)
    for line in notes(groups, SHOWN):
        console.print(_as_text(line), style="dim")


def terminal() -> Any:
    """Rich's console; a wide one where there is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def rich_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = (), bold_first: bool = False
) -> Any:
    """A table for Rich's console; all columns but the left ones are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        # Names are broken into lines, numbers are not: nothing is cut.
        name = column in left
        table.add_column(_as_text(column), justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(_as_text, row), style="bold" if bold_first and number == 0 else "")
    return table


def _as_text(line: str) -> Any:
    """Escaped for Rich, which takes a name in brackets for markup, and one in colons for an emoji."""
    from rich.text import Text

    return Text(plain(line))


def cells(number: int, group: Group) -> list[str]:
    """One line of the table; its number stands in the plots too."""
    low, high = group.interval
    deviation = f" ± {group.deviation:.4f}" if group.deviation is not None else ""
    return [
        str(number),
        group.marked,
        str(len(group.runs)),
        f"{group.accuracy:.4f}{deviation}",
        f"{low:.4f} to {high:.4f}",
        _short(group.mean("parameters")),
        _short(group.mean("flops")),
        _or_dash(group.mean("images_per_second"), "{:,.0f}"),
        _time(group.epoch_seconds),
        _memory(group.mean("peak_memory_bytes")),
        ranges([len(run.record["epochs"]) for run in group.runs]),
    ]


def notes(groups: Sequence[Group], most: int | None = None) -> list[str]:
    """What a reader of the table must know; at most this many differences between groups."""
    runs = [run for group in groups for run in group.runs]
    images = sorted({run.tested for run in runs})
    machines = dict.fromkeys(run.machine for run in runs)
    precisions = dict.fromkeys(run.record["precision"] for run in runs)
    lines = [f"Test accuracy on {' or '.join(f'{count:,}' for count in images)} images, with its Wilson interval."]
    if any(group.deviation is not None for group in groups):
        lines[0] += " ±: standard deviation between seeds."
    lines.append(f"Speed and memory on {'; '.join(machines)}; precision {', '.join(precisions)}.")
    if any("cuda" not in run.record["machine"] for run in runs):
        lines[-1] += " Without an NVIDIA GPU, memory is that of the whole process."
    lines += marks(groups)
    found = differences(groups)
    lines += [str(difference) for difference in found[:most]]
    if found:
        lines.append(_what_is_compared(found, len(groups)))
    return lines


def _what_is_compared(found: Sequence[Difference], groups: int) -> str:
    """How the differences were judged, and how many seeds would show more."""
    text = "Compared image by image on the test images"
    if not all(difference.paired for difference in found):
        text += "; unpaired where an older record does not say which images were right"
    text += "; corrected for the number of comparisons and for picking the best." if groups > 2 else "."
    if any(difference.single for difference in found):
        text += " Single runs compare the networks; comparing the recipes takes 2 seeds or more of each."
    several = [difference.seeds for difference in found if difference.paired and difference.scatters]
    points = f"{100 * POINTS:g} points"
    if None in several:
        text += f" With so few test images, no number of seeds can tell {points} from chance."
    elif several:
        text += f" To see {points} takes {max(map(int, several))} seeds of each."  # type: ignore[arg-type]
    return text


def write_report(groups: Sequence[Group], folder: Path, data: str) -> None:
    """Write report.md, runs.csv and the plots.

    Raises:
        MissingPackage: If Matplotlib is not installed.
        UserError: If the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots = draw(groups, folder)
        _write_csv(groups, folder / "runs.csv")
        (folder / "report.md").write_text(markdown(groups, plots, data), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report can't be written to {folder}: {error.strerror or error}") from None


def markdown(groups: Sequence[Group], plots: dict[str, str], data: str) -> str:
    """The report, with the plots (title to file name) below the table."""
    rows = [list(COLUMNS), *(cells(number, group) for number, group in enumerate(groups, 1))]
    lines = [f"# Comparison: {_as_markdown(data)}", "", *_markdown_table(rows)]
    lines += ["", *(f"{_as_markdown(note)}  " for note in notes(groups))]
    classes = list(dict.fromkeys(name for group in groups for name in group.class_accuracy))
    if classes:
        rows = [["#", "test accuracy of", *classes]]
        for number, group in enumerate(groups, 1):
            by_class = group.class_accuracy
            rows.append([str(number), group.marked, *(_or_dash(by_class.get(name), "{:.3f}") for name in classes)])
        lines += ["", *_markdown_table(rows)]
    for title, file in plots.items():
        lines += ["", f"![{title}]({file})"]
    lines += ["", "Runs:", ""]
    for group in groups:
        for run in group.runs:
            versions = run.record["versions"]
            commit = (run.record.get("commit") or "unknown")[:12]
            line = (
                f"{group.name}, seed {run.seed}: {run.accuracy:.4f} ({run.folder.as_posix()}, commit {commit}, "
                f"torch {versions.get('torch')}, Python {versions.get('python')})"
            )
            lines.append(f"- {_as_markdown(line)}")
    return "\n".join(lines) + "\n"


def _write_csv(groups: Sequence[Group], path: Path) -> None:
    classes = list(dict.fromkeys(name for group in groups for name in group.class_accuracy))
    rows = [_csv_row(group, run, classes) for group in groups for run in group.runs]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: _as_cell(value) for name, value in row.items()} for row in rows)


def _csv_row(group: Group, run: Run, classes: Sequence[str]) -> dict[str, Any]:
    """Of one run; its keys in the order of the columns."""
    test, by_class = run.record["test"], run.record["test"].get("class_accuracy") or {}
    low, high = wilson(run.accuracy, run.tested)

    def recorded(*names: str) -> dict[str, Any]:
        return {name: run.record.get(name) for name in names}

    return {
        "network": group.name,
        **recorded("recipe", "seed"),
        "test_accuracy": run.accuracy,
        "interval_low": low,
        "interval_high": high,
        "test_loss": test["loss"],
        **recorded("best_val_accuracy", "parameters", "flops", "images_per_second"),
        "epoch_seconds": run.epoch_seconds,
        **recorded("fit_seconds", "peak_memory_bytes"),
        "epochs": len(run.record["epochs"]),
        "partial": "; ".join(run.partial),
        **recorded("batch_size", "image_size", "precision"),
        "machine": run.machine,
        **recorded("commit"),
        "folder": run.folder.as_posix(),
        **{f"accuracy of {name}": by_class.get(name) for name in classes},
    }


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---" if column in ("network", "test accuracy of") else "---:" for column in rows[0]]
    first, *others = [list(map(_as_markdown, row)) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (first, rule, *others)]


def _as_markdown(text: str) -> str:
    """The text escaped for Markdown: no markup, no HTML, no link or picture."""
    text = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", text)
    return re.sub(r"^([#+-]|\d+[.)])(?=\s)", r"\\\1", text)


def _as_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula, marked as text."""
    return f"'{plain(value)}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


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
