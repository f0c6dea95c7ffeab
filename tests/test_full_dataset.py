"""The full data set: an accuracy that only a working pipeline reaches."""

import json

import pytest
from commands import REPO
from conftest import train_once

from datamodules import DatasetError
from datamodules.files.finding import SYSTEM_DIR, load


def full_set():
    """The folder of the full data set on this machine; None where there is none."""
    for folder in (REPO / "data", REPO / "data" / "FashionMNIST" / "raw", SYSTEM_DIR):
        try:
            if len(load(folder, "train")[1]) == 60_000 and len(load(folder, "test")[1]) == 10_000:
                return folder
        except DatasetError:
            continue
    return None


@pytest.mark.slow
def test_lenet_learns_fashion_mnist(tmp_path_factory):
    folder = full_set()
    if folder is None:
        pytest.skip(f"the full data set lies neither in data/ nor in {SYSTEM_DIR}")
    run = train_once("full", tmp_path_factory, "--model=lenet", "--max_epochs=2", f"--data_dir={folder}")
    assert run.answer.err == ""
    found = json.loads((run.folder / "record.json").read_text())
    assert (found["train_images"], found["val_images"], found["test"]["images"]) == (55_000, 5_000, 10_000)
    assert found["best_val_accuracy"] > 0.85
    assert found["test"]["accuracy"] > 0.84
    assert abs(found["test"]["accuracy"] - found["best_val_accuracy"]) < 0.03  # the split is fair
