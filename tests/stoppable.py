"""A small experiment that stops itself at a chosen batch, with everything in it that a stop could spoil."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from commands import DATA, ENVIRONMENT, REPO, Answer, run, run_forked

NETWORK = """
from torch import nn

class SmallNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 12 * 12, 10))

    def forward(self, images):
        return self.layers(images)
"""
# Writes down each image that it sees, and does what command.json says to the process at a chosen moment.
PROBE = """
import hashlib, json, os, time
import torch
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Probe(Callback):
    def setup(self, trainer, pl_module, stage):
        self.at(trainer, stage, 0)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if "at" in json.loads(Path("command.json").read_text()):
            with open(f"seen-{trainer.global_rank}", "a") as file:
                for image in batch[0]:
                    file.write(f"{trainer.current_epoch} {hashlib.sha256(image.numpy().tobytes()).hexdigest()}\\n")
        command = json.loads(Path("command.json").read_text())
        if command.get("poison") == [trainer.current_epoch, batch_idx, trainer.global_rank]:
            batch[0].fill_(float("nan"))
        self.at(trainer, "train", batch_idx)

    def on_exception(self, trainer, pl_module, exception):
        torch.save(dict(pl_module.named_parameters()), f"at-exception-{trainer.global_rank}.pt")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.at(trainer, "validation", batch_idx)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.at(trainer, "test", batch_idx)

    def on_train_end(self, trainer, pl_module):
        self.at(trainer, "trained", 0)

    def on_fit_end(self, trainer, pl_module):
        self.at(trainer, "end", 0)

    def at(self, trainer, stage, batch_idx):
        command = json.loads(Path("command.json").read_text())
        if command.get("at") == [stage, trainer.current_epoch, batch_idx, trainer.global_rank]:
            Path(f"pid-{trainer.global_rank}").write_text(str(os.getpid()))
            for number in command["signals"]:
                os.kill(os.getpid(), number)
                time.sleep(1 if len(command["signals"]) > 1 else 0)
        if command.get("sleep", 0) > 1:
            Path("asleep").touch()
        time.sleep(command.get("sleep", 0))
"""
EMA = {"class_path": "callbacks.ema.EMA", "init_args": {"decay": 0.9}}
AUGMENTATION = {
    "crop_padding": 2,
    "horizontal_flip": True,
    "brightness": 0.2,
    "contrast": 0.2,
    "random_erasing": 0.5,
    "photographed": 0.5,
}
WARMUP = {"class_path": "lit_modules.schedules.WarmupDecay"}
PLATEAU = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {"mode": "max", "patience": 0}}
# Lowers the rate after every epoch but the first, by how the training went.
WATCHING = {
    "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
    "init_args": {"monitor": "train/loss", "mode": "max", "patience": 0},
}


# Where the first run of an experiment leaves its checkpoints, in the experiment's folder.
SAVED = Path("logs/recipe/version_0/checkpoints")
# What a checkpoint holds of the computation.
COMPUTED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops")


def write(folder: Path, *, ema: bool = False, scheduler: dict | None = None, **data: Any) -> Path:
    """An experiment of three epochs of five or six batches in a folder of its own."""
    folder.mkdir()
    (folder / "small_net.py").write_text(NETWORK)
    (folder / "probe.py").write_text(PROBE)
    per_step = "ReduceLROnPlateau" not in (scheduler or WARMUP)["class_path"]
    recipe = {
        "seed_everything": 3,
        "model": {
            "net": {"class_path": "small_net.SmallNet"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "scheduler": scheduler or WARMUP,
            "scheduler_interval": "step" if per_step else "epoch",
            "mixup": 0.4,
            "cutmix": 1.0,
        },
        "data": {"batch_size": 250, "val_size": 297, "eval_batch_size": 100, **data},
        "trainer": {
            "max_epochs": 3,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "callbacks": [{"class_path": "probe.Probe"}, *([EMA] if ema else [])],
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def flags(*more: str) -> list[str]:
    return ["fit", "--model", "recipe.yaml", "--data_dir", str(DATA), *more]


def train(
    folder: Path,
    *more: str,
    at: list | None = None,
    signals: tuple[int, ...] = (signal.SIGTERM,),
    poison: list | None = None,
) -> Answer:
    """Train, with the signals sent at [stage, epoch, batch, rank], and NaN in the images of [epoch, batch, rank]."""
    command = {"at": at, "signals": [int(number) for number in signals], "poison": poison}
    (folder / "command.json").write_text(json.dumps(command))
    if "--devices" in more:  # whose processes start train.py themselves
        return run(*flags(*more), folder=folder)
    return run_forked(*flags(*more), folder=folder)


def order(folder: Path, **command: Any) -> None:
    """Give the probe of a process that runs another command, which it reads whole."""
    new = folder / "command.json.new"
    new.write_text(json.dumps(command))
    new.replace(folder / "command.json")


def sent_to_sleep(folder: Path, process: subprocess.Popen, seconds: float) -> None:
    """Let the process sleep in its next batch; returns once it does."""
    order(folder, sleep=seconds)
    end = time.monotonic() + 60
    while not (folder / "asleep").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def start(folder: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start training with slow batches in a process group of its own; returns once the second epoch has begun."""
    (folder / "command.json").write_text(json.dumps({"sleep": 0.2, "at": ["train", 1, 0, 0], "signals": []}))
    process = subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *flags(*more)],
        cwd=folder,
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 300
    while not (folder / "pid-0").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "training did not begin"
        time.sleep(0.05)
    return process


def finish(process: subprocess.Popen, timeout: float) -> Answer:
    """What a started process left; none of its group may live on."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return Answer(process.returncode, out, err)


def checkpoint(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / SAVED / f"{name}.ckpt", weights_only=True)


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ, bit for bit."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [path]
    if isinstance(first, dict) and isinstance(second, dict):
        found = [f"{path}.{key}" for key in first.keys() ^ second.keys()]
        return found + [
            d for key in first.keys() & second.keys() for d in differences(first[key], second[key], f"{path}.{key}")
        ]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        return [d for n, pair in enumerate(zip(first, second, strict=True)) for d in differences(*pair, f"{path}.{n}")]
    return [] if first == second else [f"{path}: {first} != {second}"]
