"""Freed memory is kept, out of memory is one line with advice, and the largest batch that fits can be found."""

import json
import platform
from pathlib import Path

import pytest
import torch
import yaml
from commands import DATA, run_forked
from torch import nn

from launch.memory import advice, is_out_of_memory, largest_batch_size

SAMPLE = ("--data_dir", str(DATA), "--val_size", "200", "--max_epochs", "1", "--accelerator", "cpu")


FAULTS = """
import json, resource
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Faults(Callback):
    def on_fit_start(self, trainer, pl_module):
        self.counts = []

    def on_train_batch_end(self, *args):
        self.counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    def on_train_end(self, *args):
        Path("faults.json").write_text(json.dumps(self.counts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back at once")
def test_steps_use_the_memory_of_those_before(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    size = ("--batch_size", "16", "--image_size", "128", "--trainer.limit_train_batches", "12")
    answer = run_forked(
        *("fit", "--model", "vgg11_small", *SAMPLE, *size, "--trainer.callbacks+=faults.Faults"), folder=tmp_path
    )
    assert answer.code == 0, answer
    counts = json.loads((tmp_path / "faults.json").read_text())
    pages = counts[-1] - counts[-6]
    # The largest of many tensors, after the first convolution, has 16 * 8 * 128 * 128 * 4 bytes: 2,048 pages of 4 KB.
    assert pages < 2048, pages


@pytest.mark.parametrize(
    ("model", "subcommand"), [("googlenet", "fit"), ("lenet", "fit")], ids=["in training", "while the network is built"]
)
def test_out_of_memory_names_sizes_and_what_to_try(model: str, subcommand: str, tmp_path: Path) -> None:
    sizes = ("--batch_size", "1200", "--image_size", "20000")  # terabytes, which no machine has
    answer = run_forked(subcommand, "--model", model, *SAMPLE, *sizes, folder=tmp_path)
    assert answer.code == 1, answer
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert "out of memory with batches of 1200 images of 20000x20000" in lines[0]
    assert "--batch_size 600" in lines[0] and "--image_size 14976" in lines[0]


def test_advice() -> None:
    assert "try --batch_size 64, or --image_size 160, or a smaller network" in advice(128, 224)
    assert "try --image_size 160" in advice(1, 224)
    assert "try --batch_size 1, or a smaller" in advice(2, 28)
    assert "--data.eval_batch_size 4" in advice(8, 96, "--data.eval_batch_size")


def test_errors_are_told_apart() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_largest_batch_size_is_bounded_by_most() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    size = largest_batch_size(net, torch.optim.Adam, (1, 28, 28), torch.device("cpu"), None, most=100)
    assert size == 64


def test_largest_batch_size_shrinks_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.memory._free", lambda device: 1 << 20)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 10))
    size = largest_batch_size(net, torch.optim.Adam, (1, 28, 28), torch.device("cpu"), None, most=8192)
    assert size < 8192


def test_batch_size_auto(tmp_path: Path) -> None:
    answer = run_forked("fit", "--model", "lenet", *SAMPLE, "--batch_size", "auto", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert "Batch size 8192: the largest power of two that fits" in answer.out
    config = yaml.safe_load((tmp_path / "logs" / "lenet" / "version_0" / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 8192


def test_batch_size_auto_changes_nothing_else(tmp_path: Path) -> None:
    """The network starts from the same weights as with that size given."""
    folders = [tmp_path / "auto", tmp_path / "given"]
    for folder, size in zip(folders, ("auto", "8192"), strict=True):
        folder.mkdir()
        flags = ("--batch_size", size, "--trainer.logger", "false")
        assert run_forked("fit", "--model", "lenet", *SAMPLE, *flags, folder=folder).code == 0
    first, second = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in folders)
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name])


def test_batch_size_auto_is_for_new_runs(tmp_path: Path) -> None:
    answer = run_forked("--model", "lenet", "--batch_size", "auto", "--ckpt_path", "x.ckpt", folder=tmp_path)
    assert answer.code == 2
    assert "a checkpoint keeps its batch size" in answer.err
