"""The benchmarks, and the tables that are written from their records."""

import json
import math
import os
import re
import statistics
import subprocess
import sys
from argparse import Namespace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DATA, ENVIRONMENT, REPO, whole_set
from torch import nn
from torch.nn import functional as F

from benchmarks import verify
from benchmarks.changed import NETWORKS, averaged, hidden, large_kernels, sigmoid, without_1x1
from benchmarks.harness.side_by_side import RESULTS, Contestant, Missing, Parser, contest, median, occasion, ratios
from benchmarks.memory import LiveBytes, training_bytes
from benchmarks.peers.airbench import augmented, triangle
from benchmarks.precision import compared, pooled_deviation
from benchmarks.readme import accuracy_time
from benchmarks.readme.entries import Entry, Results, read_entries, read_results
from benchmarks.readme.rounding import down, duration, mean_and_range, up
from benchmarks.readme.tables import SPEEDRUN, Language, pages, results_table, written
from benchmarks.results import _jobs, _lacks_bfloat16, main
from benchmarks.scaling import all_reduce_seconds
from benchmarks.throughput import PROCESS_BYTES, _groups, _memory, training_flops
from benchmarks.verify import band, kin, usual_deviation
from errors import UserError
from inspection.receptive_field import receptive_fields
from runs.reading import Run, find_runs

# ---- Each benchmark runs end to end in a tiny setting and writes a record; what they calculate is checked by hand.

PROJECT = Path(__file__).parents[1]
CONTESTANT = """
import sys, time
from benchmarks.harness.side_by_side import Turns
turns = Turns(warm_up=0.01)
turns.wait()
while True:
    with open(sys.argv[2], "a") as log:
        log.write(sys.argv[1])
    time.sleep(0.02)
    turns.step(10)
"""


def contestant(name: str, log: Path) -> Contestant:
    return Contestant(["-c", CONTESTANT, name, str(log)])


def test_contestants_take_turns(tmp_path):
    log = tmp_path / "log"
    names = ("A", "B")

    turns, missing = contest({name: partial(contestant, name, log) for name in names}, 0, 0.05, least_rounds=2)

    assert missing == {}
    assert [len(turns[name]) for name in names] == [2, 2]
    in_turn = "".join(
        name for name, before in zip(log.read_text(), " " + log.read_text(), strict=False) if name != before
    )
    assert in_turn in ("ABAB", "ABABAB", "ABABA")  # each begins its next step before it reports the turn's end
    assert all(0 < turn["rate"] <= 10 / 0.02 for name in names for turn in turns[name])


def test_a_turn_holds_as_many_steps_as_asked_for_after_two_that_do_not_count(tmp_path):
    log = tmp_path / "log"
    turns, _ = contest({"A": partial(contestant, "A", log)}, 0, 0.0, least_rounds=3, least_steps=4)
    assert [turn["steps"] for turn in turns["A"]] == [4, 4, 4]
    assert len(log.read_text()) >= 3 * (2 + 4)


def test_a_contestant_that_can_not_take_part_is_named(tmp_path):
    absent = "from benchmarks.harness.side_by_side import Turns; Turns().missing('it is not installed')"

    turns, missing = contest(
        {"A": lambda: contestant("A", tmp_path / "log"), "B": lambda: Contestant(["-c", absent])}, 0, 0.01
    )

    assert list(turns) == ["A"]
    assert missing == {"B": "it is not installed"}


def test_a_contestant_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="ended early"):
        Contestant(["-c", "raise SystemExit(1)"]).ready()
    with pytest.raises(Missing, match="why"):
        Contestant(["-c", "from benchmarks.harness.side_by_side import Turns; Turns().missing('why')"]).ready()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_missing_gpu_is_one_line():
    with pytest.raises(UserError, match=r"^PyTorch finds no NVIDIA GPU here$"):
        Parser("", budget=1).parse_args(["--accelerator", "gpu"])


def test_a_records_command_names_no_folder_of_the_machine(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["", "--data_dir", "/a/b", "--turn", "0.5", "--out=/c", "--folder", "d", "--update"]
    )
    assert occasion("throughput", {})["command"] == "python -m benchmarks.throughput --turn 0.5 --update"


@pytest.mark.parametrize("count", ["0", "-1", "x", "1.5"])
def test_a_number_of_anything_is_at_least_one(count: str) -> None:
    parser = Parser("", budget=1)
    parser.add_argument("--seeds", type=int, default=3)
    assert (parser.parse_args([]).seeds, parser.parse_args(["--seeds", "2"]).seeds) == (3, 2)
    with pytest.raises(UserError, match=f"--seeds: must be an integer of at least 1, got '{count}'"):
        parser.parse_args([f"--seeds={count}"])


