"""Each benchmark runs end to end in a tiny setting and writes a record; what they calculate is checked by hand."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness.side_by_side import Contestant, Missing, contest, median, ratios
from benchmarks.memory import LiveBytes, training_bytes
from benchmarks.peers.airbench import augmented, triangle
from benchmarks.precision import compared, pooled_deviation
from benchmarks.scaling import all_reduce_seconds
from benchmarks.throughput import PROCESS_BYTES, _groups, training_flops

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


def test_a_contestant_that_can_not_take_part_is_named(tmp_path):
    absent = "from benchmarks.harness.side_by_side import Turns; Turns().missing('it is not installed')"

    turns, missing = contest(
        {"A": lambda: contestant("A", tmp_path / "log"), "B": lambda: Contestant(["-c", absent])}, 0, 0.01
    )

    assert list(turns) == ["A"]
    assert missing == {"B": "it is not installed"}


def test_a_contestant_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="has ended early"):
        Contestant(["-c", "raise SystemExit(1)"])
    with pytest.raises(Missing, match="why"):
        Contestant(["-c", "from benchmarks.harness.side_by_side import Turns; Turns().missing('why')"])


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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert _groups(peers, 0, "cpu") == [peers]
    assert _groups(peers, memory, "cpu") == [["tutorial"], ["references"], ["d2l"]]
    assert _groups(peers, int(0.8 * memory / 3) - PROCESS_BYTES, "cpu") == [["tutorial", "references"], ["d2l"]]
    assert _groups(peers, memory, "cuda") == [peers]


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
    "startup": f"{SMALL} --seconds 0",
    "speedrun": f"{SMALL} --seeds 1 --entry 10 lenet --flags=--max_epochs=1 --peer --peer_flags=--epochs=1",
    "memory": f"{SMALL} --networks lenet --batch_size 8 --precision 32 --measure",
    "precision": f"{SMALL} --networks lenet --seeds 1 --flags=--max_epochs=1",
    "collapse": f"{SMALL} --seeds 1 --networks nin --batches 2 --rounds 1 --val_size 200",
    "scaling": f"{SMALL} --devices 1 --steps 2 --seconds 0",
}


@pytest.mark.slow
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


def leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, int | float):
        yield value
