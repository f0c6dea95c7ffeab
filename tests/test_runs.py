"""Records of runs: comparing them, and sweeps."""

import copy
import csv
import gzip
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from commands import DATA, ENVIRONMENT, REPO, Answer
from conftest import Run
from PIL import Image

import compare
import sweep
from datamodules import CLASS_NAMES
from errors import UserError
from runs import report
from runs import sweeps as sweeping
from runs.groups import fold, wilson
from runs.reading import find_runs
from runs.search_space import Choice, Range, add_setting, every_combination
from runs.settings import shaping

# ---- compare.py on real records, and on runs that it trains itself.

TRAIN = ("--train", "lenet", "--max_epochs", "2", f"--data_dir={DATA}", "--val_size", "200", "--accelerator", "cpu")


def compare_py(*arguments: str, folder: Path, timeout: float = 200) -> Answer:
    command = [sys.executable, str(REPO / "compare.py"), *arguments]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def logs(trained: Run, tmp_path: Path) -> Path:
    """Records of lenet with seeds 0 to 2, of lenet with another learning rate, and of nin."""
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for seed, accuracy in enumerate((0.80, 0.82, 0.87)):
        write(tmp_path / f"lenet/version_{seed}", record, seed=seed, accuracy=accuracy)
    other = copy.deepcopy(record)
    other["config"]["model"]["optimizer"]["init_args"]["lr"] = 0.5
    write(tmp_path / "lenet/version_3", other, accuracy=0.1)
    write(tmp_path / "nin/version_0", record | {"recipe": "nin", "flops": 1_525_000_000}, accuracy=0.85)
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


@pytest.mark.parametrize(
    ("accuracy", "images", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0), (0.0, 10, 0.0, 0.2775), (0.9, 10_000, 0.8940, 0.9057)],
)
def test_wilson_interval(accuracy: float, images: int, low: float, high: float) -> None:
    assert wilson(accuracy, images) == pytest.approx((low, high), abs=5e-5)


def test_seeds_are_folded_and_other_settings_are_not(logs: Path) -> None:
    groups = fold(find_runs([logs]))
    assert [group.name for group in groups] == ["nin", "lenet (lr 0.005)", "lenet (lr 0.5)"]
    lenet = groups[1]
    assert [run.seed for run in lenet.runs] == [0, 1, 2]
    assert lenet.accuracy == pytest.approx(0.83)
    assert lenet.deviation == pytest.approx(statistics.stdev((0.80, 0.82, 0.87)))
    assert lenet.interval == pytest.approx(wilson(0.83, 500))
    assert groups[0].deviation is None


def test_where_a_run_lies_and_reads_its_data_does_not_part_it(logs: Path, trained: Run) -> None:
    record = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    record["config"]["data"] |= {"data_dir": "elsewhere", "num_workers": 3}
    record["config"]["log_dir"] = "there"
    write(logs / "moved", record, seed=3, accuracy=0.9)
    (group,) = (group for group in fold(find_runs([logs])) if group.name == "lenet (lr 0.005)")
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
    assert "0-2" in capsys.readouterr().out


def test_unfinished_runs_are_left_out_and_counted(logs: Path, trained: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write(logs / "stopped", json.loads((trained.folder / "record.json").read_text(encoding="utf-8")), seed=9)
    assert compare.main([str(logs)]) == 0
    out = capsys.readouterr().out
    assert "1 unfinished run left out" in out
    assert "0.8300 ± 0.0361" in out


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
        "lenet *",  # 3 epochs are not the recipe's 8
        "0",
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
    table = [line for line in text.splitlines() if line.startswith("| lenet (lr 0.005)")]
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
        ("nin", "0", 0.85),
        ("lenet (lr 0.005)", "0", 0.80),
        ("lenet (lr 0.005)", "1", 0.82),
        ("lenet (lr 0.005)", "2", 0.87),
        ("lenet (lr 0.5)", "0", 0.1),
    ]
    assert float(rows[0]["flops"]) == 1_525_000_000
    assert 0 <= float(rows[1]["accuracy of Ankle boot"]) <= 1