def test_medians_and_ratios():
    ours, theirs = ([{"rate": rate} for rate in rates] for rates in ((10, 30, 20), (10, 10, 5)))

    assert median(ours) == 20
    assert ratios(ours, theirs) == {"median": 3, "least": 1, "greatest": 4}


def test_training_flops_are_three_forward_passes_less_the_images_gradient():
    forward, first_convolution = 833_040, 2 * 6 * 25 * 28 * 28  # of LeNet

    assert training_flops("lenet", 28) == 3 * forward - first_convolution


def test_training_bytes_hold_weights_and_activations():
    first_map = 4 * 6 * 28 * 28

    assert 16 * 61_706 + 8 * first_map < training_bytes("lenet", 8) < 16 * 61_706 + 8 * 4 * first_map
    assert training_bytes("lenet", 256, "bf16-mixed") < training_bytes("lenet", 256)


def test_vgg19_fits_into_24_gb():
    plain, checkpointed = (training_bytes("vgg19", 256, "bf16-mixed", checkpointing) for checkpointing in (False, True))

    # Two maps of 64x224x224, two of 128x112x112, four of 256x56x56 and of 512x28x28, in bfloat16, and the weights.
    maps = 256 * 2 * 64 * 224 * 224 * (2 + 2 / 2 + 4 / 4 + 4 / 8)
    assert maps + 16 * 139.5e6 < plain < 24e9  # the claim of the README
    assert 16 * 139.5e6 < checkpointed < 0.75 * plain


def test_live_bytes_are_counted_until_they_are_freed():
    outside = torch.empty(1000)
    with LiveBytes() as live:
        outside[:10].add_(1)
        first = torch.empty(100)
        view = first[:10]
        second = torch.empty(50)
        del second
        first.add_(1)

    assert (live.now, live.peak) == (400, 600)
    del first
    assert live.now == 400  # the view keeps it
    del view
    assert live.now == 0


def test_precisions_agree_within_two_standard_errors():
    def runs(*accuracies: float, speed: float) -> list[dict]:
        return [{"accuracy": accuracy, "images_per_second": speed} for accuracy in accuracies]

    plain = runs(0.90, 0.92, speed=10)
    near, far = (
        compared({"32": plain, "bf16-mixed": runs(*others, speed=20)}) for others in ((0.9, 0.94), (0.8, 0.82))
    )

    assert pooled_deviation([0.90, 0.92], [0.9, 0.94]) == pytest.approx(math.sqrt((0.0002 + 0.0008) / 2))
    assert near["difference"] == pytest.approx(0.01)
    assert near["times_as_fast"] == {"median": 2, "least": 2, "greatest": 2}
    assert (near["agree"], far["agree"]) == (True, False)
    assert compared({"32": plain[:1], "bf16-mixed": plain[1:]})["agree"] is None  # one seed tells nothing


def test_airbench_moves_and_mirrors_each_image():
    torch.manual_seed(0)
    images = torch.rand(20, 1, 28, 28)
    flipped = torch.arange(20) % 2 == 0

    moved = augmented(images, flipped)

    windows = F.pad(images, (2,) * 4, mode="reflect").unfold(2, 28, 1).unfold(3, 28, 1)[:, 0]
    places = set()
    for image, mirrored, choices in zip(moved[:, 0], flipped, windows, strict=True):
        image = image.flip(-1) if mirrored else image
        hits = (choices == image).all(-1).all(-1).nonzero()
        assert len(hits) == 1
        places.add(tuple(hits[0].tolist()))
    assert len(places) > 5


def test_airbench_learning_rate_is_a_triangle():
    rates = [triangle(step, 100) for step in range(101)]

    assert (rates[0], rates[100]) == pytest.approx((0.2, 0.07))
    assert max(rates) == rates[23] == 1


def test_contestants_that_fill_the_memory_take_part_in_groups():
    peers = ["tutorial", "references", "d2l"]
    memory = _memory("cpu")
    assert 0 < memory < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert _groups(peers, 0, memory) == [peers]
    assert _groups(peers, int(memory), memory) == [["tutorial"], ["references"], ["d2l"]]
    assert _groups(peers, int(memory / 3) - PROCESS_BYTES, memory) == [["tutorial", "references"], ["d2l"]]
    assert _groups(peers, int(memory), math.inf) == [peers]


def test_all_reduce_of_two_sends_the_gradient_once():
    assert all_reduce_seconds(100, 2, 100) == 1
    assert all_reduce_seconds(100, 1, 100) == 0


