"""Records of runs: comparing them, and sweeps."""

import base64
import copy
import csv
import errno
import gzip
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from commands import DATA, ENVIRONMENT, REPO, Answer, read_only_folder, run_forked
from conftest import Run
from PIL import Image

import compare
import sweep
from benchmarks.harness.side_by_side import RESULTS
from checkpoints.trust import NAMEABLE, Trusted
from cli.command import parse_command_line
from cli.recipes import resolved
from datamodules import CLASS_NAMES, PicturesDataModule
from errors import UserError
from models import AlexNet
from runs import report, training
from runs import sweeps as sweeping
from runs.differences import Difference, critical, difference, differences, mcnemar, seeds_needed, two_sided
from runs.groups import Group, fold, wilson
from runs.names import class_defaults, name_all, recipe_settings
from runs.plots import _class_accuracy, _scatter, draw, draw_trials
from runs.reading import Run as Record
from runs.reading import find_runs, matches
from runs.record import SCHEMA, commit, machine, pack_right, unpack_right, write_json
from runs.search_space import Choice, Range, add_setting, checked_space, every_combination
from runs.settings import SETTINGS, is_kept, leaves, shaping
from runs.sweep_recipe import _selected, check_output, write_recipe

# ---- compare.py on real records, and on runs that it trains itself.

TRAIN = ("--train", "lenet", "--max_epochs", "2", f"--data_dir={DATA}", "--val_size", "200", "--accelerator", "cpu")