@pytest.mark.parametrize(
    ("package", "arguments", "message"),
    [
        ("matplotlib.figure", ["--output", "out"], "the plots need the package matplotlib"),
        ("rich.console", [], "the table needs the package rich: pip install rich"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are no runs in logs"),
        (["nowhere"], "nowhere does not exist"),
        (["empty"], "there is no finished run in empty"),
        (["damaged"], "record.json is damaged"),
        (["--outptu", "x"], "did you mean --output"),
        (["--max_epochs", "3"], "--max_epochs goes with --train"),
        (["--seeds", "3"], "--seeds goes with --train"),
        (["--output"], "--output needs a value"),
        (["--train"], "--train needs the names of recipes"),
        (["--train", "lenett"], "did you mean lenet"),
        (["--train", "lenet", "--seeds", "0"], "--seeds must be an integer of at least 1, got '0'"),
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


@pytest.mark.slow
def test_a_killed_run_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    arguments = (*TRAIN, "--batch_size", "8", "--max_epochs", "3")
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
def test_a_failed_recipe_does_not_stop_the_others(tmp_path: Path) -> None:
    arguments = ("--train", "nin", "lenet", "--image_size", "28", *TRAIN[2:])
    answer = compare_py(*arguments, folder=tmp_path)
    assert answer.code == 1
    assert "nin with seed 0 was not finished" in answer.err
    assert [run.recipe for run in find_runs([tmp_path / "logs"]) if run.finished] == ["lenet"]


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
        ("lr=log:1,2", "goes with a range"),
        ("batch_size=64,64", "once"),
        ("data.batch_size=64,x", "an integer of at least 1"),
        ("batch_size=64,auto", "auto is found by trial"),
        ("seed=1,2", "chance is nothing to choose"),
        ("val_size=100,200", "same validation images"),
        ("patience=1..3", "can't be searched"),
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
        (("lenett", "--space", "lr=1,2"), "did you mean lenet?"),
        (("lenet",), "nothing to search"),
        (("lenet", "nin", "--space", "lr=1,2"), "a sweep takes one"),
        (("lenet", "--space", "lr=1,2", "model.optimizer.lr=3,4"), "stands twice"),
        (("lenet", "--space", "lr=1,2", "--lr", "0.1"), "both in --space and as a flag"),
        (("lenet", "--space", "lr=1,2", "--trails", "3"), "did you mean --trials?"),
        (("lenet", "--space", "lr=1,2", "--trials", "0"), "--trials must be an integer of at least 1"),
        (("lenet", "--space", "lr=1,2", "--pruner", "x"), "median, hyperband, none"),
        (("lenet", "--space", "lr=1,2", "--output", "x.txt"), "ends in .yaml"),
        (("lenet", "--space", "lr=1,2", "--output", str(REPO / "configs/lenet.yaml")), "was not written by a sweep"),
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


def test_missing_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "runs.sweeps")
    assert sweep.main(["lenet", "--space", "lr=1,2"]) == 2
    assert "needs the package optuna: pip install -r requirements-extras.txt" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, sweep; sweep.main(['--help']); print({'torch', 'optuna'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: python sweep.py")
    assert done.stdout.endswith("set()\n"), done


def test_settings_that_train_py_refuses_end_the_sweep_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["lenet", "--space", "model.optimizer.weigth_decay=0..0.1", "--log_dir", str(tmp_path), *SAMPLE]
    assert sweep.main(arguments) == 2
    assert "unknown setting model.optimizer.weigth_decay; did you mean weight_decay?" in capsys.readouterr().err
    assert not list(tmp_path.rglob("study.db"))


def test_a_sweep_outlives_a_failing_trial_and_goes_on_after_ctrl_c(tmp_path: Path) -> None:
    flags = ("--max_epochs", "15", "--output", "mine.yaml", *SAMPLE)
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
    assert f"Expected: {best:.4f} validation accuracy" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


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
    kept = sweeping._selected(config, lambda name, value: name in ("model.net.width", "model.net.class_path"))
    assert kept == {"model": {"net": {"class_path": "a.B", "init_args": {"width": 3}}}}