SMALL = "--data_dir tests/data"
COMMANDS = {
    "throughput": f"{SMALL} --networks lenet --batch_size 8 --seconds 1 --turn 0.05",
    "trainer_overhead": f"{SMALL} --batch_size 512 --seconds 1",
    "freed_memory": f"{SMALL} --recipes vgg11_small --seconds 1 --turn 0.05 --flags=--batch_size=8",
    "step_profile": "--networks lenet --batch_size 8",
    "data_path": f"{SMALL} --size 32 --batch_size 16 --seconds 1 --turn 0.05",
    "folder": f"{SMALL} --folder {DATA / 'photos'} --size 32 --batch_size 16 --seconds 1 --turn 0.05",
    "not_sure": f"{SMALL} --folder {DATA / 'photos/train/hat'}",
    "startup": f"{SMALL} --seconds 0",
    "speedrun": f"{SMALL} --seeds 1 --entry 10 lenet --flags=--max_epochs=1 --peer --peer_flags=--epochs=1",
    "memory": f"{SMALL} --networks lenet --batch_size 8 --precision 32 --measure",
    "precision": f"{SMALL} --networks lenet --seeds 1 --flags=--max_epochs=1",
    "collapse": f"{SMALL} --seeds 1 --networks nin --batches 2 --rounds 1 --val_size 200",
    "scaling": f"{SMALL} --devices 1 --steps 2 --seconds 0",
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_writes_a_record(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", *COMMANDS[name].split(), "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CONTEST_LOG": str(tmp_path / "log")}

    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    assert set(record) == {"benchmark", "command", "date", "commit", "machine", "versions", "results"}
    assert record["benchmark"] == name
    assert record["machine"]["cores"] == os.cpu_count()
    assert record["versions"]["torch"]
    numbers = list(leaves(record["results"]))
    assert numbers
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert "|" in done.stdout  # the table
    assert "Record:" in done.stdout


@pytest.mark.slow
def test_the_signals_of_other_networks_stay_on_record(tmp_path: Path) -> None:
    for name in ("nin", "googlenet"):
        flags = [*SMALL.split(), "--networks", name, "--seconds", "0", "--out", str(tmp_path)]
        command = [sys.executable, "-m", "benchmarks.collapse", *flags]
        done = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    signals = json.loads((tmp_path / "collapse-cpu.json").read_text(encoding="utf-8"))["results"]["signal"]
    assert [signal["network"] for signal in signals] == 4 * ["nin"] + 4 * ["googlenet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("throughput --networks lenett", "there is no recipe 'lenett'"),
        ("speedrun --entry 94 best/vgg61", "did you mean best/vgg16?"),
        ("speedrun --entry x lenet", "--entry takes a test accuracy in percent"),
    ],
)
def test_a_mistake_is_one_line(mistake: str, message: str, tmp_path: Path) -> None:
    name, *arguments = mistake.split()
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=PROJECT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"benchmarks.{name}: error: ") and message in line


@pytest.mark.slow
@pytest.mark.long
def test_suite_goes_on_after_a_failure_and_names_it(tmp_path):
    command = [sys.executable, "-m", "benchmarks.suite", "--only", "data_path", "memory", "--seconds", "0"]
    no_folder = tmp_path / "file"
    no_folder.touch()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, "--data_dir", str(no_folder), "--out", str(tmp_path)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 1, done
    codes = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in done.stdout.splitlines()[-2:]}
    assert codes == {"data_path": "1", "memory": "0"}
    assert (tmp_path / "memory-cpu.json").exists()

    again = [*command[:3], "--only", "memory", "data_path", "--results", "--seconds"]
    for seconds, first in (("1e-9", "no time left"), ("0.5", "has a record")):
        done = subprocess.run(
            [*again, seconds, "--data_dir", str(no_folder), "--out", str(tmp_path)],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in done.stdout.splitlines()[-3:]]
        assert rows[0] == ["memory", "", first], done
        assert rows[1][0] == "data_path" and rows[2][:2] == ["results", ""]
        assert (rows[1][1], done.returncode) == (("", 0) if seconds == "1e-9" else ("1", 1))


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float):
        yield value


# ---- `python -m benchmarks.results`, and that every number in the READMEs' tables comes from a record or a network.

READMES = [REPO / "README.md", REPO / "README.zh-CN.md"]
ONE_TABLE = [*READMES, SPEEDRUN]
PAGES = [*ONE_TABLE, REPO / "docs/results.md", REPO / "docs/zh-CN/results.md"]
ENGLISH = Language(0, " to ")


@pytest.fixture(scope="module")
def results() -> Results:
    return read_results(RESULTS)


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]