def compare_py(*arguments: str, folder: Path, timeout: float = 200) -> Answer:
    command = [sys.executable, str(REPO / "compare.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def logs(trained: Run, tmp_path: Path) -> Path:
    """Records of lenet with seeds 0 to 2, of lenet with another learning rate, and of a recipe of the user's own."""
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, accuracy in enumerate((0.80, 0.82, 0.87)):
        write(tmp_path / f"lenet/version_{seed}", record, seed=seed, accuracy=accuracy)
    other = copy.deepcopy(record)
    other["config"]["model"]["optimizer"]["init_args"]["lr"] = 0.5
    write(tmp_path / "lenet/version_3", other, accuracy=0.1)
    write(tmp_path / "mine/version_0", record | {"recipe": "mine", "flops": 1_525_000_000}, accuracy=0.85)
    return tmp_path


def write(folder: Path, record: dict[str, Any], seed: int = 0, accuracy: float | None = None) -> None:
    record = copy.deepcopy(record) | {"seed": seed}
    record["config"]["seed_everything"] = seed
    if accuracy is None:
        del record["test"]
    else:
        record["test"]["accuracy"] = accuracy
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def test_different_data_are_never_in_one_table(
    logs: Path, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    photos = changed(record, data__folder="photos")
    write(logs / "photos", photos, accuracy=0.99)
    write(logs / "split", changed(photos, data__split_seed=1), accuracy=0.98)  # of an older version
    others = changed(photos)
    others["test"]["test_pictures"] = "0a1b2c3d"  # other pictures of the same folder
    write(logs / "others", others, accuracy=0.97)
    record["test"] |= {"images": 10_000, "test_set": 10_000, "right": pack_right([True] * 10_000)}
    write(logs / "whole", record, accuracy=0.95)
    assert compare.main([str(logs), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    titles = ["Fashion-MNIST, 500 test images", "photos, 500 test images", "Fashion-MNIST, 10,000 test images"]
    titles += ["photos, 500 test images (0a1b2c3d)", "photos, 500 test images (split 1)"]
    for number, title in enumerate(sorted(titles, key=lambda title: out.index(f"{title}:")), 1):
        assert f"{title}:" in out
        text = (tmp_path / f"out/data_{number}/report.md").read_text(encoding="utf-8")
        assert text.startswith(f"# Comparison: {title}\n")
        assert text.count(", seed ") == (5 if title == titles[0] else 1)


@pytest.mark.parametrize("recipe", ["lenet", "mine"])
@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("data__val_size", 0, "val_size 0"),
        ("model__output_bias", 0.0, "output_bias 0"),
        ("trainer__limit_val_batches", 0, "limit_val_batches 0"),
        ("trainer__enable_checkpointing", False, "no enable_checkpointing"),
        ("trainer__sync_batchnorm", True, "sync_batchnorm"),
        ("trainer__min_epochs", 2, "min_epochs 2"),
        ("trainer__min_steps", 2, "min_steps 2"),
    ],
)
def test_what_is_off_is_told_from_a_zero_that_means_something(
    setting: str, value: Any, said: str, recipe: str, trained: Run, tmp_path: Path
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8")) | {"recipe": recipe}
    own_pictures: dict[str, Any] = {"data__folder": "photos", "data__val_size": None}
    write(tmp_path / "without", changed(record, **own_pictures), accuracy=0.8)
    write(tmp_path / "with", changed(record, **own_pictures | {setting: value}), accuracy=0.9)
    first, second = find_runs([tmp_path])
    assert [[matches(one, other.settings) for other in (first, second)] for one in (first, second)] == [
        [True, False],
        [False, True],
    ]
    assert [group.name for group in fold([first, second])] == [f"{recipe} ({said})", recipe]


def test_a_run_on_own_pictures_is_taken_for_what_was_asked_for(tmp_path: Path) -> None:
    """What the user leaves to the pictures may be anything."""
    pictures = [f"--data={DATA / 'photos'}", "--max_epochs=1", "--accelerator=cpu", "--precision=32"]
    answer = run_forked("--model=lenet", *pictures, folder=tmp_path)
    assert answer.code == 0, answer.err

    def found(*flags: str) -> int:
        request = training.Request(log_dir=tmp_path / "logs", flags=[*pictures, *flags])
        return len(training.runs_of(request, "lenet", shaping(resolved("lenet", request.flags))))

    assert [found(), found("--val_size=0"), found("--data.channels", "1")] == [1, 0, 0]
    (colour,) = find_runs([tmp_path])
    shutil.copytree(colour.folder, tmp_path / "elsewhere/mine/version_0")
    recipe = tmp_path / "mine.yaml"
    for channels in (3, 1, None):  # in a recipe of the user's own
        recipe.write_text(json.dumps({"model": {"net": "mine.Net"}, "data": {"channels": channels}}))
        request = training.Request(log_dir=tmp_path / "elsewhere", flags=pictures)
        runs = training.runs_of(request, str(recipe), colour.settings | {"data.channels": channels})
        assert len(runs) == (channels != 1)
    shutil.rmtree(tmp_path / "elsewhere")
    grey = changed(colour.record, data__channels=1, data__val_size=colour.record["config"]["data"]["val_size"])
    grey["config"]["model"]["net"]["init_args"]["in_channels"] = 1
    write(tmp_path / "logs/lenet/version_1", grey, accuracy=0.1)
    assert found("--data.channels", "1") == 1
    assert sorted(group.name for group in fold(find_runs([tmp_path]))) == ["lenet", "lenet (channels 3)"]


@pytest.mark.parametrize(
    ("accuracy", "images", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.9, 10_000, 0.8940, 0.9057)],
)
def test_wilson_interval(accuracy: float, images: int, low: float, high: float) -> None:
    assert wilson(accuracy, images) == pytest.approx((low, high), abs=5e-5)


def test_seeds_are_folded_and_other_settings_are_not(logs: Path) -> None:
    groups = fold(find_runs([logs]))
    assert [group.name for group in groups] == ["mine", "lenet", "lenet (lr 0.5)"]
    lenet = groups[1]
    assert [run.seed for run in lenet.runs] == [0, 1, 2]
    assert lenet.accuracy == pytest.approx(0.83)
    assert lenet.deviation == pytest.approx(statistics.stdev((0.80, 0.82, 0.87)))
    assert lenet.interval == pytest.approx(wilson(0.83, 500))
    assert groups[0].deviation is None


def test_runs_without_a_seed_all_count(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, accuracy in ((None, 0.80), (False, 0.82), (3, 0.84), (None, 0.86)):  # False: as older records say it
        write(tmp_path / str(accuracy), record, seed=seed, accuracy=accuracy)  # type: ignore[arg-type]
    assert compare.main([str(tmp_path)]) == 0
    assert re.search(r"lenet\*  +4  +0.8300 ", capsys.readouterr().out)


def changed(record: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The record of a run with other settings than the recipe's: their dotted names, with __ for the dots."""
    record = copy.deepcopy(record)
    record["config"]["data"] |= {"batch_size": 128, "val_size": 5000}
    for name, value in settings.items():
        *path, last = name.split("__")
        inside = record["config"]
        for key in path:
            inside = inside[key]
        inside[last] = value
    return record


def test_runs_are_named_by_what_was_changed_in_their_recipe(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}}
    runs = {
        "lenet": changed(record),
        "lenet (batch_size 64, crop_padding 2)": changed(record, data__batch_size=64, data__crop_padding=2),
        "lenet (SGD, lr 0.1)": changed(record, model__optimizer=sgd),
        "lenet (no scheduler)": changed(record, model__scheduler=None),
        "lenet (pooling average)": changed(record, model__net__init_args__pooling="average"),
        "lenet (callbacks EMA, horizontal_flip)": changed(
            record, data__horizontal_flip=True, trainer__callbacks=[{"class_path": "callbacks.ema.EMA"}]
        ),
        "lenet (val_size 0)": changed(record, data__val_size=0),
        "lenet (precision bf16-mixed)": changed(record | {"precision": "bf16-mixed"}),
        **{
            f"mine (width {width})": changed(
                record | {"recipe": "mine"}, model__net={"class_path": "mine.Net", "init_args": {"width": width}}
            )
            for width in (8, 16)
        },
    }
    for number, one in enumerate(runs.values()):
        write(tmp_path / str(number), one, accuracy=0.8)
    groups = fold(find_runs([tmp_path]))
    assert {group.name for group in groups} == set(runs)
    assert groups[0].shared == ["max_epochs 3"]


def test_what_a_recipe_leaves_to_the_networks_own_default_is_named_where_it_differs() -> None:
    written = recipe_settings("alexnet")
    runs = [("alexnet", written | {"model.net.dropout": dropout}) for dropout in (0.5, 0.0, 0.2)]
    assert name_all(runs)[0] == ["alexnet", "alexnet (dropout 0)", "alexnet (dropout 0.2)"]
    assert class_defaults("models.alexnet.AlexNet")["dropout"] == AlexNet().classifier[3].p == 0.5
    assert class_defaults("torchvision.models.AlexNet") == class_defaults("models.mine.Mine") == {}


def test_a_network_that_can_not_be_read_has_no_known_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.names.__file__", str(tmp_path / "runs" / "names.py"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "half.py").write_text("class Half(", encoding="utf-8")
    assert class_defaults("models.half.Half") == {}


def test_where_a_run_lies_and_reads_its_data_does_not_part_it(logs: Path, trained: Run) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    record["config"]["data"] |= {"data_dir": "elsewhere", "num_workers": 3}
    record["config"]["log_dir"] = "there"
    write(logs / "moved", record, seed=3, accuracy=0.9)
    (group,) = (group for group in fold(find_runs([logs])) if group.name == "lenet")
    assert [run.seed for run in group.runs] == [0, 1, 2, 3]


def test_of_one_seed_the_newer_run_counts(logs: Path, trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    write(logs / "again", record, seed=0, accuracy=0.81)
    os.utime(logs / "again" / "record.json", (time.time() + 60,) * 2)
    groups = fold(find_runs([logs]))
    assert sorted(run.accuracy for group in groups for run in group.runs) == [0.1, 0.81, 0.82, 0.85, 0.87]
    assert compare.main([str(logs)]) == 0
    assert "1 older run of the same seed left out" in capsys.readouterr().out


def test_records_may_lie_anywhere_under_any_name(
    tmp_path: Path, trained: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    files = [tmp_path / f"lenet-seed{seed}.json" for seed in (0, 1, 2)]
    for seed, file in enumerate(files):
        file.write_text(json.dumps(record | {"seed": seed}), encoding="utf-8")
    assert compare.main([str(file) for file in files]) == 0
    assert re.search(r"lenet\*  +3 ", capsys.readouterr().out)  # three seeds


def test_unfinished_runs_are_left_out_and_counted(logs: Path, trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    del record["fit_seconds"]
    write(logs / "stopped", record, seed=9)
    assert compare.main([str(logs)]) == 0
    out = capsys.readouterr().out
    assert "1 unfinished run left out" in out
    assert "0.8300 ± 0.0361" in out


OWN_CLASSES = """
from models.lenet import LeNet
from torch.optim import SGD, Optimizer

class Net(LeNet):
    pass

def made(parameters) -> Optimizer:
    return SGD(parameters, lr=0.01)

print("read")
"""


def test_a_module_that_prints_when_it_is_imported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN_CLASSES, encoding="utf-8")
    with pytest.raises(UserError, match="a module of yours prints 'read' when it is imported"):
        resolved("lenet", ["--model.net=mine.Net"])


@pytest.mark.parametrize("own", [(), ("--model.net=mine.Net", "--model.optimizer=mine.made")])
def test_a_run_that_was_only_trained_is_said_with_the_command_that_tests_it(
    own: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(OWN_CLASSES, encoding="utf-8")
    flags = f"--model lenet --data {DATA / 'photos'} --max_epochs 1 --accelerator cpu --log_dir".split()
    assert run_forked("fit", *own, *flags, "my runs", folder=tmp_path).code == 0
    assert compare.main(["my runs"]) == 2
    error = capsys.readouterr().err
    assert ("--trust_checkpoint" in error) == bool(own)
    assert "no finished run in my runs; 1 run trained but not tested; to test it: python train.py" in error
    answer = run_forked(*shlex.split(error.partition("to test it: python train.py")[2]), folder=tmp_path)
    assert (answer.code, "epoch 1/" in answer.out) == (0, False), answer.err
    assert compare.main(["my runs"]) == 0
    out = capsys.readouterr().out
    assert "lenet" in out and "left out" not in out
    (run,) = find_runs([tmp_path])
    assert run.finished and run.tested > 0

    record = json.loads((run.folder / "record.json").read_text(encoding="utf-8"))
    write(tmp_path / "my runs" / "elsewhere", record)  # without its checkpoint
    assert compare.main(["my runs"]) == 0
    assert "left out: 1 run trained but not tested\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "classes",
    [
        {},
        {"model__net": {"class_path": "mine.Net"}},
        {"model__optimizer": {"class_path": "mine.Optimizer", "init_args": {"lr": 1.0}}},
        {"trainer__callbacks": [{"class_path": "callbacks.ema.EMA"}]},
        {"trainer__callbacks": [{"class_path": "callbacks.ema.EMA"}, {"class_path": "mine.Callback"}]},
        {"trainer__callbacks": [{"class_path": "callbacks.lr_curve.LearningRateCurve"}]},
    ],
)
def test_the_command_that_tests_a_run_vouches_for_classes_of_the_users(
    classes: dict[str, Any], trained: Run, tmp_path: Path
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    run = Record(tmp_path / "lenet" / "version_0", changed(record, **classes))
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "last.ckpt").touch()
    config, rules = run.record["config"], Trusted("a.ckpt", False, "", {}, lambda folder: None)
    try:
        rules._trainer({"callbacks": config["trainer"]["callbacks"]})
        needed = not all(rules.may_name(part, config["model"][part]) for part in NAMEABLE)
    except UserError:
        needed = True
    assert ("--trust_checkpoint" in run.test_command) == needed


def test_table_of_a_real_run(trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    assert compare.main([str(trained.folder)]) == 0
    header, _, line = capsys.readouterr().out.strip().splitlines()[:3]
    assert [name.strip() for name in header.split("  ") if name.strip()] == list(report.COLUMNS)
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    low, high = wilson(record["test"]["accuracy"], 500)
    seconds = statistics.median(epoch["seconds"] for epoch in record["epochs"])
    memory = record["peak_memory_bytes"]
    assert cells == [
        "1",
        "lenet*",  # 3 epochs are not the recipe's 8
        "1",
        f"{record['test']['accuracy']:.4f}",
        f"{low:.4f} to {high:.4f}",
        "61.71 k",
        "833 k",
        f"{record['images_per_second']:,.0f}",
        f"{seconds:.1f} s",
        f"{memory / 2**20:,.0f} MiB" if memory < 2**30 else f"{memory / 2**30:.1f} GiB",
        "3",
    ]


def test_record_holds_class_accuracies_of_the_test(trained: Run) -> None:
    test = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))["test"]
    assert list(test["class_accuracy"]) == list(CLASS_NAMES)
    labels = gzip.decompress((DATA / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]  # a byte each
    right = sum(share * labels.count(index) for index, share in enumerate(test["class_accuracy"].values()))
    assert right / 500 == pytest.approx(test["accuracy"])


def test_report(logs: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out" / "deep"
    assert compare.main([str(logs), "--output", str(folder)]) == 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| 2 | lenet\\* | 3 |")]
    assert len(table) == 1
    assert "0.8300 ± 0.0361" in table[0]
    for name in ("accuracy_time.png", "accuracy_flops.png", "curves.png", "class_accuracy.png"):
        assert f"]({name})" in text
        picture = Image.open(folder / name).convert("RGB")
        assert picture.width > 600
        assert len(picture.getcolors(1 << 24) or []) > 50, f"{name} is blank"
    with (folder / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["network"], row["seed"], float(row["test_accuracy"])) for row in rows] == [
        ("mine", "0", 0.85),
        ("lenet", "0", 0.80),
        ("lenet", "1", 0.82),
        ("lenet", "2", 0.87),
        ("lenet (lr 0.5)", "0", 0.1),
    ]
    assert float(rows[0]["flops"]) == 1_525_000_000
    assert 0 <= float(rows[1]["accuracy of Ankle boot"]) <= 1


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("matplotlib.figure", ["--output", "out"], "the plots need the package matplotlib"),
        ("rich.console", [], "the package rich.console is missing in"),
    ],
)
def test_missing_package_is_named_in_one_line(
    logs: Path,
    package: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(logs)
    assert compare.main([".", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("output", "message"), [("out", "the plots need the package"), ("file/out", "file is a file")])
def test_what_the_report_lacks_is_said_before_anything_is_trained(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    if output == "out":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert compare.main([*TRAIN, "--max_epochs", "1", "--output", output]) == 2
    out, err = capsys.readouterr()
    assert (out, message in err, err.count("\n")) == ("", True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are no runs in logs"),
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "there is no finished run in empty"),
        (["damaged"], "record.json is damaged"),
        (["--outptu", "x"], "did you mean --output"),
        (["--max_epochs", "3"], "--max_epochs goes with --train"),
        (["\u2014train", "lenet"], "begins with a dash as pages print it, not with hyphens; type --train"),
        (["--seeds", "3"], "--seeds goes with --train"),
        (["--train"], "--train needs the names of recipes"),
        (["--train", "lenett"], "did you mean lenet"),
        (["--train", "lenet", "--seeds", "0"], "--seeds must be an integer of at least 1, got '0'"),
        (["--train", "lenet", "--lr", "auto"], "give --lr and --batch_size as numbers"),
        (["--train", "lenet", "--trainer.limit_test_batches", "0"], "--train compares tested runs"),
        (["--train", "lenet", "--seed", "1"], "give their number with --seeds"),
        (["--train", "lenet", "--model", "nin"], "name the recipes behind --train"),
        (["--train", "lenet", "--max_epochs", "none"], "--max_epochs must be"),
        (["--train", "lenet", "--model.no_such_key", "1"], "no_such_key"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "record.json").write_text('{"recipe": ', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert compare.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("compare.py: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_arguments_of_train_py_are_told_from_runs() -> None:
    request = compare.parse(["--train", "lenet", "nin", "--compile", "--max_epochs", "2", "--seeds=3", "--lr=1e-3"])
    assert request is not None
    assert request.recipes == ["lenet", "nin"]
    assert request.seeds == 3
    assert request.flags == ["--compile", "--max_epochs", "2", "--lr=1e-3"]
    with pytest.raises(UserError, match="leave out some/run"):
        compare.parse(["some/run", "--train", "lenet"])


def test_help_and_the_table_need_no_torch(logs: Path) -> None:
    code = (
        f"import sys, compare; compare.main(['--help']); compare.main([{str(logs)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: python compare.py")
    assert "0.8300" in done.stdout
    assert done.stdout.strip().endswith("False"), done.stderr


@pytest.mark.slow
def test_train_runs_what_is_missing_and_only_that(tmp_path: Path) -> None:
    answer = compare_py(*TRAIN, folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "lenet, seed 0: starting" in answer.out
    first = (tmp_path / "logs/lenet/version_0/record.json").read_bytes()
    again = compare_py(*TRAIN, "--seeds", "2", "--output", "out", folder=tmp_path)
    assert again.code == 0, again.err
    assert "lenet, seed 0: finished" in again.out
    assert "lenet, seed 1: starting" in again.out
    assert (tmp_path / "logs/lenet/version_0/record.json").read_bytes() == first
    assert [run.seed for run in find_runs([tmp_path / "logs"])] == [0, 1]
    assert "±" in again.out
    longer = ("--max_epochs", "1")
    other = compare_py(*TRAIN, *longer, folder=tmp_path)  # other settings are another run
    assert "lenet, seed 0: starting" in other.out
    assert "(" not in other.out.split("─")[-1].splitlines()[1], "only the runs asked for are compared"


def test_a_group_left_out_of_a_plot_leaves_the_others_their_numbers(logs: Path) -> None:
    pytest.importorskip("matplotlib")
    groups = fold(find_runs([logs]))[:3]
    figure = _scatter(groups, [1.0, None, 3.0], "x")
    names = [text.get_text().split()[0] for text in figure.legends[0].get_texts()]
    assert names == ["1", "3"]


def test_no_two_ticks_of_a_plot_are_labelled_alike(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *given, **named: drawn.append((self, save(self, *given, **named)))
    )
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for epoch, accuracy in zip(record["epochs"], (0.914, 0.916, 0.917), strict=True):
        epoch |= {"train/accuracy": accuracy, "val/accuracy": accuracy}
    write(tmp_path / "run", record, accuracy=0.9)
    draw(fold(find_runs([tmp_path])), tmp_path)
    tried = [({"data.batch_size": "64"}, 0.9118), ({"data.batch_size": "128"}, 0.9114)]
    draw_trials({"data.batch_size": Choice(("64", "128"))}, tried, tmp_path / "trials.png")
    assert len(drawn) >= 4
    for axes in [axes for one, _ in drawn for axes in one.axes]:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels() if label.get_text()]
            assert len(set(labels)) == len(labels), labels


def test_runs_behind_links_are_found_once(trained: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "disk" / "lenet"
    shutil.copytree(trained.folder, elsewhere / "version_0")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "lenet").symlink_to(elsewhere)
    (elsewhere / "version_1").symlink_to(elsewhere / "version_0")
    (elsewhere / "loop").symlink_to(elsewhere)
    assert len(find_runs([tmp_path / "logs"])) == 1


@pytest.mark.slow
def test_a_run_in_the_precision_of_the_machine_or_of_a_short_name_is_recognised(tmp_path: Path) -> None:
    recipe = yaml.safe_load((REPO / "configs/lenet_classic.yaml").read_text(encoding="utf-8"))
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False\n"
        "torch.cpu.get_capabilities = dict\n"
    )
    rest = (f"--data_dir={DATA}", "--val_size=200", "--accelerator=cpu")
    both, again = ("starting", "finished"), ("finished",)
    for precision, flags, expected in (
        ("bf16-mixed", (), both),
        ("bf16-mixed", ("--precision", "32"), again),
        ("bf16-mixed", ("--precision=bf16",), both),
        ("bf16-mixed", ("--precision=16",), both),  # which Lightning makes bf16-mixed on a CPU
        ("16-mixed", (), again),
    ):
        recipe["trainer"] = {"max_epochs": 1, "precision": precision}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        command = [sys.executable, str(REPO / "compare.py"), "--train", "mine.yaml", *rest, *flags]
        environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
        for said in expected:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert (done.returncode, f"seed 0: {said}" in done.stdout) == (0, True), done
            in_float32 = (precision, flags, said) == ("bf16-mixed", (), "finished")  # not as it says
            assert ("finished in float32" in done.stdout) == in_float32
    computed = [run.record["precision"] for run in find_runs([tmp_path / "logs"])]
    assert computed == ["32-true", "bf16-mixed", "bf16-mixed"]


def test_a_folder_of_any_name_is_recognised_in_a_record(
    trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "我的\u3000照片"  # with the space of Chinese text, which records of others may only show escaped
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    config = resolved("lenet", [f"--data_dir={name}"])
    assert config["data"]["data_dir"] == name
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    record["config"]["data"]["folder"] = config["data"]["folder"] = name
    write(tmp_path / "run", record)
    (run,) = find_runs([tmp_path])
    assert matches(run, run.settings | {"data.folder": name})
    assert not matches(run, run.settings | {"data.folder": "other"})


def test_a_run_on_a_part_of_the_data_is_not_the_recipes_own(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    whole = copy.deepcopy(record) | {"train_images": 55_000, "val_images": 5000}
    whole["test"] |= {"images": 10_000, "test_set": 10_000}
    whole["config"]["data"]["data_dir"] = "elsewhere"

    def taken(record: dict[str, Any], data_dir: Path) -> bool:
        config = copy.deepcopy(whole["config"])
        config["data"]["data_dir"] = str(data_dir)
        wanted = shaping(config) | training._sample(config["data"])
        return matches(Record(tmp_path, record), wanted)

    unfinished = {name: value for name, value in record.items() if name not in ("test", "fit_seconds")}
    assert taken(record, DATA) and taken(unfinished, DATA) and not taken(whole, DATA)
    assert taken(whole, tmp_path) and not taken(record, tmp_path) and not taken(unfinished, tmp_path)
    for name, value in (("limit_train_batches", 0.5), ("limit_val_batches", 1), ("check_val_every_n_epoch", 3)):
        part = copy.deepcopy(whole)
        part["config"]["trainer"][name] = value
        assert not taken(part, tmp_path), name


def test_a_setting_that_is_off_makes_no_difference_to_older_runs() -> None:
    def shape(**settings: object) -> dict:
        callback = {"class_path": "callbacks.distillation.Distillation", "init_args": {"temperature": 2.0, **settings}}
        return shaping({"model": {"label_smoothing": 0.0}, "trainer": {"callbacks": [callback]}})

    assert shape() == shape(consistent=False) != shape(consistent=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    arguments = (*TRAIN, "--batch_size", "2", "--max_epochs", "3")
    command = [sys.executable, str(REPO / "compare.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            # The checkpoint of an epoch is written after its line.
            deadline = time.monotonic() + 60
            while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline:
                time.sleep(0.05)
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (before,) = find_runs([tmp_path / "logs"])
    assert not before.finished
    answer = compare_py(*arguments, folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "lenet, seed 0: going on" in answer.out
    (after,) = find_runs([tmp_path / "logs"])
    assert after.finished
    assert [epoch["epoch"] for epoch in after.record["epochs"]] == [1, 2, 3]
    elapsed = [epoch["elapsed_seconds"] for epoch in after.record["epochs"]]
    assert elapsed == sorted(elapsed)
    assert after.record["fit_seconds"] > elapsed[-1] * 0.99


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGHUP, marks=pytest.mark.long)])
def test_no_training_outlives_compare(signum: signal.Signals, tmp_path: Path) -> None:
    """It saves a checkpoint first, and holds the lock of the folder until then."""
    flags = ["--data_dir", str(DATA), "--val_size", "200", "--max_epochs", "400", "--accelerator", "cpu"]
    command = [sys.executable, str(REPO / "compare.py"), "--train", "lenet", *flags]
    # Standard error goes on to the training: it is read to its end only when that is over.
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 90
        while not (saved := list(tmp_path.rglob("last.ckpt"))):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (-signum if signum == signal.SIGKILL else 143), error
    assert "Traceback" not in error
    assert "Continue with" in error
    assert torch.load(saved[0], weights_only=True)["epoch"] < 399
    with training.training_lock(tmp_path / "logs"):
        pass  # nobody holds it


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP])  # the last two differ on a Mac
def test_a_file_system_without_locks_is_trained_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(training.fcntl, "flock", refuse)
    with training.training_lock(tmp_path):
        assert (tmp_path / ".compare.lock").exists()


def test_a_training_holds_the_lock_of_its_folder(tmp_path: Path) -> None:
    """Even if the process that took it is gone; here: has closed it."""
    with training.training_lock(tmp_path), training.start(["--help"], stdout=subprocess.DEVNULL) as process:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=training._HELD)
        process.wait()
    try:
        with pytest.raises(UserError, match="another process is training"), training.training_lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    with training.training_lock(tmp_path):
        pass


def test_a_training_whose_time_is_over_counts_as_stopped(tmp_path: Path) -> None:
    request = training.Request([], tmp_path, None, ["lenet"], 1, ["--data_dir", str(DATA), "--accelerator", "cpu"])
    assert training.train_one(request, "lenet", 0, {}, seconds=0.1) in (-signal.SIGTERM, 143)


@pytest.mark.parametrize("check", [report._check_folder, check_output])
def test_a_place_that_can_not_be_written_is_seen_by_trying(check: Callable[[Path], None], tmp_path: Path) -> None:
    """The system's answer beforehand is another one: on Windows, and to whoever has given up rights."""
    check(tmp_path / "new" / "best.yaml")
    assert not list(tmp_path.iterdir())
    with read_only_folder() as folder, pytest.raises(UserError, match="can't be written"):
        check(folder / "new" / "best.yaml")


@pytest.mark.slow
@pytest.mark.long
def test_a_failed_recipe_does_not_stop_the_others(tmp_path: Path) -> None:
    arguments = ("--train", "nin", "lenet", "--image_size", "28", *TRAIN[2:])
    answer = compare_py(*arguments, folder=tmp_path)
    assert answer.code == 1
    assert "nin with seed 0 was not finished" in answer.err
    assert [run.recipe for run in find_runs([tmp_path / "logs"]) if run.finished] == ["lenet"]


# ---- Records from elsewhere: their texts are shown as text, and what makes no sense is refused.

HOSTILE = {
    "title": "\x1b]0;title\x07",
    "colour": "\x1b[31mred\x9b0m",
    "lines": "one\ntwo\rthree\u2028four",
    "direction": "abc\u202edef",
    "surrogate": "\ud800",
    "markup": "[red]x[/blue]",
    "emoji": ":skull:",
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "picture": "![x](http://127.0.0.1/x.png)",
    "table": "a | b",
    "code": "`x` **y** $z$ ~~w~~",
    "formula": "=cmd|' /C calc'!A0",
    "legend": "_hidden",
    "glyph": "网络 \U0001f600 $\\frac{",
    "long": "x" * 5_000,
}


@pytest.mark.parametrize("place", ["recipe", "class", "machine", "setting"])
def test_any_text_of_a_record_is_shown_as_text(
    place: str, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, (name, text) in enumerate(HOSTILE.items()):
        one = copy.deepcopy(record)
        if place == "recipe":
            one["recipe"] = one["commit"] = one["precision"] = text
        elif place == "machine":
            one["machine"]["cpu"] = one["machine"]["gpu"] = one["versions"]["torch"] = text
        elif place == "setting":
            one["config"]["model"]["net"]["init_args"] = {text: text}
        one["test"]["class_accuracy"] = {text: 0.5 for text in HOSTILE.values()} if place == "class" else {}
        write(tmp_path / name, one, seed=seed if place == "class" else 0, accuracy=0.8)
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert not err
    written = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    for shown in (out, written):
        assert not [char for char in shown if not char.isprintable() and char != "\n"]
    assert "<script" not in written and not re.search(r"(?<!\\)\]\(http", written)
    rows = [line for line in written.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert len(cells) <= 2, "the table of classes, and that of runs"
    if place == "recipe":
        assert "[red]x[/blue]" in out and ":skull:" in out
    text = (tmp_path / "out/runs.csv").read_text(encoding="utf-8")
    assert not re.search(r"(^|,)\"?=cmd", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("recipe", None),
        ("recipe", ""),
        ("recipe", 3),
        ("config", {}),
        ("config", []),
        ("seed", "0"),
        ("seed", -1),
        ("epochs", {}),
        ("epochs", []),
        ("epochs", [3]),
        ("epochs", [{"epoch": "one", "seconds": 1.0}]),
        ("epochs", [{"epoch": 1}]),
        ("epochs", [{"epoch": 1, "seconds": -1.0}]),
        ("epochs", [{"epoch": 1, "seconds": 1.0, "val/accuracy": 7}]),
        ("epochs", [{"epoch": 1, "seconds": 1.0, "val/loss": "x"}]),
        ("machine", "this one"),
        ("machine", {"cpu": None}),
        ("devices", 0),
        ("precision", None),
        ("versions", {"torch": {}}),
        ("flops", float("inf")),
        ("parameters", 10**400),
        ("fit_seconds", "long"),
        ("peak_memory_bytes", float("nan")),
        ("test.accuracy", 1.5),
        ("test.accuracy", float("nan")),
        ("test.accuracy", None),
        ("test.images", 0),
        ("test.test_set", "all"),
        ("test.images", 2.5),
        ("test.class_accuracy", ["a"]),
        ("test.class_accuracy", {"a": "b"}),
        ("test.right", "no base64"),
        ("test.right", "eNpjAAAAAQAB"),
        ("test", [1]),
    ],
)
def test_a_record_that_makes_no_sense_is_one_line(
    place: str, value: Any, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    inside = record["test"] if place.startswith("test.") else record
    inside[place.removeprefix("test.")] = value
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert compare.main([str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"{tmp_path}/record.json is damaged" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"[" * 200_000, b'{"recipe": ' + b"9" * 5000 + b"}"])
def test_what_is_no_record_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "record.json").write_bytes(content)
    assert compare.main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "record.json is damaged" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", [name for name, (_, needed) in SCHEMA.items() if not needed and name != "test"])
def test_what_a_record_need_not_say_may_be_null(name: str, trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    *parents, key = name.split(".")
    (record[parents[0]] if parents else record)[key] = None
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert compare.main([str(tmp_path)]) == 0


def test_infinite_losses_and_perfect_accuracies_are_drawn(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, loss in enumerate((math.inf, -math.inf)):
        record["epochs"][0]["val/loss"] = record["test"]["loss"] = loss
        write(tmp_path / str(seed), record, seed=seed, accuracy=1.0)
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0


def test_classes_that_were_not_tested_are_left_blank() -> None:
    tested: list[dict[str, float]] = [{"Bag": 0.9}, {"Bag": 0.95, "Coat": 0.85}]
    tests = [{"accuracy": 0.9, "images": 10, "class_accuracy": one} for one in tested]
    runs = [Record(Path(), {"config": {}, "recipe": "x", "epochs": [], "test": test, "devices": 1}) for test in tests]
    (axes,) = _class_accuracy([Group([run], name="x") for run in runs]).axes
    assert [text.get_text() for text in axes.texts] == ["90.0", "", "95.0", "85.0"]
    assert axes.images[0].get_clim() == (0.75, 1.05)


def test_another_accelerator_is_another_machine() -> None:
    plain, mps = machine("cpu"), machine(torch.device("mps"))
    assert "gpu" not in plain
    assert mps == plain | {"gpu": f"{plain['cpu']} (mps)"}


@pytest.mark.parametrize(
    ("changes", "reason", "tested"),
    [
        ({"trainer.limit_test_batches": 2}, "64 of 500 test images", 64),
        ({"trainer.limit_test_batches": 0.5}, "256 of 500 test images", 256),
        ({"trainer.limit_test_batches": 1}, "32 of 500 test images", 32),
        ({"trainer.limit_test_batches": 1.0}, "", 500),
        ({"trainer.limit_test_batches": None}, "", 500),
        ({"trainer.limit_train_batches": 3}, "limit_train_batches 3", 500),
        ({"trainer.limit_train_batches": 1.0}, "", 500),
        ({"trainer.overfit_batches": 0.1}, "overfit_batches 0.1", 500),
    ],
)
def test_partial_runs_are_marked(
    changes: dict[str, Any], reason: str, tested: int, trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    del record["test"]["test_set"], record["test"]["right"]  # as older records are: they tell the size of the whole set
    for name, value in changes.items():
        record["config"]["trainer"][name.removeprefix("trainer.")] = value
    record["config"]["data"] |= {"batch_size": 32, "eval_batch_size": None}
    write(tmp_path / "a", record, accuracy=0.8)
    (group,) = fold(find_runs([tmp_path]))
    assert group.partial == ["3 of 8 epochs", *([reason] if reason else [])]
    assert group.interval == wilson(0.8, tested)
    assert compare.main([str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    line = f"* partial, {', '.join(group.partial)}: the run"
    assert line in capsys.readouterr().out
    assert f"\\{line}" in (tmp_path / "out/report.md").read_text(encoding="utf-8")
    with (tmp_path / "out/runs.csv").open(encoding="utf-8", newline="") as file:
        assert [row["partial"] for row in csv.DictReader(file)] == ["; ".join(group.partial)]


def test_a_whole_run_is_not_marked(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    record["epochs"] = [{"epoch": number + 1, "seconds": 1.0} for number in range(8)]
    write(tmp_path / "a", record | {"max_epochs": 8}, accuracy=0.8)
    (run,) = find_runs([tmp_path])
    assert run.partial == []
    record["epochs"].pop()
    record["config"]["patience"] = 2  # which may end a whole run early
    write(tmp_path / "b", record | {"max_epochs": 8}, seed=1, accuracy=0.8)
    assert [run.partial for run in find_runs([tmp_path])] == [[], []]
    record["config"]["patience"] = None
    write(tmp_path / "c", record | {"max_epochs": 8}, seed=2, accuracy=0.8)
    assert [run.partial for run in find_runs([tmp_path])] == [[], [], ["7 of 8 epochs"]]


def test_the_record_tells_which_images_were_right(trained: Run) -> None:
    (run,) = find_runs([trained.folder])
    assert run.right is not None
    assert len(run.right) == 500
    assert statistics.mean(run.right) == pytest.approx(run.accuracy)
    labels = gzip.decompress((DATA / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    for index, share in enumerate(run.record["test"]["class_accuracy"].values()):
        of_class = [one for one, label in zip(run.right, labels, strict=True) if label == index]
        assert statistics.mean(of_class) == pytest.approx(share)


def test_a_record_may_be_written_by_two_at_once(tmp_path: Path) -> None:
    path = tmp_path / "record.json"

    def write_often(number: int) -> None:
        for _ in range(300):
            write_json(path, [number] * 100)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_often, range(2)))
    assert len(set(json.loads(path.read_text(encoding="utf-8")))) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for git")
def test_what_git_says_besides_may_be_in_any_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nprintf 'f\\374r \\261\\316' >&2\necho 1a2b-dirty\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert commit() == "1a2b-dirty"


# ---- Is the difference more than chance?


@pytest.mark.parametrize("length", [1, 8, 500, 10_000])
def test_right_images_are_packed_and_unpacked(length: int) -> None:
    draw = random.Random(length)
    right = [draw.random() < 0.9 for _ in range(length)]
    text = pack_right(right)
    assert unpack_right(text, length) == right
    assert len(text) < 80 + length / 5
    with pytest.raises(ValueError):
        unpack_right(text, length + 8)


def test_a_small_text_does_not_become_gigabytes() -> None:
    bomb = base64.b64encode(zlib.compress(bytes(100_000_000))).decode()
    with pytest.raises(ValueError, match="10000 images"):
        unpack_right(bomb, 10_000)


@pytest.mark.parametrize(
    ("t", "degrees", "p"), [(2.776, 4, 0.05), (12.706, 1, 0.05), (2.228, 10, 0.05), (1.96, 1e9, 0.05), (0, 3, 1)]
)
def test_t_distribution(t: float, degrees: float, p: float) -> None:
    assert two_sided(t, degrees) == pytest.approx(p, abs=2e-4)
    assert critical(p, degrees) == pytest.approx(t, abs=2e-3)


def test_mcnemar() -> None:
    first, second = [True] * 10 + [False] * 2, [False] * 8 + [True] * 4
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # 8 against 2
    assert mcnemar(first, first) == 1


def simulated(draw: random.Random, seeds: int, images: list[float], gain: float = 0.0) -> Group:
    """Runs of a recipe: each image has its difficulty, each seed its luck, and each run decides on each image anew."""
    runs = []
    for seed in range(seeds):
        luck = draw.gauss(gain, 0.01)
        right = [draw.random() < min(1.0, max(0.0, share + luck)) for share in images]
        test = {"accuracy": statistics.fmean(right), "loss": 0.3, "images": len(right), "right": pack_right(right)}
        record = {"recipe": "x", "seed": seed, "config": {}, "test": test, "epochs": [], "devices": 1}
        runs.append(Record(Path(), record))
    return Group(runs, name="x")


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_equals_are_told_apart_as_rarely_as_promised(seeds: int) -> None:
    draw = random.Random(seeds)
    images = [draw.betavariate(2, 0.25) for _ in range(1000)]
    found = [difference(simulated(draw, seeds, images), simulated(draw, seeds, images)) for _ in range(200)]
    assert 0.03 <= sum(one.p < 0.05 for one in found) / 200 <= 0.07


def test_single_networks_of_equal_skill_are_told_apart_as_rarely_as_promised() -> None:
    """McNemar's test is about the networks themselves: their luck is the same here, and the images are drawn anew."""
    draw, false = random.Random(5), 0
    for _ in range(200):
        images = [draw.betavariate(2, 0.25) for _ in range(1000)]
        first, second = ([draw.random() < share for share in images] for _ in range(2))
        false += mcnemar(first, second) < 0.05
    assert 0.03 <= false / 200 <= 0.07


def test_real_differences_are_found_and_paired_images_help() -> None:
    draw = random.Random(0)
    images = [draw.betavariate(2, 0.25) for _ in range(2000)]
    better, worse = simulated(draw, 4, images, 0.05), simulated(draw, 4, images)
    paired = difference(better, worse)
    for run in (*better.runs, *worse.runs):
        del run.record["test"]["right"]
        vars(run).pop("right", None)
    unpaired = difference(better, worse)
    assert paired.paired and not unpaired.paired
    assert paired.p < 0.05
    assert paired.p < unpaired.p


@pytest.mark.parametrize(("steady", "scattered"), [(3, 3), (5, 5), (5, 2)])
def test_equals_of_which_one_scatters_are_rarely_told_apart(steady: int, scattered: int) -> None:
    draw, false = random.Random(steady), 0
    for _ in range(1000):
        groups: list[Any] = []
        for seeds, deviation in ((steady, 0.001), (scattered, 0.016)):
            tests = [{"accuracy": draw.gauss(0.5, deviation), "images": 10**9} for _ in range(seeds)]
            runs = [Record(Path(), {"config": {}, "test": test, "devices": 1}) for test in tests]
            groups.append(Group(runs, name="x"))
        false += difference(*groups).p < 0.05
    assert false / 1000 <= 0.1  # 0.1 to 0.38 if the spreads were taken to be equal


@pytest.mark.parametrize("count", [20, 40, 100])
def test_equals_are_not_told_apart_by_few_images(count: int) -> None:
    """On which two seeds are often exactly as good as each other, as if nothing were left to chance."""
    draw, false = random.Random(count), 0
    for _ in range(300):
        images = [draw.betavariate(8, 1) for _ in range(count)]
        groups = sorted((simulated(draw, 2, images) for _ in range(6)), key=lambda group: -group.accuracy)
        false += min(one.p for one in differences(groups)) < 0.05
    assert false / 300 <= 0.065


@pytest.mark.parametrize(
    ("image_variance", "comparisons", "seeds"),
    [(0.0, 1, 17), (0.0, 45, 37), (0.0007**2, 1, 408), (0.002**2, 1, None)],  # by tables of Student's t
)
def test_seeds_needed(image_variance: float, comparisons: int, seeds: int | None) -> None:
    assert seeds_needed(0.002**2, image_variance, comparisons) == seeds


@pytest.mark.parametrize(
    ("alone", "best_first", "together"),
    [
        ((0.02, 0.01), True, [0.03, 0.03]),  # 1.5 x 0.02 and 3 x 0.01
        ((0.02, 0.01), False, [0.02, 0.02]),  # as they are and 2 x 0.01
        ((0.011, 0.01), True, [0.03, 0.03]),  # no less than that of the larger difference
        ((0.9, 0.5), True, [1, 1]),
    ],
)
def test_many_comparisons_are_corrected(
    alone: tuple[float, ...], best_first: bool, together: list[float], logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *others = fold(find_runs([logs]))[:3]
    left = dict(zip(map(id, others), alone, strict=True))
    monkeypatch.setattr(
        "runs.differences.difference", lambda one, other, _: Difference(one, other, 0.1, left[id(other)], True, None)
    )
    found = differences([first, *others], best_first)
    assert [one.second for one in found] == others
    assert [one.p for one in found] == pytest.approx(together)


def test_what_is_more_than_chance_is_said_with_the_seeds_that_show_less(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for recipe, wrong in (("better", (50, 51, 52)), ("worse", (100, 102, 104)), ("equal", (50, 52, 54))):
        for seed, count in enumerate(wrong):
            right = [not 110 * seed <= image < 110 * seed + count for image in range(500)]  # each seed in its own way
            one = copy.deepcopy(record) | {"recipe": recipe}
            one["test"]["right"] = pack_right(right)
            write(tmp_path / recipe / str(seed), one, seed=seed, accuracy=sum(right) / 500)
    out = []
    for other in ("worse", "equal"):
        assert compare.main([str(tmp_path / "better"), str(tmp_path / other)]) == 0
        out.append(" ".join(capsys.readouterr().out.split()))
    assert re.search(r"better\*? over worse\*?: 10\.20 points, more than chance \(p < 0\.0001\)", out[0])
    assert re.search(r"To see 0\.2 points takes \d+ seeds of each\.", out[0])
    assert "may be chance (p = " in out[1] and "more than chance" not in out[1]


# How many images each seed gets wrong, the first of them, and how far apart they are from seed to seed.
SCATTERED, WORSE = ((50, 51, 52), 0, 110), ((100, 102, 104), 0, 110)
ALWAYS_THESE, ALONE = ((100, 102, 104), 390, 0), ((100,), 390, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([SCATTERED, ALONE], ""),  # nobody knows how far its seeds lie apart
        ([((50, 50), 0, 110), ((100, 100), 0, 110)], ""),  # nor theirs
        ([SCATTERED, WORSE, ALONE], "To see 0.2 points takes"),
        ([SCATTERED, ALWAYS_THESE], "no number of seeds can tell 0.2 points"),
        ([SCATTERED, WORSE, ALWAYS_THESE], "no number of seeds can tell 0.2 points"),
    ],
)
def test_how_many_seeds_it_takes_is_said_only_where_seeds_were_seen_to_differ(
    wrong: list[tuple[tuple[int, ...], int, int]], said: str
) -> None:
    groups = []
    for counts, begin, step in wrong:
        runs = []
        for seed, count in enumerate(counts):
            right = [not 0 <= image - begin - step * seed < count for image in range(500)]
            test = {"accuracy": sum(right) / 500, "images": 500, "right": pack_right(right)}
            runs.append(Record(Path(), {"config": {}, "test": test, "devices": 1}))
        groups.append(Group(runs, name="x"))
    text = report._what_is_compared(differences(groups), len(groups))
    assert said in text and ("no number" in text or "To see" in text) == bool(said), text


@pytest.mark.parametrize("count", [5, 10])
def test_the_best_of_equals_is_as_rarely_said_to_be_better_as_promised(count: int) -> None:
    draw, false = random.Random(count), 0
    for _ in range(400):
        groups = []
        for _ in range(count):
            of_images = draw.gauss(0.9, 0.003)  # what the choice of 10,000 images adds
            tests = [{"accuracy": draw.gauss(of_images, 0.003), "images": 10_000} for _ in range(3)]
            runs = [Record(Path(), {"config": {}, "test": test, "devices": 1}) for test in tests]
            groups.append(Group(runs, name="x"))
        groups.sort(key=lambda group: -group.accuracy)
        false += min(one.p for one in differences(groups)) < 0.05
    assert false / 400 <= 0.065


# ---- The table of settings.


def test_every_setting_is_of_one_kind() -> None:
    config = json.loads((RESULTS / "runs/lenet-seed0-cpu.json").read_text(encoding="utf-8"))["config"]
    known = set(leaves(config)) | {"model.net.image_size", "trainer.limit_test_batches"}
    known |= {f"data.{name}" for name in inspect.signature(PicturesDataModule).parameters}
    assert set(SETTINGS) - known <= {
        "class_weights",
        "model.checkpoint_activations",
        "model.flip_test",
        "pretrained",
    }, "no such settings"
    free = {name for name in known if name.startswith(("model.", "data.")) and not is_kept(name, scheduled=True)}
    assert {"data.data_dir", "data.num_workers", "data.eval_batch_size", "model.compile"} <= free
    assert is_kept("model.optimizer.init_args.lr", scheduled=False)
    for name in ("trainer.max_epochs", "trainer.limit_train_batches"):
        assert is_kept(name, scheduled=True) and not is_kept(name, scheduled=False)


# ---- sweep.py: the space on the command line, and real sweeps that fail, stop and go on.

SAMPLE = ("--data_dir", str(DATA), "--val_size", "200", "--accelerator", "cpu")


@pytest.mark.parametrize(
    ("setting", "name", "values"),
    [
        ("lr=log:1e-4..1e-2", "model.optimizer.lr", Range(1e-4, 1e-2, log=True)),
        ("batch_size=64,128", "data.batch_size", Choice(("64", "128"))),
        ("model.optimizer.init_args.weight_decay=0..0.1", "model.optimizer.weight_decay", Range(0, 0.1)),
        ("--data.crop_padding=0..4", "data.crop_padding", Range(0, 4, whole=True)),
        ("data.mean=-1..1.5", "data.mean", Range(-1, 1.5)),
        ("model.optimizer.betas=[0.9,0.99],[0.8,0.9]", "model.optimizer.betas", Choice(("[0.9,0.99]", "[0.8,0.9]"))),
        (
            "model.optimizer=torch.optim.SGD,torch.optim.Adam",
            "model.optimizer",
            Choice(("torch.optim.SGD", "torch.optim.Adam")),
        ),
    ],
)
def test_settings_of_the_space(setting: str, name: str, values: Range | Choice) -> None:
    space: dict[str, Range | Choice] = {}
    add_setting(space, setting)
    assert space == {name: values}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lrr=1,2", "unknown setting lrr in --space; did you mean lr?"),
        ("optimizer.lr=1,2", "unknown setting optimizer.lr"),
        ("devices.lr=1,2", "unknown setting"),
        ("lr", "not KEY=VALUES"),
        ("lr=0.1", "one value"),
        ("lr=1..x", "two numbers were expected"),
        ("lr=1..0.1", "must be below"),
        ("lr=0..1", "a positive number"),
        ("data.mean=log:0..1", "above 0"),
        ("data.mean=0..inf", "finite"),
        ("lr=log:1,2", "needs a range"),
        ("batch_size=64,64", "once"),
        ("data.batch_size=64,x", "an integer of at least 1"),
        ("batch_size=64,auto", "auto is found by trial"),
        ("seed=1,2", "the seed is no setting to choose by"),
        ("val_size=100,200", "same validation images"),
        ("patience=1..3", "can't be searched"),
        ("model.net.image_size=28,32", "it follows data.image_size"),
    ],
)
def test_bad_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        add_setting({}, setting)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a recipe"),
        (("lenet", "\u2013\u2013space", "lr=1,2"), "type --space"),
        (("lenett", "--space", "lr=1,2"), "did you mean lenet?"),
        (("lenet",), "nothing to search"),
        (("lenet", "nin", "--space", "lr=1,2"), "a sweep takes one"),
        (("lenet", "--space", "lr=1,2", "model.optimizer.lr=3,4"), "is given twice"),
        (("lenet", "--space", "lr=1,2", "--lr", "0.1"), "both in --space and as a flag"),
        (("lenet", "--space", "lr=1,2", "--trails", "3"), "did you mean --trials?"),
        (("lenet", "--space", "lr=1,2", "--trials", "0"), "--trials must be an integer of at least 1"),
        (("lenet", "--space", "lr=1,2", "--pruner", "x"), "median, hyperband, none"),
        (("lenet", "--space", "lr=1,2", "--output", "x.txt"), "ends in .yaml"),
        (("lenet", "--space", "lr=1,2", "--output", str(REPO / "configs/lenet.yaml")), "was not written by a sweep"),
        (("lenet", "--space", "lr=1,2", "--output", str(REPO / "LICENSE/a.yaml")), "LICENSE/a.yaml can't be written"),
        (("lenet", "--space", "lr=1,2", "--ckpt_path", "last"), "go on by themselves"),
        (("lenet", "--space", "lr=1,2", "--max_epochs", "x"), "--max_epochs must be an integer"),
    ],
)
def test_mistakes_in_a_sweep_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*arguments, "--log_dir", str(tmp_path / "logs")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_trials_on_a_full_disk_are_one_line(tmp_path: Path) -> None:
    # A limit on the size of files makes a write fail half-way, just as a full disk does.
    code = "import resource, sys, sweep; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,) * 2); "
    command = [sys.executable, "-c", f"{code}sys.exit(sweep.main(sys.argv[1:]))", "lenet", "--space", "lr=1,2"]
    done = subprocess.run(
        [*command, "--log_dir", str(tmp_path)], cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "study.db can't be used: " in line


def test_missing_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "runs.sweeps")
    assert sweep.main(["lenet", "--space", "lr=1,2"]) == 2
    error = capsys.readouterr().err
    assert "needs the package optuna: pip install -r requirements-extras.txt" in error and error.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, sweep; sweep.main(['--help']); print({'torch', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: python sweep.py")
    assert done.stdout.endswith("set()\n"), done


@pytest.mark.parametrize(
    "flags", ["--trainer.limit_val_batches 0", "--trainer.fast_dev_run 1", "--trainer.check_val_every_n_epoch 99"]
)
def test_a_sweep_needs_validations(flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["lenet", "--space", "lr=1e-4,1e-3", "--log_dir", str(tmp_path), *SAMPLE, *flags.split()]) == 2
    assert "a sweep chooses by validation accuracy" in capsys.readouterr().err


def test_settings_that_train_py_refuses_end_the_sweep_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lenet", "--space", "model.optimizer.weigth_decay=0..0.1", "--log_dir", str(tmp_path), *SAMPLE]
    assert sweep.main(arguments) == 2
    assert "unknown setting model.optimizer.weigth_decay; did you mean weight_decay?" in capsys.readouterr().err
    assert not list(tmp_path.rglob("study.db"))


@pytest.mark.slow
def test_a_setting_that_is_off_is_searched_in_fractions_where_it_takes_them(tmp_path: Path) -> None:
    whole = {
        "model.optimizer.momentum": False,  # of the first of the classes
        "trainer.gradient_clip_val": False,
        "trainer.limit_train_batches": True,  # a number of batches; up to 1 it is a share
        "trainer.min_epochs": True,
    }
    ranges = [f"{name}={2 * name.endswith('batches')}..3" for name in whole]
    space = ["model.optimizer=torch.optim.SGD,torch.optim.RMSprop", *ranges]
    request = sweep.parse(["lenet", "--space", *space, *SAMPLE])
    assert request is not None
    for _ in range(2):  # the second time as it was noted
        found = checked_space(request, tmp_path)
        assert {name: one.whole for name, one in found.items() if isinstance(one, Range)} == whole


def test_a_small_space_is_tried_to_its_end_when_a_sweep_is_extended(tmp_path, monkeypatch):
    def fail(trial: optuna.Trial, request: sweep.SweepRequest, folder: Path) -> int:
        folder.mkdir()
        (folder / "output.txt").touch()
        return 1

    monkeypatch.setattr(sweeping, "_train", fail)  # at once: what is tried matters here, not how it trains
    arguments = ["lenet", "--space", "lr=1,2", "batch_size=3,4,5", "--log_dir", str(tmp_path), *SAMPLE]
    monkeypatch.chdir(tmp_path)
    for trials in ("5", "20"):
        assert sweep.main([*arguments, "--trials", trials]) == 1
    (path,) = tmp_path.rglob("study.db")
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{path}")
    tried = [tuple(sorted(trial.params.items())) for trial in study.trials]
    assert len(set(tried[:5])) < 5  # else the test says nothing
    assert len(set(tried)) == 6


def test_a_sweep_outlives_a_failing_trial_and_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    tmp_path /= "100%25 mine"  # in an address %25 is a %
    tmp_path.mkdir()
    flags = ("--max_epochs", "15", "--batch_size", "32", "--output", "mine.yaml", *SAMPLE)
    command = [sys.executable, str(REPO / "sweep.py"), "lenet", "--space", "lr=1e30,0.005", *flags]
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 200
        while not list(tmp_path.rglob("trial_2/lenet/version_0/record.json")):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)  # to the sweep alone
        assert process.wait(60) == 130
    (folder,) = (tmp_path / "logs" / "sweeps").iterdir()
    (stopped,) = find_runs([folder])
    first = stopped.record["epochs"]
    assert "fit_seconds" not in stopped.record

    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done
    assert f"{folder.relative_to(tmp_path)}: 1 of 2 trials done" in done.stdout
    assert "1 failed" in done.stdout
    assert done.stdout.endswith("Train it: python train.py --model mine.yaml\n")
    assert len(Image.open(folder / "trials.png").convert("RGB").getcolors(1 << 24) or []) > 10  # not blank
    assert "try a lower --lr" in (folder / "trial_1" / "output.txt").read_text(encoding="utf-8")
    (run,) = find_runs([folder])  # it went on in its folder
    assert [epoch["epoch"] for epoch in run.record["epochs"]] == list(range(1, 16))
    assert run.record["epochs"][: len(first)] == first
    assert "test" not in run.record
    failed, finished = json.loads((folder / "trials.json").read_text(encoding="utf-8"))["trials"]
    assert (failed["ended"], failed["settings"]) == ("failed", ["model.optimizer.lr=1e30"])
    assert (finished["ended"], finished["fit_seconds"]) == ("finished", run.record["fit_seconds"])
    assert finished["val_accuracy_by_epoch"] == [epoch["val/accuracy"] for epoch in run.record["epochs"]]
    assert find_runs([tmp_path / "logs"]) == []  # compare.py lists no trials

    # The recipe is that trial's, whole.
    printed = subprocess.run(
        [sys.executable, str(REPO / "train.py"), "fit", "--model", "mine.yaml", "--print_config"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    wanted = run.settings | {"trainer.precision": shaping(yaml.safe_load(printed.stdout)).get("trainer.precision")}
    assert shaping(yaml.safe_load(printed.stdout)) == {name: value for name, value in wanted.items() if value}
    best = max(epoch["val/accuracy"] for epoch in run.record["epochs"])
    header = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    epoch = next(epoch["epoch"] for epoch in run.record["epochs"] if epoch["val/accuracy"] == best)
    assert f"Expected: {best:.4f} validation accuracy (epoch {epoch}); not measured on the test images" in header
    assert "--pruner" in header

    # And written again, to wherever it is wanted then.
    command[command.index("mine.yaml")] = "other.yaml"
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "2 of 2 trials done" in done.stdout, done
    assert (tmp_path / "other.yaml").read_text(encoding="utf-8") == header.replace("mine.yaml", "other.yaml")


def test_a_recipe_names_no_epoch_whose_accuracy_it_does_not_have(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    request = sweep.parse(["lenet", "--space", "lr=1,2"])
    command = parse_command_line(["fit", "--model", "lenet"])
    assert request is not None and command is not None
    for number, epoch in enumerate(record["epochs"]):
        epoch["val/accuracy"] = 0.8 + number / 100
    for best, said in ((0.81, "0.8100 validation accuracy (epoch 2);"), (0.83, "0.8300 validation accuracy;")):
        write_recipe(tmp_path / "best.yaml", record, best, request, command, request.space)
        assert f"# Expected: {said} not measured" in (tmp_path / "best.yaml").read_text(encoding="utf-8")


def test_whoever_reads_a_recipe_while_it_is_written_again_has_it_whole(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    request, command = sweep.parse(["lenet", "--space", "lr=1,2"]), parse_command_line(["fit", "--model=lenet"])
    assert request is not None and command is not None
    write_recipe(output := tmp_path / "best.yaml", record, 0.8, request, command, request.space)
    before = output.read_text(encoding="utf-8")
    with output.open(encoding="utf-8") as reader:
        write_recipe(output, record, 0.9, request, command, request.space)
        assert reader.read() == before
    assert output.read_text(encoding="utf-8") == before.replace("0.8000", "0.9000") != before
    assert list(tmp_path.iterdir()) == [output]


def test_a_recipe_keeps_nulls_and_callbacks_that_were_given(trained: Run, tmp_path: Path) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    flags = ["--trainer.callbacks+=callbacks.ema.EMA", "--trainer.check_val_every_n_epoch=null", "--data.mean=0.5"]
    request, command = sweep.parse(["lenet", "--space", "lr=1,2"]), parse_command_line(["fit", "--model=lenet", *flags])
    assert request is not None and command is not None
    record["config"] = resolved("lenet", flags)
    write_recipe(tmp_path / "best.yaml", record, 0.8, request, command, request.space)
    assert shaping(resolved(str(tmp_path / "best.yaml"), [])) == shaping(record["config"])


def test_a_recipe_is_written_into_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows'
    request = sweep.parse(["lenet", "--space", "lr=1,2", "--output=~/best.yaml"])
    assert request is not None and request.output == tmp_path / "best.yaml"


def test_a_bad_trial_is_given_up(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.99))
    request = sweep.parse(["lenet", "--space", "lr=1,2", "--max_epochs", "500", *SAMPLE])
    assert request is not None
    trial = study.ask()
    trial.set_user_attr("folder", "trial_1")
    trial.set_user_attr("settings", ["--model.optimizer.lr=0.001"])
    assert sweeping._run_trial(study, trial, request, tmp_path).startswith("given up after epoch")
    assert study.trials[0].state == optuna.trial.TrialState.PRUNED
    (run,) = find_runs([tmp_path])
    assert 1 <= len(run.record["epochs"]) < 500
    assert study.trials[0].intermediate_values[1] == run.record["epochs"][0]["val/accuracy"]


def test_a_trial_that_was_killed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = "import os\nfrom models import LeNet\n\nclass Net(LeNet):\n    def forward(self, images):\n"
    (tmp_path / "mine.py").write_text(
        f"{killed}        print('as usual', flush=True)\n        os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.chdir(tmp_path)
    request = sweep.parse(["lenet", "--space", "lr=1,2", "--model.net", "mine.Net", *SAMPLE])
    assert request is not None
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    trial.set_user_attr("folder", "trial_1")
    trial.set_user_attr("settings", ["--model.optimizer.lr=0.001"])
    assert sweeping._run_trial(study, trial, request, tmp_path) == "failed: killed by signal 9"


@pytest.mark.slow
def test_a_sweep_on_pictures_goes_on_with_the_same_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their folder, in which it leaves its trials; with batches of several sizes, of which validation takes one."""
    arguments = ["lenet", "--data=.", "--max_epochs=1", "--accelerator=cpu", "--space", "batch_size=1,2,3"]
    folder = shutil.copytree(DATA / "photos" / "train", tmp_path / "own")
    monkeypatch.chdir(folder)
    assert sweep.main([*arguments, "--trainer.limit_val_batches=1", "--trials", "3"]) == 0, capsys.readouterr().err
    assert sweep.main([*arguments, "--trials", "1"]) == 0, capsys.readouterr().err
    shutil.copy(next((folder / "hat").iterdir()), folder / "shoes" / "one more.jpg")
    assert sweep.main([*arguments, "--trials", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the pictures are not those of the earlier trials; remove logs/sweeps/lenet-" in line


def test_each_trial_draws_what_it_would_have_drawn_without_a_break() -> None:
    def drawn(breaks: bool) -> list[float]:
        study = optuna.create_study(direction="maximize")
        for number in range(14):  # the first ten are random
            study.sampler = optuna.samplers.TPESampler(seed=number)
            trial = study.ask()
            if breaks and number in (3, 12):
                trial.set_user_attr("settings", [])
                trial.suggest_float("x", 0, 1)
                sweeping._enqueue_interrupted(study)
                trial = study.ask()
            value = float(sweeping._suggest(trial, "x", Range(0, 1)))
            trial.set_user_attr("settings", [])
            study.tell(trial, -((value - 0.3) ** 2))
            assert len(sweeping._finished(study)) == number + 1
        return [trial.params["x"] for trial in sweeping._finished(study)]

    assert drawn(breaks=True) == drawn(breaks=False)


def test_a_small_space_is_tried_whole() -> None:
    space: dict[str, Range | Choice] = {"a": Choice(("x", "y")), "b": Range(1, 3, whole=True)}
    every = every_combination(space, most=6)
    assert len(every) == 6 and {"a": "y", "b": 3} in every
    assert every_combination(space, most=5) == []
    assert every_combination({"a": Range(0, 1)}, most=1000) == []


def test_recipe_names_each_setting_that_was_given_and_no_default(tmp_path: Path) -> None:
    config = json.loads(
        json.dumps({"model": {"net": {"class_path": "a.B", "init_args": {"width": 3, "image_size": 28}}}})
    )
    kept = _selected(config, lambda name, value: name in ("model.net.width", "model.net.class_path"))
    assert kept == {"model": {"net": {"class_path": "a.B", "init_args": {"width": 3}}}}
