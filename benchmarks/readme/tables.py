"""The tables of the READMEs and the results in docs/, written from the records.

What stands between `<!-- results FAMILY -->` and `<!-- /results -->` becomes the table of that family of entries;
after `<!-- results MODULE -->`, in a page of docs/, that of the entries whose network is in models/MODULE.py; after
`<!-- results first -->` the short one with which the READMEs begin; after `<!-- results speedrun -->` the board of the
speedrun;
after `<!-- results photographs -->` the runs of results/photos/.
`<!-- throughput DEVICE -->` and `<!-- measured DEVICE -->` are the tables of the benchmarks. Where a record is missing,
so is its line or its cell.
"""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from statistics import fmean, mean, median
from typing import Any, NamedTuple

import jinja2

from benchmarks.harness.side_by_side import PROJECT
from benchmarks.readme.entries import RECORD, Entry, Results, machines, resolve
from benchmarks.readme.rounding import accuracies, counted, down, duration, mean_and_range, share, span, up
from cli.recipes import load_yaml
from errors import UserError
from runs.differences import LEVEL, differences
from runs.groups import Group
from runs.reading import Run, find_runs

README, CHINESE = PROJECT / "README.md", PROJECT / "README.zh-CN.md"
SPEEDRUN = PROJECT / "benchmarks" / "speedrun.md"
SPEEDRUN_SEEDS = 5  # that its rules ask for
REGION = re.compile(r"(<!-- (results|throughput|measured) ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- (?:results|throughput|measured) ")
# A run that ends below this has not learnt: chance is 0.1.
COLLAPSED = 0.15
TEXTS: dict[str, Any] = load_yaml(Path(__file__).with_name("tables.yaml"))
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined)
JINJA.filters |= {"down": down, "up": up, "median": median, "percent": lambda value: down(100 * value, 2)}
PEERS, NETWORKS = TEXTS["peers"], TEXTS["networks"]


class Language(NamedTuple):
    """Which of several texts to use, English (0) or Chinese (1), and the word between the ends of a range."""

    number: int
    to: str


def pages() -> list[Path]:
    """The files that have tables to write."""
    folders = (PROJECT / "docs", PROJECT / "docs/zh-CN")
    files = [README, CHINESE, SPEEDRUN, *(page for folder in folders for page in sorted(folder.glob("*.md")))]
    return [path for path in files if OPENING.search(path.read_text(encoding="utf-8"))]


def written(path: Path, results: Results, folder: Path) -> str:
    """A page's text with its tables filled in from the records; those of the benchmarks are in the folder.

    Raises:
        UserError: If a region has no end, or an unknown name.
    """
    text = path.read_text(encoding="utf-8")
    number = int(path.name == CHINESE.name or path.parent.name == "zh-CN")
    language = Language(number, TEXTS["between"][number])
    if len(OPENING.findall(text)) != len(REGION.findall(text)):
        raise UserError(f"{path.name}: a <!-- results ... --> or other region has no end, or not one name")

    def fill(region: re.Match[str]) -> str:
        opening, kind, name, end = region.groups()
        if kind == "results":
            table = results_table(name, results, language)
        elif kind == "throughput":
            table = throughput_table(_read(folder, f"throughput-{name}"), language)
        else:
            table = measured_table(folder, name, language)
        return f"{opening}{table}\n{end}"

    return REGION.sub(fill, text)


def results_table(name: str, results: Results, language: Language) -> str:
    """The Markdown table of a family, or of the entries with a network of one module.

    Raises:
        UserError: If there is neither.
    """
    if name == "first":
        return _first(results, language)
    if name == "speedrun":
        return _speedrun(results, language)
    if name == "photographs":
        return _photographs(results.folder / "photos", language)
    if name.startswith("ablation"):
        return _ablation(name.removeprefix("ablation").removeprefix("_"), results, language)
    if name in {entry.family for entry in results.entries}:
        entries = [entry for entry in results.entries if entry.family == name]
        return _best(entries, results, language) if name == "best" else _family(entries, results, language)
    module = f"models.{name}."
    shown = [entry for entry in results.entries if entry.family not in ("short", "ablation")]
    of_module = [entry for entry in shown if entry.config["model"]["net"]["class_path"].startswith(module)]
    if not of_module:
        raise UserError(f"there is no family and no network {name!r} to show results of")
    rows = []
    for entry in of_module:
        for device in results.devices:
            if runs := results.of(entry, device):
                command = " ".join(["python train.py --model", entry.recipe, *entry.flags])
                rows.append(
                    (f"`{command}`", *_score(runs, language), _published([entry]), _time(runs, device, results))
                )
    return _markdown([_header("network", language), *rows], left=1) if rows else TEXTS["missing"][language.number]