def test_tables_and_plot_are_what_the_records_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_no_table_with_numbers_was_written_by_hand(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = set(re.findall(r"<!-- (results|throughput|measured) ", text))
    assert found == ({"results"} if page in ONE_TABLE else {"results", "throughput", "measured"})
    outside = re.sub(r"<!-- (results|throughput|measured|recipes) .*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    by_hand = [line for line in outside.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert not by_hand, "these numbers must come from records: give them a line in benchmarks/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_any_digit_that_is_changed_is_noticed(page: Path, tmp_path: Path, results: Results) -> None:
    text = page.read_text(encoding="utf-8")
    copy = tmp_path / page.parent.name / page.name  # by which the language is told
    copy.parent.mkdir()
    regions = list(re.finditer(r"<!-- (results|throughput|measured) [\w-]+ -->\n(.*?)<!-- /", text, re.DOTALL))
    assert len(regions) == (1 if page in ONE_TABLE else 9)
    for place in (0, 0.5, 1):  # the first digit of every table, one in the middle, the last
        wrong = text
        for region in regions:
            digits = [region.start(2) + digit.start() for digit in re.finditer(r"\d", region[2])]
            position = digits[int(place * (len(digits) - 1))]
            wrong = wrong[:position] + str((int(text[position]) + 1) % 10) + wrong[position + 1 :]
        copy.write_text(wrong, encoding="utf-8")
        assert written(copy, results, RESULTS) == text


def test_scores_are_those_of_the_records(results: Results) -> None:
    """Calculated anew, by other means than the tables are."""
    cells = {row[0] + row[1]: row for family in ("reproduction", "fast") for row in rows(table(family, results))}
    checked = 0
    for (entry, device), runs in results.runs.items():
        if entry.family not in ("reproduction", "fast"):
            continue
        shares = [round(run.record["test"]["accuracy"], 4) for run in runs]  # of 10,000 images
        row = cells[f"`{entry.recipe}`{entry.network[0]}"]
        mean, *spread = map(float, re.findall(r"\.\d{4}", row[7]))
        assert 0 <= statistics.mean(shares) - mean < 1e-4 + 1e-12
        assert len(spread) == (3 if len(shares) > 1 else 0)
        if spread:
            assert -1e-12 <= spread[0] - statistics.stdev(shares) < 1e-4
            assert spread[1:] == [min(shares), max(shares)]
        assert row[8] == f"{len(runs)} ({sum(share < 0.15 for share in shares)})"
        if device == "cpu" and (time := re.match(r"(\d+) s, ", row[9])):
            seconds = statistics.mean(run.record["fit_seconds"] for run in runs)
            assert 0 <= float(time[1]) - seconds < 1
        checked += 1
    assert checked >= 3


def test_changes_are_those_of_the_records(results: Results) -> None:
    header, _, *lines = rows(table("ablation", results))
    names = {"small/lenet": "LeNet", "small/alexnet": "AlexNet", "small/vgg11": "VGG-11"}
    names |= {"small/nin": "NiN", "small/googlenet": "GoogLeNet"}
    entries = {entry: every for (entry, _), every in results.runs.items() if entry.family == "ablation"}
    assert len(entries) == sum(cell != "" for line in lines for cell in line[1:]) == 36
    for entry in entries:
        (line,) = (line for line in lines if line[0] == entry.network[0])
        cell = line[header.index(names[entry.recipe])]
        own = {other.suffix: every for other, every in entries.items() if other.recipe == entry.recipe}
        right = {key: [round(10_000 * run.accuracy) for run in every] for key, every in own.items()}
        means = {key: Fraction(sum(counts), 10_000 * len(counts)) for key, counts in right.items()}
        assert 0 <= means[entry.suffix] - Fraction(cell.split()[0]) < Fraction(1, 10_000)
        if entry.suffix:
            points = 100 * (means[entry.suffix] - means[""])
            assert 0 <= abs(points) - Fraction(re.findall(r"[+−](\d+\.\d)", cell)[0]) < Fraction(1, 10)
            assert ("−" in cell) == (points <= 0)


def test_changes_of_a_network_without_a_record_as_it_is_are_left_out(results: Results) -> None:
    some = {key: runs for key, runs in results.runs.items() if key[0].name == "small-vgg11-sigmoid"}
    plain = {key: runs for key, runs in results.runs.items() if key[0].name == "small-lenet"}
    assert len(some) == len(plain) == 1
    assert rows(table("ablation", Results(results.entries, some))) == [["changed"], ["---"]]
    assert rows(table("ablation", Results(results.entries, some | plain)))[0] == ["changed", "LeNet"]
    assert rows(table("ablation_lenet", results))[0] == ["changed", "LeNet"]
    with pytest.raises(UserError, match="no network 'resnet'"):
        table("ablation_resnet", results)


def test_larger_kernels_see_as_much_and_a_block_without_1x1_keeps_its_size() -> None:
    net: Any = large_kernels("vgg11", 32)
    own = NETWORKS["vgg11"](image_size=32)
    fields = [receptive_fields(one, (1, 32, 32)) for one in (net, own)]
    last = [[field for name, field in every.items() if name.startswith("features")][-1] for every in fields]
    assert last[0] == last[1]
    assert [layer.kernel_size[0] for layer in net.features if isinstance(layer, nn.Conv2d)] == [3, 3, 5, 5, 5]
    net = without_1x1("nin", 67)
    assert [layer.kernel_size[0] for layer in net.modules() if isinstance(layer, nn.Conv2d)] == [11, 5, 3, 3]
    assert net(torch.zeros(2, 1, 67, 67)).shape == (2, 10)


def test_one_part_alone_is_changed() -> None:
    sizes: dict[Any, int] = {"lenet": 28, "alexnet": 67, "vgg11": 32, "nin": 67, "googlenet": 32}
    idle: list[bool] = []  # whether an average of the network as it is leaves the maps as they are
    for name, size in sizes.items():
        own = NETWORKS[name](image_size=size)
        for layer in own.modules():
            if isinstance(layer, nn.AdaptiveAvgPool2d):
                layer.register_forward_hook(lambda _layer, maps, mean: idle.append(torch.equal(maps[0], mean)))
        own(torch.rand(2, 1, size, size))
        assert sum(weight.numel() for weight in own.parameters()) == Entry("ablation", f"small/{name}").size[0]
        net = sigmoid(name, size)
        kinds, own_kinds = ([type(module) for module in one.modules()] for one in (net, own))
        assert kinds.count(nn.ReLU) == (name == "nin")
        assert [nn.ReLU if kind is nn.Sigmoid else kind for kind in kinds] == own_kinds
        other = hidden(name, size) if name in ("nin", "googlenet") else averaged(name, size)
        assert other(torch.zeros(2, 1, size, size)).shape == (2, 10)
        linear = [sum(isinstance(module, nn.Linear) for module in one.modules()) for one in (own, other)]
        assert linear == {"nin": [0, 2], "googlenet": [1, 2], "lenet": [3, 1], "alexnet": [2, 1], "vgg11": [3, 1]}[name]
    assert idle == [True, True]  # NiN's and GoogLeNet's, as docs/results.md says


def table(family: str, results: Results) -> str:
    return results_table(family, results, ENGLISH)


@pytest.mark.parametrize("place", ["cpu", "amx-cpu"])
def test_ratios_are_those_of_the_turns(place: str) -> None:
    record = json.loads((RESULTS / f"throughput-{place}.json").read_text(encoding="utf-8"))
    text = PAGES[3].read_text(encoding="utf-8").partition(f"<!-- throughput {place} -->")[2].partition("<!-- /")[0]
    header, _, *lines = rows(text)
    column = header.index("times the tutorial's loop")
    for network, row in zip(record["results"], lines, strict=True):
        turns = {one["contestant"]: [turn["rate"] for turn in one["turns"]] for one in network["contestants"]}
        ours = float(row[1].replace(",", ""))
        assert 0 <= statistics.median(turns["ours"]) - ours < (1 if ours >= 10 else 0.1)
        (tutorial,) = (one for one in network["contestants"] if one["contestant"] == "tutorial")
        first = tutorial.get("first_round_of_ours", 0)  # where not all fitted into the memory at once
        mine = turns["ours"][first : first + len(tutorial["turns"])]
        ratios = [one / other for one, other in zip(mine, turns["tutorial"], strict=True)]
        written_ratios = map(float, re.findall(r"\d+\.\d+", row[column]))
        for exact, shown in zip((statistics.median(ratios), min(ratios), max(ratios)), written_ratios, strict=True):
            assert 0 <= exact - shown < 0.01 + 1e-9


def test_records_are_complete(results: Results) -> None:
    for runs in results.runs.values():
        for run in runs:
            record = run.record
            assert re.fullmatch(r"[0-9a-f]{64}", record["config_sha256"])
            assert re.match(r"[0-9a-f]{40}", record["commit"])
            assert {"python", "torch", "lightning"} <= record["versions"].keys()
            assert {"platform", "cpu", "cores"} <= record["machine"].keys()
            assert min(record["fit_seconds"], record["images_per_second"], record["peak_memory_bytes"]) > 0
            assert [epoch["epoch"] for epoch in record["epochs"]] == list(range(1, record["max_epochs"] + 1))
            assert all({"train/loss", "train/accuracy", "seconds"} <= epoch.keys() for epoch in record["epochs"])
            assert {"accuracy", "loss", "class_accuracy"} <= record["test"].keys()
            assert record["test"]["images"] == 10_000
    for (entry, _), runs in results.runs.items():
        assert {run.record["train_images"] for run in runs} == {entry.images}
        assert {(run.record["parameters"], run.record["flops"]) for run in runs} == {entry.size}


def test_every_record_belongs_to_a_recipe_as_it_is_now(results: Results) -> None:
    assert not results.stale, (
        "trained with other settings than their recipes have now: train them again, or remove them"
    )


@pytest.mark.parametrize(
    ("value", "digits", "below", "above"),
    [
        (1.999, 2, "1.99", "2.00"),
        (0.29, 2, "0.29", "0.29"),  # 0.29 * 100 is less than 29
        (23_914.007, 0, "23,914", "23,915"),
        (Fraction(2, 3), 4, "0.6666", "0.6667"),
        (0.00001, 3, "0.000", "0.001"),
    ],
)
def test_rounding(value: Any, digits: int, below: str, above: str) -> None:
    assert (down(value, digits), up(value, digits)) == (below, above)


def test_scores_are_never_rounded_up() -> None:
    shares = [Fraction(9_135, 10_000), Fraction(9_071, 10_000), Fraction(9_092, 10_000)]
    assert mean_and_range(shares) == ".9099 ± .0033 (.9071 to .9135)"  # .90993; .003262
    assert mean_and_range(shares[:1]) == ".9135"
    assert [duration(seconds) for seconds in (9.91, 16.2, 100, 6000, 7300)] == [
        "10.0 s",
        "17 s",
        "2 min",
        "1.7 h",
        "2.1 h",
    ]


def test_the_speedruns_board_has_the_shortest_first_and_leaves_out_what_ran_beside_others(results: Results) -> None:
    whole = rows(table("speedrun", results))[2:]
    order = [(row[5], float(row[2].replace(",", ""))) for row in whole]  # times on different machines are not compared
    assert order == sorted(order) and len(order) >= 4
    (entry, device), runs = next(item for item in results.runs.items() if item[0][0].name == "fast-1min")
    beside = [Run(run.folder, run.record | {"background": True}) for run in runs[1:]]
    some = Results(results.entries, {(entry, device): [runs[0], *beside]})
    (row,) = rows(table("speedrun", some))[2:]
    assert 0 <= float(row[2]) - runs[0].record["fit_seconds"] < 0.1
    assert row[4] == "1 of 5"
    assert rows(table("speedrun", Results(results.entries, {(entry, device): beside})))[2:] == []


def test_a_collapsed_run_and_a_gpu_are_told(results: Results) -> None:
    (entry, _), runs = next(item for item in results.runs.items() if item[0][0].name == "fast-1min")
    broken = json.loads(json.dumps(runs[0].record))
    broken["test"]["accuracy"] = 0.1
    broken["machine"]["gpu"] = "NVIDIA X100"
    broken["fit_seconds"] = 600.0
    flipped = Entry("best", "best/lenet", ("--val_size", "0"), "-all")
    broken["test"]["accuracy_flip"] = 0.2
    made = Results([entry, flipped, Entry("best", "best/lenet")])
    made.runs = {(entry, "gpu"): [*runs[:2], Run(Path(), broken)], (flipped, "gpu"): [Run(Path(), broken)]}
    row = rows(results_table(entry.family, made, ENGLISH))[2]
    assert row[-2] == "3 (1)"
    assert "X100" in row[-1]
    assert rows(results_table("best", made, ENGLISH))[2][-5:] == ["", ".1000", ".2000", "1 (1)", "10 min, X100"]


def test_the_time_of_what_was_trained_beside_other_work_is_estimated_or_bounded(results: Results) -> None:
    (entry, device), runs = next(item for item in results.runs.items() if item[0][0].name == "alexnet-all")
    record = json.loads((RESULTS / f"throughput-{device}.json").read_text(encoding="utf-8"))
    (network,) = (one for one in record["results"] if one["network"] == "alexnet")
    rate = next(one["images_per_second"] for one in network["contestants"] if one["contestant"] == "ours")
    beside = [Run(run.folder, run.record | {"background": True}) for run in runs]
    row = rows(table("reproduction", Results([entry], {(entry, device): beside}, folder=RESULTS)))[2]
    assert row[-1] == f"≈ {duration(3 * 60_000 / rate)}, H200"  # the machine that the rate was measured on
    bound = f"≤ {duration(max(run.record['fit_seconds'] for run in runs))}, H200 / H100"
    config = beside[0].record["config"]
    net = {**config["model"]["net"], "init_args": {**config["model"]["net"]["init_args"], "hidden_layers": 2}}
    for other in (
        {"batch_size": 256},
        {"precision": "32-true"},
        {"config": config | {"model": config["model"] | {"net": net}}},
    ):
        changed = {(entry, device): [Run(run.folder, run.record | other) for run in beside]}
        assert rows(table("reproduction", Results([entry], changed, folder=RESULTS)))[2][-1] == bound


def test_one_seed_of_each_comes_first_and_the_cheapest_before() -> None:
    jobs = _jobs(read_entries(wanted=["nin", "lenet*"]), Namespace(flags=(), ours=True, seeds=2))
    names = [(job.seed, job.entry.name) for job in jobs]
    assert names == sorted(names, key=lambda name: name[0])
    first = [name for seed, name in names if seed == 0]
    assert set(first[-3:]) == {"nin-all", "nin-all-float32", "nin-all-tutorial"}
    assert {"lenet", "lenet_classic", "lenet_classic-all-max", "lenet_classic-all-average"} == set(first[:-3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "lenett"], "no entry of entries.yaml is called 'lenett'"),
        (["--families", "bset"], "there is no family 'bset'; there are reproduction, best"),
        (["--recipes", "lenet", "--families", "best"], "none of these recipes"),
        (["--hours", "0"], "--hours must be above 0"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--tables", "--max_epochs", "1"], "--max_epochs is unknown, or a flag of train.py"),
        (["--recipes", "lenet", "--max_epochs", "1"], "changes trainer.max_epochs of lenet; name a folder with --out"),
        (
            ["--recipes", "fast/30s", "--precision", "32"],
            "changes trainer.precision of fast/30s; name a folder with --out",
        ),
        (["--recipes", "lenet", "--no_such_flag", "1"], "unknown flag --no_such_flag"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("benchmarks.results: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_what_needs_bfloat16_is_not_trained_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    out = ["--out", str(tmp_path), "--log_dir", str(tmp_path / "logs")]
    assert main(["--recipes", "fast/30s", "--seeds", "1", *out]) == 1
    assert "fast-30s, seed 0 needs bfloat16, which this device lacks" in capfd.readouterr().err
    assert find_runs([tmp_path / "logs"]) == []
    flags = ("--precision", "bf16-mixed")
    for asked_for in ((), flags):
        options = Namespace(flags=asked_for, seeds=1, ours=False, accelerator="cpu")
        for job in _jobs(read_entries(wanted=["alexnet"]), options):
            in_float32 = "32-true" in job.entry.flags
            assert _lacks_bfloat16(job, options) == (not asked_for and not in_float32)


def test_the_band_of_a_row() -> None:
    wide = 9.92484  # deviations at 99 % with 2 degrees of freedom, by a table of Student's t
    half = wide * math.sqrt((2 * 0.01**2 + 0.001**2) / 2 * 1.5)
    assert band([0.70, 0.72], usual=0.001) == pytest.approx((0.71 - half, 0.71 + half), abs=1e-5)
    half = wide * math.sqrt(0.002**2 / 2 * 1.5)
    assert band([0.90, 0.90], usual=0.002) == pytest.approx((0.9 - half, 0.9 + half), abs=1e-5)
    assert band([0.999], usual=0.002)[1] == 1  # one seed: the usual deviation, and no accuracy is above 1
    assert usual_deviation([[0.9], [0.9, 0.92], [0.8, 0.8]]) == pytest.approx(0.01 / math.sqrt(2))


def test_each_recorded_run_lies_in_the_band_of_the_others(results: Results) -> None:
    outside = checked = 0
    for (entry, _), runs in results.runs.items():
        row, usual = [run.accuracy for run in runs], usual_deviation(kin(entry, results))
        for place, accuracy in enumerate(row):
            if others := [*row[:place], *row[place + 1 :]]:
                low, high = band(others, usual)
                outside += not low <= accuracy <= high
                checked += 1
    assert checked > 200
    assert outside <= 0.02 * checked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the recipes to verify, or give --all"),
        (["lenet", "--all"], "name the recipes to verify, or give --all"),
        (["lenett"], "no entry of entries.yaml is called 'lenett'"),
        (["vgg19"], "there are no records of vgg19 on a cpu"),
        (["lenet", "--minutes", "0"], "--minutes must be above 0"),
        (["lenet", "--minutes", "0.001"], "nothing fits in the time"),
        (["--all", "--minutes", "0.001"], "nothing fits in the time"),
        (["lenet", "--seed", "x"], "invalid int value"),
        (["lenet", "--bogus", "1"], "unknown flag --bogus"),
    ],
)
def test_mistakes_in_verify_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["fast/30min"], ["fast-30min"]),  # not those with flags
        (["fast/30min-all-36", "fast-30min-all-20"], ["fast-30min-all-20", "fast-30min-all-36"]),
        (["fast/30min", "fast-30min"], ["fast-30min"]),
        (["fast/30*"], ["fast-30s", "fast-30s-all-5", "fast-30min-all-20", "fast-30min-all-36", "fast-30min"]),
        (["vgg11_small"], ["vgg11_small-all"]),
    ],
)
def test_rows_are_verified_by_name(names: list[str], rows: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*names, "--minutes", "0.001"]) == 2
    assert sorted(re.findall("(.+): left out", capsys.readouterr().out)) == sorted(rows)


