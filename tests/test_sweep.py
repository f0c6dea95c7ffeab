"""sweep.py: the space on the command line, and real sweeps that fail, stop and go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import yaml
from commands import DATA, ENVIRONMENT, REPO

import sweep
from errors import UserError
from runs import sweeps as sweeping
from runs.reading import find_runs, settings
from runs.search_space import Choice, Range, add_setting

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
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*arguments, "--log_dir", str(tmp_path / "logs")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_missing_optuna_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "sweeping")
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
    wanted = run.settings | {"trainer.precision": settings(yaml.safe_load(printed.stdout)).get("trainer.precision")}
    assert settings(yaml.safe_load(printed.stdout)) == {name: value for name, value in wanted.items() if value}
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
    every = sweeping._every_combination(space, most=6)
    assert len(every) == 6 and {"a": "y", "b": 3} in every
    assert sweeping._every_combination(space, most=5) == []
    assert sweeping._every_combination({"a": Range(0, 1)}, most=1000) == []


def test_recipe_names_each_setting_that_was_given_and_no_default(tmp_path: Path) -> None:
    config = json.loads(
        json.dumps({"model": {"net": {"class_path": "a.B", "init_args": {"width": 3, "image_size": 28}}}})
    )
    kept = sweeping._selected(config, lambda name, value: name in ("model.net.width", "model.net.class_path"))
    assert kept == {"model": {"net": {"class_path": "a.B", "init_args": {"width": 3}}}}