def _family(entries: Sequence[Entry], results: Results, language: Language) -> str:
    rows = []
    for _, line in groupby(entries, key=lambda entry: entry.line):
        alike = list(line)
        network = alike[0].network[language.number : language.number + 1] or [_class(alike[0].config)]
        model = (network[0], *_model(alike, language), _published(alike))
        for device in [device for device in results.devices if results.of(alike[0], device)] or [""]:
            runs = results.of(alike[0], device) if len(alike) == 1 else []
            rows.append((_recipes(alike), *model, *_score(runs, language), _time(runs, device, results)))
    return _markdown([_header("family", language), *rows], left=2)


def _best(entries: Sequence[Entry], results: Results, language: Language) -> str:
    rows = []
    for recipe in dict.fromkeys(entry.recipe for entry in entries):
        split, full = sorted((entry for entry in entries if entry.recipe == recipe), key=lambda entry: entry.images)
        model = (_recipes([full]), *_model([full], language), _published([full]))
        for device in [name for name in results.devices if results.of(split, name) or results.of(full, name)] or [""]:
            parts = [results.of(entry, device) for entry in (split, full)]
            (first, seeds), (second, more_seeds) = (_score(runs, language) for runs in parts)
            flipped = mean_and_range(accuracies(parts[1], "accuracy_flip"), language.to)
            counts = ", ".join(filter(None, (seeds, more_seeds)))
            rows.append((*model, first, second, flipped, counts, _time(parts[1] or parts[0], device, results)))
    return _markdown([_header("best", language), *rows], left=1)


def _first(results: Results, language: Language) -> str:
    """What `tables.yaml` lists for the first look at the README."""
    rows = []
    for entry in [entry for name in TEXTS["first"] for entry in results.entries if entry.name == name]:
        for device in [device for device in results.devices if results.of(entry, device)]:
            runs = results.of(entry, device)
            time, timed = _timed(runs, device, results)
            score = _score(runs, language)[:1]
            rows.append((*_command(entry, language), *score, time, _place(timed, device, language)))
    return _markdown([_header("first", language), *rows], left=2)


def _speedrun(results: Results, language: Language) -> str:
    """The entries of the family fast by machine, the shortest training first; runs beside other work don't count."""
    board = []
    for (entry, device), every in results.runs.items():
        runs = [run for run in every if "background" not in run.record]
        if entry.family == "fast" and runs:
            seconds = fmean(run.record["fit_seconds"] for run in runs)
            seeds = TEXTS["seeds"][language.number].format(len(runs), SPEEDRUN_SEEDS)
            score = mean_and_range(accuracies(runs), language.to)
            place = _place(runs, device, language)
            board.append((place, seconds, (*_command(entry, language), up(seconds, 1), score, seeds, place)))
    return _markdown([_header("speedrun", language), *(row for *_, row in sorted(board))], left=2)


def _photographs(folder: Path, language: Language) -> str:
    """Networks trained on a folder of photographs, the best first: accuracy in the best and in the last epoch."""
    found = sorted(RECORD.fullmatch(path.name).group(1, 3, 0) for path in folder.glob("*.json"))  # type: ignore[union-attr]
    table = []
    for (_, device), same in groupby(found, key=lambda name: name[:2]):
        runs = find_runs([folder / name for *_, name in same])
        record = runs[0].record
        network = _class(record["config"])
        if (divisor := record["config"]["model"]["net"]["init_args"].get("width_divisor", 1)) > 1:
            network += f" / {divisor}"
        chosen = accuracies(runs)
        last = [counted(run.record["epochs"][-1]["val/accuracy"], run.record["val_images"]) for run in runs]
        balanced = [Fraction(str(run.record["test"]["balanced_accuracy"])) for run in runs]
        scores = (mean_and_range(values, language.to) for values in (chosen, last, balanced))
        model = (f"`{record['recipe']}`", network, str(record["image_size"]), f"{record['parameters']:,}")
        table.append((fmean(chosen), (*model, *scores, str(len(runs)), _place(runs, device, language))))
    rows = [row for _, row in sorted(table, reverse=True)]
    return _markdown([_header("photographs", language), *rows], left=2)