@pytest.mark.slow
@pytest.mark.long
def test_a_row_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    if (folder := whole_set()) is None:
        pytest.skip("needs the whole data set")
    flags = ["--data_dir", str(folder), "--seed", "0"]
    assert verify.main(["lenet", *flags, "--max_epochs", "1"]) == 1  # which is not what the row says
    out = capsys.readouterr().out
    assert out.endswith("FAIL\n")
    assert f"torch {version('torch')}" in out
    assert verify.main(["fast-1min-epoch", *flags]) == 0
    assert capsys.readouterr().out.endswith("PASS\n")


def test_a_region_without_an_end_is_one_line(tmp_path: Path, results: Results) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- results best -->\nno end\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"^.*has no end.*$"):
        written(page, results, RESULTS)


def test_the_plot_knows_what_it_shows(tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *given, **named: drawn.append((self, save(self, *given, **named)))
    )
    found = accuracy_time.points(results)
    assert len({(point.name, point.device) for point in found}) == len(found) >= 3
    accuracy_time.draw(found, tmp_path / "plot.png")
    (axes,) = drawn[0][0].axes
    places = axes.transData.transform([(point.seconds[0], 1 - point.accuracy[0]) for point in found])
    assert not axes.get_legend().get_window_extent().count_contains(places)  # the legend hides no point
    assert accuracy_time.is_current(found, tmp_path / "plot.png")
    assert not accuracy_time.is_current(found[1:], tmp_path / "plot.png")
    assert not accuracy_time.is_current(found, tmp_path / "none.png")


