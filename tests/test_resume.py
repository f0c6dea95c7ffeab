"""A run that is stopped and continued ends with the weights of the uninterrupted run, bit for bit."""

import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from stoppable import AUGMENTATION, PLATEAU, checkpoint, differences, train, write

# What a continued run must not change: everything that training computes.
COMPUTED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops")
AVERAGED = ("current_model_state", "averaging_state")
FIRST, MIDDLE, LAST = ["train", 0, 0, 0], ["train", 1, 2, 0], ["train", 1, 4, 0]
VALIDATION, LAST_OF_ALL = ["validation", 1, 1, 0], ["train", 2, 4, 0]


def stop_and_continue(folder: Path, points: list[list], *flags: str) -> None:
    """Stop at each of the points in turn, then train to the end."""
    more: tuple[str, ...] = ()
    for point in points:
        answer = train(folder, *flags, *more, at=point)
        assert answer.code == 143, (point, answer)
        more = ("--ckpt_path", "checkpoints/last.ckpt")
    answer = train(folder, *flags, *more)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("settings", "flags", "points"),
    [
        ({"ema": True}, (), [FIRST, VALIDATION, LAST_OF_ALL]),
        ({}, ("--data.num_workers", "2"), [FIRST, MIDDLE, LAST, VALIDATION]),
        ({"scheduler": PLATEAU}, (), [LAST, ["validation", 2, 2, 0]]),
        ({"val_size": 0}, (), [["train", 0, 5, 0], MIDDLE]),
        ({}, ("--trainer.max_steps", "12", "--trainer.max_epochs", "-1"), [LAST, VALIDATION]),
        (
            {},
            ("--trainer.accumulate_grad_batches", "2", "--model.checkpoint_activations", "true"),
            [FIRST, MIDDLE, LAST],
        ),
        ({}, ("--trainer.val_check_interval", "0.4"), [["train", 0, 1, 0], ["validation", 1, 0, 0], MIDDLE]),
        (
            {"ema": True, "batch_size": 125},
            ("--devices", "2", "--data.num_workers", "2"),
            [["train", 0, 4, 1], ["validation", 1, 0, 1]],
        ),
    ],
    ids=[
        "ema",
        "workers",
        "plateau",
        "no validation",
        "max_steps",
        "memory savers",
        "several validations",
        "processes",
    ],
)
def test_continued_run_is_bit_equal(settings: dict, flags: tuple[str, ...], points: list[list], tmp_path: Path) -> None:
    settings = AUGMENTATION | settings
    whole, parts = write(tmp_path / "whole", **settings), write(tmp_path / "parts", **settings)
    answer = train(whole, *flags)
    assert answer.code == 0, answer.err
    stop_and_continue(parts, points, *flags)
    expected, found = checkpoint(whole), checkpoint(parts)
    keys = COMPUTED + (AVERAGED if settings.get("ema") else ())
    assert not [d for key in keys for d in differences(expected[key], found[key], key)]
    if settings.get("val_size") != 0:
        best, found_best = checkpoint(whole, "best"), checkpoint(parts, "best")
        assert not differences(best["state_dict"], found_best["state_dict"])


def test_each_image_is_seen_once_an_epoch(tmp_path: Path) -> None:
    """Across the stops; without augmentation, so that images can be told apart."""
    folder = write(tmp_path / "parts", num_workers=2)
    stop_and_continue(folder, [FIRST, MIDDLE, LAST, VALIDATION])
    seen = Counter((folder / "seen-0").read_text().splitlines())
    epochs = [{line.split()[1] for line in seen if line.startswith(f"{epoch} ")} for epoch in range(3)]
    assert set(seen.values()) == {1}
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 1500 - 297


def test_epochs_differ_in_order(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole")
    assert train(folder).code == 0
    lines = (folder / "seen-0").read_text().splitlines()
    orders = [[line.split()[1] for line in lines if line.startswith(f"{epoch} ")] for epoch in range(3)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != orders[2]


def test_continuing_from_an_epochs_end_is_bit_equal(tmp_path: Path) -> None:
    """As after `kill -9`: the checkpoint is the one that each epoch leaves."""
    whole, parts = write(tmp_path / "whole", scheduler=PLATEAU), write(tmp_path / "parts", scheduler=PLATEAU)
    assert train(whole).code == 0
    assert train(parts, at=["train", 2, 0, 0], signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    answer = train(parts, "--ckpt_path", "checkpoints/last.ckpt")
    assert answer.code == 0, answer.err
    expected, found = checkpoint(whole), checkpoint(parts)
    assert expected["lr_schedulers"][0]["last_epoch"] == 3  # the schedule has seen each epoch, once
    assert not [d for key in COMPUTED for d in differences(expected[key], found[key], key)]


def test_best_epoch_is_remembered_in_another_working_folder(tmp_path: Path) -> None:
    folder, elsewhere = write(tmp_path / "run"), write(tmp_path / "elsewhere")
    logged = ("--trainer.logger", "true", "--log_dir")
    assert train(folder, *logged, "runs", at=["train", 2, 0, 0]).code == 143
    saved = folder / "runs" / "recipe" / "version_0" / "checkpoints" / "last.ckpt"
    before = torch.load(saved, weights_only=True)
    answer = train(elsewhere, *logged, "../run/runs", "--ckpt_path", f"../run/{saved.relative_to(folder)}")
    assert answer.code == 0, answer.err
    after = torch.load(saved, weights_only=True)
    assert after["global_step"] == 15  # continued in its own folder
    (key,) = (key for key in after["callbacks"] if "val/accuracy" in key and key.startswith("ModelCheckpoint"))
    best, path = (after["callbacks"][key][name] for name in ("best_model_score", "best_model_path"))
    assert best >= before["callbacks"][key]["best_model_score"]
    assert Path(path) == saved.with_name("best.ckpt")
    assert len(after["callbacks"][key]["best_k_models"]) == 1


def test_probe_sees_a_difference() -> None:
    """The comparison itself can fail."""
    state = {"a": torch.zeros(2), "b": [1, {"c": torch.ones(1)}]}
    other = {"a": torch.zeros(2), "b": [1, {"c": torch.ones(1) + 1e-7}]}
    assert differences(state, other) == [".b.1.c"]
    assert differences(state, state) == []