def _ablation(network: str, results: Results, language: Language) -> str:
    """The changes of the family ablation and what they did, for one network or for all; bold: more than chance."""
    entries = [entry for entry in results.entries if entry.family == "ablation"]
    entries = [entry for entry in entries if network in ("", entry.recipe.partition("/")[2])]
    if not entries:
        raise UserError(f"there is no network {network!r} with changes to show")
    cells: dict[tuple[str, str], str] = {}
    for recipe in dict.fromkeys(entry.recipe for entry in entries):
        own = {
            entry: results.of(entry, "cpu") or results.of(entry, "gpu") for entry in entries if entry.recipe == recipe
        }
        groups = {entry: Group(runs) for entry, runs in own.items() if runs}
        if not groups or next(iter(groups)).suffix:
            continue  # the network as it is has no record yet
        plain, *changed = groups
        found = differences([groups[entry] for entry in (plain, *changed)], best_first=False)
        means = [mean(accuracies(group.runs)) for group in groups.values()]
        sizes = [(100 * (own - means[0]), one.p < LEVEL) for own, one in zip(means[1:], found, strict=True)]
        points = [f"{'+' if size > 0 else '−'}{down(abs(size), 1)}" for size, _ in sizes]
        marks = [
            "",
            *(f" (**{text}**)" if real else f" ({text})" for text, (_, real) in zip(points, sizes, strict=True)),
        ]
        for entry, mark in zip((plain, *changed), marks, strict=True):
            score = mean_and_range(accuracies(groups[entry].runs), language.to).partition(" (")[0]
            cells[entry.network[language.number], NETWORKS[recipe.partition("/")[2]]] = score + mark
    names = [name for name in NETWORKS.values() if any(name == key[1] for key in cells)]
    changes = dict.fromkeys(entry.network[language.number] for entry in entries)
    rows = [(change, *(cells.get((change, name), "") for name in names)) for change in changes]
    rows = [row for row in rows if any(row[1:])]
    return _markdown([[*_header("ablation", language), *names], *rows], left=1)


def _command(entry: Entry, language: Language) -> tuple[str, str]:
    """What to give to train.py, and the network's name."""
    network = entry.network[language.number] if entry.network else _class(entry.config)
    return f"`{' '.join([entry.recipe, *entry.flags])}`", network


def _place(runs: Sequence[Run], device: str, language: Language) -> str:
    """The machines, and of CPUs the number of cores."""
    cores = {run.record["machine"].get("cores") for run in runs} if device == "cpu" else set()
    return machines(runs) + "".join(TEXTS["cores"][language.number].format(count) for count in cores if count)


def throughput_table(record: dict[str, Any] | None, language: Language) -> str:
    """Images per second in training, and the ratio to each of the others, from the record of benchmarks.throughput."""
    if not record:
        return TEXTS["missing"][language.number]
    networks = [{one["contestant"]: one for one in entry["contestants"]} for entry in record["results"]]
    peers = [name for name in PEERS if any(name in network for network in networks)]
    bf16 = any("ours_bf16" in network for network in networks)
    header = _header("throughput", language)
    header[2:3] = header[2:3] if bf16 else []
    for name in peers:
        header.append(PEERS[name][language.number].format(record["versions"].get(name, "")))
        header += [TEXTS["bf16_over_tutorial"][language.number]] if bf16 and name == "tutorial" else []
    confirmed = any("by_difference" in entry for entry in record["results"])
    header += [TEXTS["confirmed"][language.number]] if confirmed else []
    rows = []
    for entry, contestants in zip(record["results"], networks, strict=True):
        network = NETWORKS.get(entry["network"], entry["network"])
        cells = [f"{network}, {entry['image_size']}, {entry['batch_size']}"]
        names = ("ours", *(["ours_bf16"] if bf16 else []))
        cells += [_rate(contestants.get(name, {}).get("images_per_second")) for name in names]
        ours, aim = contestants["ours"], entry["target_share_of_peak"]
        cells.append(down(ours["share_of_peak"], 2) + (f" ({aim:g})" if aim else ""))
        cells.append(up(ours["peak_memory_bytes"] / 2**30, 1))
        for name in peers:
            ratio = contestants.get(name, {}).get("ours_over_this")
            cells.append(_ratio(ratio, language.to) if ratio else "")
            if bf16 and name == "tutorial":
                ratio = contestants.get("ours_bf16", {}).get("over_tutorial")
                cells.append(_ratio(ratio, language.to) if ratio else "")
        if confirmed:
            cells.append(_by_whole_runs(entry.get("by_difference")))
        rows.append(cells)
    return _markdown([header, *rows], left=1)


def _by_whole_runs(second: dict[str, Any] | None) -> str:
    """Images per second and ratio to the tutorial's loop, in float32 and where it was measured in bfloat16."""
    rates = second["images_per_second"] if second else {}
    names = [name for name in ("ours", "ours_bf16") if name in rates and "tutorial" in rates]
    return " / ".join(f"{_rate(rates[name])}; {down(rates[name] / rates['tutorial'], 2)}" for name in names)