# Stands for a scheduler, at a moment that no machine's speed decides.
STOP = """
import os, signal
from lightning.pytorch.callbacks import Callback

class StopAtBatch(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 5:
            os.kill(os.getpid(), signal.SIGTERM)
"""


SAMPLE = ["--recipes", "lenet", "--seeds", "1", "--out", "out", "--log_dir", "logs", "--data_dir", str(DATA)]
SAMPLE += ["--val_size", "200", "--max_epochs", "2", "--trainer.callbacks+=stop.StopAtBatch"]


@pytest.mark.slow
@pytest.mark.long
def test_what_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ours = [*pages(), *(RESULTS / "runs").iterdir(), accuracy_time.PICTURE]
    before = {path: path.stat().st_mtime for path in ours}
    (tmp_path / "stop.py").write_text(STOP, encoding="utf-8")

    assert main([*SAMPLE, "--hours", "0.0001"]) == 0  # less than any import takes
    assert capfd.readouterr().out.endswith("Time is up; the same command continues from here.\n")
    assert find_runs([tmp_path / "logs"]) == []

    assert main(SAMPLE) == 143
    (run,) = find_runs([tmp_path / "logs"])
    assert run.record["epochs"] == []  # found again although it ended no epoch
    assert not (tmp_path / "out/runs").exists()
    assert main([*SAMPLE, "--list"]) == 0
    assert re.search(r"lenet +\| 0 +\| stopped", capfd.readouterr().out)

    (tmp_path / "stop.py").write_text(STOP.replace("== 5", "== -1"), encoding="utf-8")
    assert main(SAMPLE) == 0
    assert "lenet, seed 0: going on" in capfd.readouterr().out
    record = json.loads((tmp_path / "out/runs/lenet-seed0-cpu.json").read_text(encoding="utf-8"))
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2]
    assert record["epochs"][0]["elapsed_seconds"] > run.record["stopped_after_seconds"] + record["epochs"][0]["seconds"]
    assert (tmp_path / "out/accuracy-time.png").is_file()
    assert main(SAMPLE) == 0
    assert "seed 0:" not in capfd.readouterr().out
    assert before == {path: path.stat().st_mtime for path in before}

    (tmp_path / "stop.py").write_text(STOP, encoding="utf-8")
    beside = [sys.executable, "-m", "benchmarks.results", *SAMPLE, "--seeds", "2", "--background"]
    environment = os.environ | {"PYTHONPATH": f"{PROJECT}{os.pathsep}{tmp_path}"}
    assert subprocess.run(beside, env=environment, timeout=200).returncode == 143
    (tmp_path / "stop.py").write_text(STOP.replace("== 5", "== -1"), encoding="utf-8")
    assert main([*SAMPLE, "--seeds", "2"]) == 0
    assert "lenet, seed 1: going on" in capfd.readouterr().out
    records = [tmp_path / f"out/runs/lenet-seed{seed}-cpu.json" for seed in range(2)]
    assert ["background" in json.loads(path.read_text(encoding="utf-8")) for path in records] == [False, True]
