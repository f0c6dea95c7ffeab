"""Training that has gone wrong ends, or says so, and keeps the last good checkpoint."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import DATA, Answer, run_forked
from stoppable import checkpoint, differences, train, write

from callbacks.divergence_guard import DivergenceGuard
from callbacks.processes import Processes
from errors import Diverged


def test_loss_that_is_not_finite_stops_before_the_optimiser_step(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good"), write(tmp_path / "bad")
    assert train(good, at=["train", 1, 1, 0]).code == 143
    answer = train(bad, poison=[1, 2, 0])
    assert answer.code == 3, answer
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert "the loss is not finite in epoch 2, batch 3" in lines[0]
    for advice in ("--lr", "--trainer.gradient_clip_val", "--precision 32"):
        assert advice in lines[0]
    before = {name: value for name, value in checkpoint(good)["state_dict"].items() if name.startswith("net.")}
    now = torch.load(bad / "at-exception-0.pt", weights_only=True)
    assert len(now) == 5
    assert not [d for name in now for d in differences(before[name], now[name].detach(), name)]
    assert checkpoint(bad)["epoch"] == 0  # of the last good epoch
    assert all(value.isfinite().all() for value in checkpoint(bad)["state_dict"].values())


def test_one_process_is_enough_to_stop_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    answer = train(folder, "--devices", "2", poison=[1, 2, 1])
    assert answer.code == 3, answer
    assert answer.err.count("the loss is not finite") == 1
    assert "Traceback" not in answer.err
    assert checkpoint(folder)["epoch"] == 0


def lenet(folder: Path, *more: str) -> Answer:
    """650 batches of LeNet."""
    data = ["--data_dir", str(DATA), "--val_size", "200", "--batch_size", "4", "--max_epochs", "2"]
    return run_forked("fit", "--model", "lenet", *data, "--trainer.logger", "false", *more, folder=folder)


def test_real_divergence(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e10")
    assert answer.code == 3
    assert "the loss is not finite in epoch 1" in answer.err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 1e38", "the loss is not finite in epoch 1, batch 2"),
        ("--lr 1e38 --model.optimizer.fused false", "the optimiser's step is too large for the weights"),
        ("--lr 1e300 --model.optimizer torch.optim.SGD --model.optimizer.fused false", "the optimiser's step is"),
        # A single step, after which no training loss is looked at any more.
        ("--lr 1e38 --batch_size 2000", "the validation loss is not finite in epoch 1"),
        ("--lr 1e38 --batch_size 2000 --val_size 0", "the weights are not finite in epoch 1"),
    ],
)
def test_senseless_numbers_end_in_one_line(flags: str, message: str, tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--max_epochs", "1", "--model.scheduler", "null", *flags.split())
    assert answer.code == 3, answer
    assert answer.err.startswith(f"train.py: error: {message}")
    assert "try a lower --lr" in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not (tmp_path / "checkpoints").exists()


def test_network_at_chance_is_reported_once(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e-12")
    assert answer.code == 0
    assert answer.err.count("has not left chance") == 1
    assert "over 500 batches" in answer.err and "--seed" in answer.err


def test_network_at_chance_can_stop_the_run(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e-12", "--stop_at_chance")
    assert answer.code == 3
    assert answer.err.startswith("train.py: error: the network has not left chance")
    assert checkpoint(tmp_path)["epoch"] == 0


def test_network_that_learns_is_not_reported(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e-3", "--stop_at_chance")
    assert answer.code == 0, answer.err
    assert "chance" not in answer.err


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_spoilt_weights_are_never_saved_where_the_loss_is_not_looked_at(spoilt: float) -> None:
    """On a GPU the guard looks now and then: what counts is that it does so before each checkpoint."""
    trainer = SimpleNamespace(
        accumulate_grad_batches=1,
        log_every_n_steps=50,
        current_epoch=0,
        is_global_zero=True,
        fit_loop=SimpleNamespace(batch_idx=6),
        strategy=SimpleNamespace(root_device=torch.device("meta")),  # any but the CPU
    )
    guard = DivergenceGuard(Processes())
    for loss in (2.0, spoilt, 2.0):
        guard.on_before_backward(trainer, None, torch.tensor(loss))  # type: ignore[arg-type]
        guard.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, None, 0)  # type: ignore[arg-type]
    with pytest.raises(Diverged, match="epoch 1, batch 7"):
        guard.on_save_checkpoint(trainer, None, {})  # type: ignore[arg-type]