def measured_table(folder: Path, device: str, language: Language) -> str:
    """What the other benchmarks measured: a line for each that has a record."""
    rows = []
    for line in TEXTS["lines"]:
        if "{}" not in line["record"] and device != "cpu":
            continue  # the place makes no difference
        if record := _read(folder, line["record"].format(device)):
            result = JINJA.from_string(line["result"][language.number]).render(record, names=NETWORKS)
            name = line["record"].partition("-")[0]
            command = " ".join(["python -m", f"benchmarks.{name}", *line.get("flags", [])])
            rows.append((line["what"][language.number], result, f"`{command}`"))
    return _markdown([_header("measured", language), *rows], left=3) if rows else TEXTS["missing"][language.number]


def _header(table: str, language: Language) -> list[str]:
    return TEXTS["headers"][table][language.number].split(" | ")


def _recipes(entries: Sequence[Entry]) -> str:
    return " ".join(f"`{entry.recipe}`" for entry in entries)


def _class(config: dict[str, Any]) -> str:
    return config["model"]["net"]["class_path"].rpartition(".")[2]


def _model(entries: Sequence[Entry], language: Language) -> tuple[str, ...]:
    """Input, parameters, FLOPs and epochs, from the configurations and the networks themselves."""
    configs = [entry.config for entry in entries]
    parameters, flops = zip(*(entry.size for entry in entries), strict=True)
    columns = (
        [str(config["data"]["image_size"]) for config in configs],
        [f"{count:,}" if len(set(parameters)) == 1 else f"{count / 1e6:.1f} M" for count in parameters],
        [f"{count / 1e6:.2f} M" if count < 1e7 else f"{count / 1e9:.2f} G" for count in flops],
        [str(config["trainer"]["max_epochs"]) for config in configs],
    )
    return tuple(span(column, language.to) for column in columns)


def _published(entries: Sequence[Entry]) -> str:
    values = [share(f"{entry.published:.3f}") for entry in entries if entry.published is not None]
    return span(values) if values else ""


def _score(runs: Sequence[Run], language: Language) -> tuple[str, str]:
    """Test accuracy, the number of seeds, and how many of them collapsed."""
    if not runs:
        return "", ""
    values = accuracies(runs)
    return mean_and_range(values, language.to), f"{len(values)} ({sum(value < COLLAPSED for value in values)})"


def _time(runs: Sequence[Run], device: str, results: Results) -> str:
    """Mean time of training, and where."""
    time, timed = _timed(runs, device, results)
    return f"{time}, {machines(timed)}" if time else ""


def _timed(runs: Sequence[Run], device: str, results: Results) -> tuple[str, Sequence[Run]]:
    """Mean time of training, and the runs that it is of.

    Runs that were made beside other work give none: it is estimated (≈) from the speed that benchmarks.throughput
    measured, or else the longest of them is the bound (≤).
    """
    if not runs:
        return "", runs
    if alone := [run for run in runs if "background" not in run.record]:
        return duration(fmean(run.record["fit_seconds"] for run in alone)), alone
    if rates := [(run, rate) for run in runs if (rate := _rate_of(run, device, results))]:
        seconds = [run.record["max_epochs"] * run.record["train_images"] / rate for run, rate in rates]
        return f"≈ {duration(fmean(seconds))}", [run for run, _ in rates]
    return f"≤ {duration(max(run.record['fit_seconds'] for run in runs))}", runs


def _rate_of(run: Run, device: str, results: Results) -> float | None:
    """Images per second in training as this run, but alone on the same kind of machine; None if not measured."""
    record = _read(results.folder, f"throughput-{device}") or {"machine": {}, "results": []}
    in_bf16 = run.record["precision"].startswith("bf16")
    if device == "gpu" and not in_bf16:
        return None  # it measures the default there
    name = "ours_bf16" if device == "cpu" and in_bf16 else "ours"
    wanted = (run.recipe, run.record["image_size"], run.record["batch_size"])
    for entry in record["results"]:
        measured_on = entry.get("measured", record)["machine"]
        alike = all(measured_on.get(key) == run.record["machine"].get(key) for key in ("cpu", "gpu"))
        if alike and (entry["network"], entry["image_size"], entry["batch_size"]) == wanted:
            if run.record["config"]["model"]["net"] != resolve(run.recipe, ())["model"]["net"]:
                return None
            return next((one["images_per_second"] for one in entry["contestants"] if one["contestant"] == name), None)
    return None


def _rate(rate: float | None) -> str:
    return "" if rate is None else down(rate, 0 if rate >= 10 else 1)


def _ratio(ratio: dict[str, float], to: str) -> str:
    middle, least, greatest = (down(ratio[key], 2) for key in ("median", "least", "greatest"))
    return f"{middle} ({least}{to}{greatest})"


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _markdown(rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(
        "|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in (rows[0], rule, *rows[1:])
    )
