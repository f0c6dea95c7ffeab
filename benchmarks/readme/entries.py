"""The runs that the READMEs' tables show: what is trained (entries.yaml), and the records of it."""

import contextlib
import io
import pydoc
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from cli.recipes import load_yaml, recipes
from errors import UserError, printed_error
from inspection.stages import stages
from runs.reading import Run, find_runs, matches
from runs.settings import shaping
from train import main as train

TABLE = Path(__file__).with_name("entries.yaml")
RECORD = re.compile(r"(.+)-seed(\d+)-(cpu|gpu)\.json")
# Images in the whole data set; a record of other data is not for the READMEs.
TRAINING_IMAGES, TEST_IMAGES = 60_000, 10_000


@dataclass(frozen=True)
class Entry:
    """A recipe as it is trained for the tables.

    Attributes:
        family: reproduction, best, fast, default, short or ablation.
        recipe: Its name.
        flags: Flags of train.py besides it.
        suffix: What follows the recipe in its records' names.
        seeds: How many seeds are trained.
        line: The same for entries that share a line of the table.
        network: Its name in English and in Chinese; if empty, the class's.
        published: Published test accuracy, or None.
    """

    family: str
    recipe: str
    flags: tuple[str, ...] = ()
    suffix: str = ""
    seeds: int = 3
    line: str = ""
    network: tuple[str, ...] = ()
    published: float | None = None

    @property
    def name(self) -> str:
        """The beginning of its records' names."""
        return self.recipe.replace("/", "-") + self.suffix

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that train.py makes of it."""
        return resolve(self.recipe, self.flags)

    @property
    def size(self) -> tuple[int, int]:
        """Parameters, and floating-point operations of an image's forward pass."""
        return _size(self.recipe, self.flags)

    @property
    def images(self) -> int:
        """Training images an epoch."""
        return TRAINING_IMAGES - self.config["data"]["val_size"]

    @property
    def cost(self) -> int:
        """Floating-point operations of all its forward passes: only used to order entries."""
        return self.size[1] * self.images * self.config["trainer"]["max_epochs"]


@dataclass
class Results:
    """The entries and their records.

    Attributes:
        entries: All of them.
        runs: By entry and device (cpu, gpu), ordered by seed.
        stale: Records that belong to no entry, or whose recipe has changed since.
        folder: Where the records of the other benchmarks lie.
    """

    entries: list[Entry]
    runs: dict[tuple[Entry, str], list[Run]] = field(default_factory=dict)
    stale: list[Path] = field(default_factory=list)
    folder: Path = Path()

    def of(self, entry: Entry, device: str) -> list[Run]:
        """The finished runs of an entry on a device."""
        return self.runs.get((entry, device), [])

    @cached_property
    def devices(self) -> list[str]:
        """The devices that there are records of."""
        return sorted({device for _, device in self.runs})


def read_entries(families: Iterable[str] = (), wanted: Iterable[str] = (), more: tuple[str, ...] = ()) -> list[Entry]:
    """The entries, with patterns of recipes expanded: of some families, and wanted by recipe or by name of the record.

    Raises:
        UserError: If a family or recipe is unknown.
    """
    content = load_yaml(TABLE)
    entries = [entry for family, section in content.items() for entry in _family(family, section, more)]
    for family in families:
        if family not in content:
            raise UserError(f"there is no family {family!r}; there are {', '.join(content)}")
    for name in wanted:
        if not any(_called(entry, name) for entry in entries):
            names = ", ".join(dict.fromkeys(entry.recipe for entry in entries))
            raise UserError(f"no entry of {TABLE.name} is called {name!r}; its recipes are {names}")
    chosen = [entry for entry in entries if entry.family in list(families or content)]
    return [entry for entry in chosen if not wanted or any(_called(entry, name) for name in wanted)]


def read_results(folder: Path, more: tuple[str, ...] = ()) -> Results:
    """All entries, with the records in a folder's `runs/`; `more` are flags the runs had besides their entries' own.

    Raises:
        UserError: If a record is damaged, or unfinished.
    """
    results = Results(read_entries(more=more), folder=folder)
    by_name = {entry.name: entry for entry in results.entries}
    for path in sorted((folder / "runs").glob("*.json")):
        found = RECORD.fullmatch(path.name)
        (run,) = find_runs([path])
        entry = by_name.get(found[1]) if found else None
        if not run.finished or not found or run.seed != int(found[2]):
            raise UserError(f"{path} is not the record of a finished run, or not of the seed that its name says")
        if entry and run.recipe == entry.recipe and matches(run, shaping(entry.config)):
            results.runs.setdefault((entry, found[3]), []).append(run)
        else:
            results.stale.append(path)
    for runs in results.runs.values():
        runs.sort(key=lambda run: run.record["seed"])
    return results


def machines(runs: Iterable[Run]) -> str:
    """Their GPUs or CPUs; of a GPU without maker and memory."""
    left_out = r"\bNVIDIA |[ -](SXM\d-)?\d+GB.*|\(R\)| Processor"
    return " / ".join(dict.fromkeys(re.sub(left_out, "", run.machine) for run in runs))


@cache
def resolve(recipe: str, flags: tuple[str, ...]) -> dict[str, Any]:
    """The configuration that train.py makes of a recipe and flags.

    Raises:
        UserError: If it is not valid.
    """
    out, err = io.StringIO(), io.StringIO()
    # In this process: importing Lightning once for each would take minutes.
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = train(["fit", "--model", recipe, *flags, "--print_config"])
        except SystemExit as end:
            code = end.code
    if code:
        raise UserError(f"{recipe}: {printed_error(err.getvalue()) or f'exit code {code}'}")
    return yaml.safe_load(out.getvalue())


@cache
def _size(recipe: str, flags: tuple[str, ...]) -> tuple[int, int]:
    config = resolve(recipe, flags)
    net, data = config["model"]["net"], config["data"]
    arguments = dict(net.get("init_args") or {})
    if "image_size" in arguments:
        arguments["image_size"] = data["image_size"]
    with torch.device("meta"):  # no memory for the weights
        network = pydoc.locate(net["class_path"])(**arguments)  # type: ignore[operator]
    total = stages(network, (data["channels"], data["image_size"], data["image_size"]))[1]
    return total.parameters, total.flops


def _family(family: str, section: dict[str, Any], more: tuple[str, ...]) -> Iterable[Entry]:
    for line in section["entries"]:
        patterns = line["recipe"] if isinstance(line["recipe"], list) else [line["recipe"]]
        names = [name for pattern in patterns for name in recipes() if fnmatch(name, pattern)]
        suffix, published, network = line.get("suffix", ""), line.get("published"), line.get("network", ())
        for name in names:
            yield Entry(
                family=family,
                recipe=name,
                flags=(*shlex.split(line.get("flags", "").format(network=name.rpartition("/")[2])), *more),
                suffix=suffix,
                seeds=line.get("seeds", section["seeds"]),
                line=" ".join(names) if len(patterns) > 1 else name + suffix,
                network=tuple(network.get(name, ()) if isinstance(network, dict) else network),
                published=published.get(name) if isinstance(published, dict) else published,
            )


def _called(entry: Entry, name: str) -> bool:
    return any(fnmatch(own, name) for own in (entry.recipe, entry.recipe + entry.suffix, entry.name))
