"""`--lr auto`: the rate that is found, the run that follows, and what is left of the search."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from commands import DATA, Answer, run_forked
from PIL import Image

from launch.learning_rate import LIGHTNINGS_SMOOTHING, _as_measured, _smoothed
from launch.start import _replace

SAMPLE = ("fit", "--model", "lenet", "--data_dir", str(DATA), "--val_size", "200", "--accelerator", "cpu")


def train(*flags: str, folder: Path) -> Answer:
    folder.mkdir(exist_ok=True)
    return run_forked(*SAMPLE, "--max_epochs", "2", *flags, folder=folder)


def rate_in_config(folder: Path) -> float:
    config = yaml.safe_load((folder / "logs/lenet/version_0/config.yaml").read_text(encoding="utf-8"))
    return config["model"]["optimizer"]["init_args"]["lr"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found")
    answer = train("--lr", "auto", folder=folder)
    assert answer.code == 0, answer.err
    assert f"Learning rate {rate_in_config(folder):g}: a tenth of that with the lowest loss" in answer.out
    assert answer.err == ""  # no bar of the finder's
    return folder


def test_the_run_is_that_of_the_rate_given(found: Path, tmp_path: Path) -> None:
    assert train("--lr", str(rate_in_config(found)), folder=tmp_path).code == 0
    path = "logs/lenet/version_0/checkpoints/last.ckpt"
    first, second = (torch.load(folder / path, weights_only=True) for folder in (found, tmp_path))
    assert first["config"] == second["config"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_curve_lies_beside_the_run_and_nothing_else_is_left(found: Path) -> None:
    run = found / "logs/lenet/version_0"
    curve = json.loads((run / "lr_finder.json").read_text(encoding="utf-8"))
    assert curve["learning_rate"] == rate_in_config(found)
    assert len(curve["rates"]) == len(curve["losses"]) > 50
    assert curve["losses"][0] == pytest.approx(math.log(10), abs=0.1)  # of guessing
    lowest = curve["rates"][curve["losses"].index(min(curve["losses"]))]
    assert curve["learning_rate"] == pytest.approx(lowest / 10, rel=0.01)
    assert 1e-4 < curve["learning_rate"] < 0.1
    pytest.importorskip("matplotlib")
    with Image.open(run / "lr_finder.png") as picture:
        assert len(picture.convert("L").getcolors(100_000) or []) > 10  # not blank
    assert [path.name for path in found.iterdir()] == ["logs"]
    assert sorted(path.name for path in found.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_run_can_be_continued_with_the_rate_found(found: Path) -> None:
    flags = ["--lr", "auto", "--max_epochs=2"]
    _replace(flags, "--lr", rate_in_config(found))
    assert flags == ["--max_epochs=2", f"--lr={rate_in_config(found)}"]
    answer = train("--ckpt_path", "last", *flags, folder=found)
    assert answer.code == 0, answer.err


@pytest.mark.slow
def test_two_processes_train_with_one_rate(tmp_path: Path) -> None:
    answer = train("--lr", "auto", "--devices", "2", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.count("Learning rate") == 1
    first = torch.load(tmp_path / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    other = tmp_path / "given"
    assert train("--lr", str(rate_in_config(tmp_path)), "--devices", "2", folder=other).code == 0
    second = torch.load(other / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ckpt_path", "x.ckpt"), "--lr auto is for new runs: a checkpoint keeps its learning rate"),
        (("--print_config",), "--lr auto is found when training starts"),
        (
            ("--model.scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.scheduler.max_lr", "1"),
            "init_args.max_lr",
        ),
        (("--trainer.accumulate_grad_batches", "99"), "an epoch is shorter than one optimiser step"),
        (("--trainer.gradient_clip_val", "1e-12", "--model.optimizer", "torch.optim.SGD"), "made the loss fall"),
        (("--image_size", "3"), "LeNet"),
    ],
)
def test_mistakes_are_one_line(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    answer = train("--lr", "auto", *flags, folder=tmp_path)
    assert answer.code == 2, answer
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    assert not (tmp_path / "logs").exists()


def test_measured_losses_are_recovered_from_lightnings_average() -> None:
    losses = [2.3, 2.2, 2.4, 1.0, 5.0]
    average, averages = 0.0, []
    for step, loss in enumerate(losses, 1):  # as in Lightning's finder
        average = LIGHTNINGS_SMOOTHING * average + (1 - LIGHTNINGS_SMOOTHING) * loss
        averages.append(average / (1 - LIGHTNINGS_SMOOTHING ** (step + 1)))
    assert list(_as_measured(averages)) == pytest.approx(losses)


def test_smoothing_keeps_a_constant() -> None:
    assert _smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
