"""Whole runs: training, testing, stopping, continuing, searching for settings, and mistakes of one line."""

import csv
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import pty
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import slurm
import torch
import yaml
from commands import DATA, ENVIRONMENT, REPO, Answer, free_port, run, run_forked
from filelock import FileLock
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import cpu
from lightning.pytorch.callbacks import LambdaCallback, device_stats_monitor
from lightning.pytorch.loggers import wandb
from lightning_utilities.core.imports import RequirementCache
from PIL import Image
from stoppable import (
    AUGMENTATION,
    COMPUTED,
    PLATEAU,
    SAVED,
    WATCHING,
    checkpoint,
    differences,
    finish,
    flags,
    order,
    sent_to_sleep,
    start,
    train,
    write,
)
from torch import nn
from torch.utils.data import DataLoader

import cli.recipes as recipe_files
import launch.found
from callbacks.ema import EMA
from callbacks.lr_curve import Curve, plot
from checkpoints.reading import read_checkpoint
from cli.command import Command
from cli.recipes import recipes
from datamodules import CLASS_NAMES, FashionMNISTDataModule, class_of
from errors import RunError, UserError
from launch.launchers import take_over_processes
from launch.learning_rate import STEPS, find_learning_rate
from launch.memory import _free_of_groups, advice, is_out_of_memory, largest_batch_size
from launch.start import _replace, how_to_continue
from launch.trainer import STEP_HOOKS, _leave_out_empty_hooks, cpu_has_bfloat16
from lit_modules import LitClassifier
from models import LeNet
from weights.exporting import export
from weights.pack import main as pack

# ---- Whole runs of the command on the sample, and what they leave behind.

LENET = ["--model", "lenet", "--data_dir", str(DATA), "--val_size", "200"]
FAST = ["--max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
NUMBER = r"(\d\.\d{4})"


def good(answer):
    """The output of a run that went well, which says nothing on standard error."""
    assert (answer.code, answer.err) == (0, ""), answer
    return answer.out


def config(*arguments, folder):
    return yaml.safe_load(good(run_forked(*arguments, "--print_config", folder=folder)))


def line_after(start, text):
    (rest,) = (line.removeprefix(start) for line in text.splitlines() if line.startswith(start))
    return rest


def record(folder):
    return json.loads((folder / "record.json").read_text())


# --- the session's run -----------------------------------------------------------------------------------------------


def test_a_normal_run_prints_no_warning(trained):
    assert trained.answer.err == ""


def test_one_line_an_epoch_in_a_pipe(trained):
    lines = [line for line in trained.answer.out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    measured = rf"loss {NUMBER} accuracy {NUMBER}"
    pattern = rf"epoch ./3  train {measured}  val {measured}  lr \S+  .* images/s  \S+ s"
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert "\r" not in trained.answer.out
    assert "\x1b" not in trained.answer.out


def test_the_summary_names_what_a_user_needs_next(trained):
    summary = trained.answer.out.rpartition("\n\n")[2]
    assert re.search(rf"^Test on 500 images: accuracy {NUMBER}, loss {NUMBER}$", summary, re.MULTILINE)
    assert re.search(r"^Training: 3 epochs in \S+ s, \S+ images/s", summary, re.MULTILINE)
    checkpoint = line_after("Checkpoint: ", summary)
    assert (trained.start / checkpoint).resolve() == trained.best.resolve()
    logs = line_after("Logs: ", summary)
    assert (trained.start / logs).resolve() == trained.folder.resolve()
    assert f"python train.py predict --ckpt_path {checkpoint}" in summary


def test_the_run_learned_something(trained):
    found = record(trained.folder)
    assert found["epochs"][-1]["train/loss"] < found["epochs"][0]["train/loss"] < 2.4
    assert found["test"]["accuracy"] > 0.5  # chance is 0.1


def test_the_record(trained):
    found = record(trained.folder)
    assert found["recipe"] == "lenet"
    assert (found["train_images"], found["val_images"], found["test"]["images"]) == (1203, 297, 500)
    assert (found["devices"], found["batch_size"], found["image_size"], found["seed"]) == (1, 32, 28, 0)
    assert (found["parameters"], found["max_epochs"], found["precision"]) == (61_706, 3, "32-true")
    assert found["versions"]["torch"] == version("torch")
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2, 3]
    for epoch in found["epochs"]:
        assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy", "seconds"} <= epoch.keys()
        # 1,203 images in that time
        assert epoch["images_per_second"] == pytest.approx(1203 / epoch["seconds"])
    assert found["best_val_accuracy"] == max(epoch["val/accuracy"] for epoch in found["epochs"])
    assert found["fit_seconds"] >= sum(epoch["seconds"] for epoch in found["epochs"])


def test_record_and_output_agree(trained):
    found = record(trained.folder)
    for epoch in found["epochs"]:
        assert f"train loss {epoch['train/loss']:.4f} accuracy {epoch['train/accuracy']:.4f}" in trained.answer.out
        assert f"val loss {epoch['val/loss']:.4f} accuracy {epoch['val/accuracy']:.4f}" in trained.answer.out
    assert f"accuracy {found['test']['accuracy']:.4f}, loss {found['test']['loss']:.4f}" in trained.answer.out


def test_the_configuration_lies_beside_the_run_and_in_the_checkpoints(trained):
    saved = yaml.safe_load((trained.folder / "config.yaml").read_text())
    assert saved["data"]["batch_size"] == 32
    assert saved["model"]["net"]["class_path"] == "models.lenet.LeNet"
    for name in ("best", "last"):
        content = torch.load(trained.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert content["recipe"] == "lenet"
        inside = yaml.safe_load(content["config"])
        assert inside["model"]["net"]["init_args"]["image_size"] == 28
        assert inside["data"] == saved["data"]


def test_best_is_the_best_epoch(trained):
    epochs = record(trained.folder)["epochs"]
    content = torch.load(trained.best, weights_only=True)
    best = max(epochs, key=lambda epoch: epoch["val/accuracy"])
    assert content["epoch"] + 1 == best["epoch"]
    last = torch.load(trained.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] + 1 == 3


# --- what a checkpoint is good for ------------------------------------------------------------------------------------


def test_test_needs_the_checkpoint_alone(trained, tmp_path):
    found = record(trained.folder)["test"]
    out = good(run_forked("test", "--ckpt_path", str(trained.best), folder=tmp_path))
    assert out == f"test on 500 images: accuracy {found['accuracy']:.4f}, loss {found['loss']:.4f}\n"


def test_validate_measures_the_images_held_out(trained, tmp_path):
    best = max(record(trained.folder)["epochs"], key=lambda epoch: epoch["val/accuracy"])
    out = good(run_forked("validate", f"--ckpt_path={trained.best}", folder=tmp_path))
    assert out == f"validate on 297 images: accuracy {best['val/accuracy']:.4f}, loss {best['val/loss']:.4f}\n"
    answer = run_forked("validate", f"--ckpt_path={trained.best}", "--val_size=0", folder=tmp_path)
    assert (answer.code, "trained on all images, so none is left to validate on" in answer.err) == (2, True)
    fewer = good(run_forked("validate", f"--ckpt_path={trained.best}", "--val_size=100", folder=tmp_path))
    assert "validate on 100 images" in fewer
    for other in ("--val_size=298", "--data.split_seed=1"):
        answer = run_forked("validate", f"--ckpt_path={trained.best}", other, folder=tmp_path)
        assert (answer.code, "may have been trained on some of these" in answer.err) == (0, True)


def test_predict_writes_one_line_an_image(trained, tmp_path):
    (tmp_path / "outputs" / "predict_0").mkdir(parents=True)  # an earlier one's
    out = good(run_forked("predict", f"--ckpt_path={trained.best}", folder=tmp_path))
    assert out == "Wrote the class probabilities of 500 images to outputs/predict_1/predictions.csv\n"
    with (tmp_path / "outputs/predict_1/predictions.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["image", "label", "prediction", *CLASS_NAMES]
    assert [int(line[0]) for line in lines] == list(range(500))
    for line in lines:
        probabilities = [float(text) for text in line[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert CLASS_NAMES[probabilities.index(max(probabilities))] == line[2]
    accuracy = sum(line[1] == line[2] for line in lines) / 500
    assert accuracy == pytest.approx(record(trained.folder)["test"]["accuracy"])


def test_image_size_and_normalisation_come_from_the_checkpoint(tmp_path):
    flags = ["--image_size=40", "--data.mean=0.3", "--data.std=0.35", "--max_epochs=1", "--batch_size=50"]
    good(run_forked(*LENET, *flags, folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    found = record(folder)
    expected = f"test on 500 images: accuracy {found['test']['accuracy']:.4f}, loss {found['test']['loss']:.4f}\n"
    checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}"
    assert found["image_size"] == 40
    assert good(run_forked("test", checkpoint, folder=tmp_path)) == expected
    assert good(run_forked("test", checkpoint, "--data.mean=0", folder=tmp_path)) != expected


def test_last_continues_in_the_same_folder(tmp_path):
    flags = ["fit", "--model=lenet_classic", f"--data_dir={DATA}", "--val_size=200"]
    good(run_forked(*flags, "--max_epochs=1", folder=tmp_path))
    first = record(tmp_path / "logs" / "lenet_classic" / "version_0")
    good(run_forked(*flags, "--max_epochs=3", "--ckpt_path=last", folder=tmp_path))
    good(run_forked(*flags, "--max_epochs=3", "--log_dir=straight", folder=tmp_path))
    runs = list((tmp_path / "logs" / "lenet_classic").iterdir())
    assert [path.name for path in runs] == ["version_0"]
    continued, straight = record(runs[0]), record(tmp_path / "straight" / "lenet_classic" / "version_0")
    assert [epoch["epoch"] for epoch in continued["epochs"]] == [1, 2, 3]
    assert continued["epochs"][0] == first["epochs"][0]
    for name in ("train/loss", "train/accuracy", "val/loss", "val/accuracy"):  # as if it had never stopped
        assert [epoch[name] for epoch in continued["epochs"]] == [epoch[name] for epoch in straight["epochs"]]


def test_a_run_without_a_seed_is_recorded_and_continues(tmp_path):
    flags = ["fit", "--model=lenet_classic", *LENET[2:], *FAST[1:], "--seed_everything=false", "--max_epochs"]
    good(run_forked(*flags, "1", folder=tmp_path))
    good(run_forked(*flags, "2", "--ckpt_path=last", folder=tmp_path))
    found = record(tmp_path / "logs" / "lenet_classic" / "version_0")
    assert (found["seed"], len(found["epochs"])) == (None, 2)


def test_a_run_started_in_another_ones_folder_leaves_it_alone(tmp_path):
    flags = ["fit", "--model=lenet_classic", f"--data_dir={DATA}", "--val_size=200", "--max_epochs=1"]
    good(run_forked(*flags, folder=tmp_path))
    first = tmp_path / "logs" / "lenet_classic" / "version_0"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    good(run_forked(*flags, "--log_dir=../..", folder=first))
    unsaved = good(run_forked(*flags, "--trainer.enable_checkpointing=false", "--log_dir=elsewhere", folder=first))
    assert "Checkpoint:" not in unsaved
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (first.with_name("version_1") / "record.json").is_file()


# --- the command's forms ----------------------------------------------------------------------------------------------


def test_fit_alone_does_not_test(tmp_path):
    out = good(run_forked("fit", *LENET, *FAST, folder=tmp_path))
    assert "Test on" not in out
    assert "test" not in record(tmp_path / "logs" / "lenet" / "version_0")


def test_from_another_folder_with_a_relative_path(tmp_path):
    """As a user would type it, from anywhere."""
    command = [sys.executable, os.path.relpath(REPO / "train.py", tmp_path), *LENET, *FAST]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "logs" / "lenet" / "version_0" / "record.json").is_file()


def test_config_before_and_after_the_subcommand(tmp_path):
    path = str(REPO / "configs" / "lenet.yaml")
    before = config("--config", path, "fit", "--lr=0.5", folder=tmp_path)
    after = config("fit", "--lr=0.5", "--config", path, folder=tmp_path)
    assert before == after == config("fit", "--model=lenet", "--lr=0.5", folder=tmp_path)
    assert after["model"]["optimizer"]["init_args"]["lr"] == 0.5


def test_a_config_sectioned_by_subcommand(tmp_path):
    content = yaml.safe_load((REPO / "configs" / "lenet.yaml").read_text())
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"fit": content | {"data": {"batch_size": 77}}}))
    found = config("--config", "all.yaml", "fit", folder=tmp_path)
    assert found["data"]["batch_size"] == 77
    assert found["model"] == config("fit", "--model=lenet", folder=tmp_path)["model"]


def test_flags_win_over_files_in_whatever_order(tmp_path):
    (tmp_path / "over.yaml").write_text("data: {batch_size: 7}\ntrainer: {max_epochs: 7}\n")
    for words in (
        "--batch_size=5 --config=over.yaml --model=lenet",
        "--model=lenet --config=over.yaml --data.batch_size 5",
        "--config=over.yaml --data.batch_size=5 --model=lenet",
    ):
        found = config(*words.split(), folder=tmp_path)
        assert (found["data"]["batch_size"], found["trainer"]["max_epochs"]) == (5, 7)


@pytest.mark.parametrize(
    "words", ["--lr=0.5 --model.optimizer=torch.optim.SGD", "--model.optimizer=torch.optim.SGD --lr=0.5"]
)
def test_a_rate_survives_a_change_of_optimizer(words, tmp_path):
    found = config("--model=lenet", *words.split(), folder=tmp_path)["model"]["optimizer"]
    assert found["class_path"] == "torch.optim.SGD"
    assert found["init_args"]["lr"] == 0.5


def test_print_config_round_trip(tmp_path):
    out = good(run_forked(*LENET, "--lr=0.03", "--image_size=32", "--print_config", folder=tmp_path))
    (tmp_path / "resolved.yaml").write_text(out)
    again = good(run_forked("--model=resolved.yaml", "--print_config", folder=tmp_path))
    assert yaml.safe_load(again) == yaml.safe_load(out)
    assert yaml.safe_load(out)["data"]["image_size"] == 32


def test_the_saved_configuration_trains_again(trained, tmp_path):
    """Also the one that a continued run leaves, which began at a checkpoint."""
    shutil.copytree(trained.folder, tmp_path / "runs/lenet/version_0")
    saved = tmp_path / "runs/lenet/version_0/checkpoints/last.ckpt"
    good(run_forked("fit", f"--ckpt_path={saved}", f"--data_dir={DATA}", "--log_dir=runs", folder=tmp_path))
    written = saved.parents[1] / "config.yaml"
    good(run_forked("fit", "--config", str(written), "--log_dir=logs", folder=tmp_path))
    (folder,) = (tmp_path / "logs").glob("*/version_0")
    for again, first in zip(record(folder)["epochs"], record(trained.folder)["epochs"], strict=True):
        assert again["train/loss"] == first["train/loss"]
        assert again["val/accuracy"] == first["val/accuracy"]


def test_print_model_shows_the_stages_and_writes_nothing(tmp_path):
    out = good(run_forked("--model=alexnet", "--print_model", folder=tmp_path))
    assert re.search(r"^total +AlexNet +10 +29,983,434 +1,842\.7 M$", out, re.MULTILINE)
    for shape in ("96x54x54", "256x12x12", "256x5x5", "4096"):
        assert shape in out
    assert list(tmp_path.iterdir()) == []


def test_fit_help_is_lightning_clis(tmp_path):
    out = good(run_forked("fit", "--help", folder=tmp_path))
    for flag in ("--trainer.max_epochs", "--model.optimizer", "--data.crop_padding", "--patience"):
        assert flag in out


def test_all_images_are_trained_on(tmp_path):
    good(run_forked("--model=lenet", f"--data_dir={DATA}", "--val_size=0", "--max_epochs=1", folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    assert record(folder)["train_images"] == 1500
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_patience_stops_early(tmp_path):
    flags = ["--patience=1", "--max_epochs=9", "--model.optimizer=torch.optim.SGD", "--lr=1e-12"]
    good(run_forked("fit", *LENET, *flags, folder=tmp_path))
    assert len(record(tmp_path / "logs" / "lenet" / "version_0")["epochs"]) == 2


def test_in_a_step_only_callbacks_with_something_to_do_are_called():
    calls: list[str] = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            calls.append("own")

    assigned = LambdaCallback(on_before_zero_grad=lambda *_: calls.append("assigned"))
    callbacks = [Counting(), assigned, EMA()]
    _leave_out_empty_hooks(callbacks)
    called = {(type(one).__name__, hook) for one in callbacks for hook in STEP_HOOKS if callable(getattr(one, hook))}
    own = {("Counting", "on_train_batch_end"), ("EMA", "on_train_batch_end"), ("LambdaCallback", "on_before_zero_grad")}
    assert called == own
    model, data = LitClassifier(LeNet()), FashionMNISTDataModule(str(DATA), val_size=200)
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(max_steps=2, accelerator="cpu", devices=1, callbacks=callbacks, **quiet).fit(model, data)
    assert calls == ["assigned", "own"] * 2


def not_compiled() -> None:
    nn.Module.compile = lambda *_, **__: None  # type: ignore[method-assign]  # it takes a minute


@pytest.mark.parametrize("flag", ["--compile", "--model.compile=false"])
def test_compiling_for_a_cpu_is_warned_of_in_one_line(flag, tmp_path):
    answer = run_forked("fit", *LENET, *FAST, flag, "--accelerator=cpu", folder=tmp_path, prepare=not_compiled)
    assert answer.code == 0, answer.err
    lines = answer.err.splitlines()
    assert len(lines) == (flag == "--compile") and all("can make training on a CPU slower" in line for line in lines)


def test_the_same_seed_trains_the_same_network(tmp_path):
    losses: list[float] = []
    for seed in (3, 3, 4):
        good(run_forked("fit", *LENET, *FAST, f"--seed={seed}", f"--log_dir={seed}{len(losses)}", folder=tmp_path))
        losses.append(record(tmp_path / f"{seed}{len(losses)}" / "lenet" / "version_0")["epochs"][0]["train/loss"])
    assert losses[0] == losses[1] != losses[2]


# --- networks --------------------------------------------------------------------------------------------------------


OWN = """
import torch
from torch import nn
from torch.utils.data import DataLoader

class Tiny(nn.Module):
    def __init__(self, hidden: int = 8, num_classes: int = 10):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
"""


@pytest.mark.parametrize("condition", ["images.mean().item() < 9", "len(images[images < 9])"])
def test_a_network_that_needs_data_is_trained_and_not_exported(condition, tmp_path, monkeypatch):
    own = OWN.replace("return self.layers(images)", f"return self.layers(images) if {condition} else None")
    (tmp_path / "my_networks.py").write_text(own)
    shown = "Tiny: 490 parameters; what it computes depends on data, so no shapes are known\n"
    flags = ("--model.net=my_networks.Tiny", *LENET[2:])
    assert good(run_forked(*flags, "--print_model", folder=tmp_path)) == shown
    out = good(run_forked(*flags, *FAST, folder=tmp_path))
    assert shown in out and "Test on 500 images" in out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which exporting adds this folder, whose module others have too
    (checkpoint,) = tmp_path.glob("logs/*/version_0/checkpoints/best.ckpt")
    with pytest.raises(RunError, match=r"^Tiny can't be exported as torch_export: ") as raised:
        export(checkpoint, "torch_export", tmp_path / "tiny.pt2", DATA, trust=True)
    assert "\n" not in str(raised.value)


KEEPING = """
class Keeping(Tiny):
    def __init__(self):
        super().__init__()
        self.by_name, self.listed = {}, []

    def forward(self, images):
        first = images.new_ones(1)
        %s
        return super().forward(images * kept)
"""


@pytest.mark.parametrize(
    "keep",
    [
        'kept = vars(self).setdefault("grid", first)',
        'hasattr(self, "grid") or self.register_buffer("grid", first); kept = self.grid',
        'kept = self.by_name.setdefault("grid", first)',
        "self.listed.append((len(images), first)); kept = self.listed[0][1]",
    ],
)
def test_what_a_network_keeps_of_its_first_images_is_of_real_ones(keep, tmp_path):
    (tmp_path / "keeping.py").write_text(OWN + KEEPING % keep)
    out = good(run_forked("--model.net=keeping.Keeping", *LENET[2:], *FAST, folder=tmp_path))
    assert "Keeping: 490 parameters, " in out and "Test on 500 images" in out


def test_a_network_of_the_users_own(tmp_path, capsys):
    (tmp_path / "my_networks.py").write_text(OWN)
    flags = [f"--data_dir={DATA}", "--val_size=200", "--max_epochs=2", "--model.net.hidden=16"]
    out = good(run("--model.net=my_networks.Tiny", *flags, folder=tmp_path))
    assert "Test on 500 images" in out
    (checkpoint,) = tmp_path.glob("logs/*/version_0/checkpoints/best.ckpt")
    refused = run_forked("test", f"--ckpt_path={checkpoint}", folder=tmp_path)
    assert refused.code == 2
    assert "add --trust_checkpoint if you know where the file comes from" in refused.err
    assert re.search(r"python train.py predict --ckpt_path \S+best\.ckpt --trust_checkpoint$", out.strip())
    assert pack([str(checkpoint), f"--data_dir={DATA}"]) == 2
    assert "put the class into models/ and train again" in capsys.readouterr().err
    out = good(run_forked("test", f"--ckpt_path={checkpoint}", "--trust_checkpoint", folder=tmp_path))
    assert out.startswith("test on 500 images: accuracy")


def test_a_recipe_of_the_users_own(tmp_path):
    (tmp_path / "my_networks.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text(
        "model:\n  net: {class_path: my_networks.Tiny, init_args: {hidden: 12}}\n"
        f"data: {{data_dir: {DATA}, val_size: 100}}\ntrainer: {{max_epochs: 1}}\n"
    )
    good(run_forked("--model=mine.yaml", folder=tmp_path))
    assert record(tmp_path / "logs" / "mine" / "version_0")["parameters"] == 50 * 12 + 13 * 10


def _recipes_are_here():
    recipe_files.PROJECT = Path.cwd()


def _without_packages():
    cpu._PSUTIL_AVAILABLE = device_stats_monitor._PSUTIL_AVAILABLE = ""  # type: ignore[assignment]
    wandb._WANDB_AVAILABLE = RequirementCache("wandb>=9999")


def test_a_recipe_in_configs_that_names_pictures_keeps_what_it_says_of_them(tmp_path):
    photos = DATA / "photos"
    recipe = yaml.safe_load((REPO / "configs" / "lenet.yaml").read_text(encoding="utf-8"))
    recipe["data"] |= {"folder": str(photos), "channels": 1, "mean": 0.5, "std": 0.25}
    recipe["trainer"]["max_epochs"] = 1
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    flags = ["fit", "--model=configs/mine.yaml", "--batch_size=8", f"--data_dir={tmp_path}"]
    assert run_forked(*flags, folder=tmp_path, prepare=_recipes_are_here).code == 0
    data = record(tmp_path / "logs" / "mine" / "version_0")["config"]["data"]
    assert (data["channels"], data["mean"], data["std"]) == (1, 0.5, 0.25)
    others = [*flags, f"--data={shutil.copytree(photos, tmp_path / 'others')}"]
    assert run_forked(*others, folder=tmp_path, prepare=_recipes_are_here).code == 0
    data = record(tmp_path / "logs" / "mine" / "version_1")["config"]["data"]
    assert data["channels"] == 3 and data["mean"] != 0.5  # of the pictures: the recipe speaks of others


@pytest.mark.parametrize("named_there", [False, True])
def test_a_file_that_fixes_what_pictures_decide_is_mentioned(named_there, tmp_path):
    """Unless it speaks of these pictures."""
    own = {"mean": 0.5, "std": None} | ({"folder": str(DATA / "photos")} if named_there else {})
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"data": own}))
    flags = ["fit", "--model=lenet", "--config=own.yaml", "--batch_size=8", "--max_epochs=1", f"--data_dir={tmp_path}"]
    flags += [] if named_there else [f"--data={DATA / 'photos'}"]
    answer = run_forked(*flags, folder=tmp_path)
    assert answer.code == 0, answer.err
    assert ("a file sets mean 0.5 of the images, which the pictures decide" in answer.err) != named_there
    assert record(tmp_path / "logs" / "lenet" / "version_0")["config"]["data"]["mean"] == 0.5


@pytest.mark.parametrize(
    ("flags", "warned"),
    [
        ("--data=mnist", True),
        ("--data=emnist_letters", True),
        ("--data=mnist --data.horizontal_flip=true", False),
        ("--data=mnist --config=mirrored.yaml", False),
        ("--data=mnist --data.horizontal_flip=false", False),
        ("--data=cifar10", False),
    ],
)
def test_a_recipe_that_mirrors_what_has_one_way_is_mentioned(flags, warned, tmp_path):
    (tmp_path / "mirrored.yaml").write_text("data: {horizontal_flip: true}")
    known = "--data.class_names=[a,b] --data.channels=1 --data.mean=0.1 --data.std=0.3 --data.stored_size=28"
    recipe = "fit --model=fast/30s --accelerator=cpu --precision=32 --print_model"
    answer = run_forked(*recipe.split(), *known.split(), *flags.split(), folder=tmp_path)  # the set is not fetched
    assert answer.code == 0, answer
    assert ("mean something else in the mirror, or nothing: --data.horizontal_flip false" in answer.err) == warned


def test_odd_settings_of_pictures_in_a_checkpoint_are_one_line(tmp_path):
    flags = ["fit", "--model=lenet", f"--data={DATA / 'photos'}", f"--data_dir={tmp_path}", "--max_epochs=1"]
    assert run_forked(*flags, folder=tmp_path).code == 0
    content = torch.load(tmp_path / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    config = yaml.safe_load(content["config"])
    config["data"]["mean"] = "odd"
    torch.save(content | {"config": yaml.safe_dump(config)}, tmp_path / "odd.ckpt")
    answer = run_forked(*flags, "--ckpt_path=odd.ckpt", folder=tmp_path)
    assert answer.code == 2 and "Traceback" not in answer.err, answer


def test_where_no_picture_is_left_to_validate_on_nothing_is_trained(tmp_path):
    photos = shutil.copytree(DATA / "photos", tmp_path / "photos")
    for picture in (photos / "validation").rglob("*.jpg"):
        picture.write_bytes(b"broken")
    flags = ["fit", "--model=lenet", f"--data={photos}", f"--data_dir={tmp_path}", "--batch_size=8", "--max_epochs=1"]
    answer = run_forked(*flags, folder=tmp_path)
    assert answer.code == 2 and "no picture is left to validate on" in answer.err.splitlines()[-1], answer
    assert not (tmp_path / "logs").exists()
    assert run_forked(*flags, "--val_size=0", folder=tmp_path).code == 0  # as it says


@pytest.mark.parametrize(
    ("user", "package"),
    [
        ("callbacks+=lightning.pytorch.callbacks.DeviceStatsMonitor", "psutil"),
        ("logger=WandbLogger", "wandb"),
        ("logger=[WandbLogger]", "wandb"),
    ],
)
def test_a_package_that_lightning_misses_is_one_line(user, package, tmp_path):
    flags = ["--accelerator=cpu", f"--trainer.{user}"]
    answer = run_forked("fit", *LENET, *FAST, *flags, folder=tmp_path, prepare=_without_packages)
    assert answer.code == 2 and package in answer.err.splitlines()[-1] and "Traceback" not in answer.err
    assert "LeNet" not in answer.err and len(answer.err.splitlines()[-1]) < 300  # of what was asked for alone


@pytest.mark.parametrize(
    "own", [(), ("--model.net.norm_layer=my_networks.Norm",)], ids=["whole", "with a part of one's own"]
)
def test_a_network_of_torchvisions(own, tmp_path):
    (tmp_path / "my_networks.py").write_text("from torch import nn\n\nclass Norm(nn.BatchNorm2d):\n    pass\n")
    flags = ["--model.net=torchvision.models.resnet18", "--model.net.num_classes=10", "--data.channels=3", *own]
    out = good(run_forked(*LENET, *flags, *FAST, "--batch_size=16", "--image_size=32", folder=tmp_path))
    folder = tmp_path / "logs" / "lenet" / "version_0"
    assert record(folder)["parameters"] == 11_181_642
    trust = ["--trust_checkpoint"] if own else []
    assert out.strip().endswith(" ".join(["best.ckpt", *trust]))
    out = good(run_forked("test", f"--ckpt_path={folder / 'checkpoints' / 'best.ckpt'}", *trust, folder=tmp_path))
    assert out.startswith("test on 500 images")


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_is_built(recipe):
    """Network, optimiser and schedule, as the YAML says; without memory for the weights."""
    content = yaml.safe_load(recipes()[recipe].read_text())
    assert f"--model {recipe}\n" in recipes()[recipe].read_text(), "the header gives the command"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LitClassifier, "model")
    parser.add_class_arguments(class_of(content["data"]), "data")
    settings = parser.parse_object({"model": content["model"], "data": content["data"]})
    settings.data.channels = settings.data.channels or settings.model.net.init_args.in_channels
    if "image_size" in settings.model.net.init_args:
        settings.model.net.init_args.image_size = settings.data.image_size
    settings.model.mixup = 0.0  # torchvision's draws from a distribution, which can't be made without data
    with torch.device("meta"):
        built = parser.instantiate(settings) if hasattr(parser, "instantiate") else parser.instantiate_classes(settings)
    images = torch.empty(2, *built.data.input_shape, device="meta")
    assert built.model.net(images).shape == (2, 10)
    optimizer = built.model.optimizer(built.model.parameters())
    assert optimizer.param_groups[0]["lr"] == content["model"]["optimizer"]["init_args"]["lr"]
    if built.model.scheduler:
        assert built.model.scheduler(optimizer, total_steps=10).optimizer is optimizer
    assert content["trainer"]["max_epochs"] > 0
    assert content["seed_everything"] == 0


# --- several processes -----------------------------------------------------------------------------------------------


EVALUATE = """
import sys
import lightning.pytorch as pl
import torch
from callbacks.processes import end_process
from datamodules import FashionMNISTDataModule
from lit_modules import LitClassifier
from models import LeNet
from models import VGG, LeNet

torch.manual_seed(0)
narrow = VGG(width_divisor=64, batch_norm=True, image_size=32)
with torch.no_grad():
    for _ in range(3):  # so that the statistics are not the ones of the start
        narrow(torch.rand(64, 1, 32, 32))
for net, size in ((LeNet(), 28), (narrow, 32)):
    data = FashionMNISTDataModule(sys.argv[1], eval_batch_size=60, image_size=size, val_size=203)
    trainer = pl.Trainer(
        accelerator="cpu", devices=int(sys.argv[2]), strategy="auto" if sys.argv[2] == "1" else "ddp",
        logger=False, enable_progress_bar=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    for function in (trainer.test, trainer.validate):
        (found,) = function(LitClassifier(net), data, verbose=False)
        if trainer.is_global_zero:
            with open(sys.argv[3], "a") as file:
                print(trainer.world_size, file=file)
                for name, value in sorted(found.items()):
                    print(name, value.hex(), f"{value:.17g}", file=file)
end_process(0)  # as train.py ends
"""


@pytest.mark.parametrize("several", [3, pytest.param(2, marks=pytest.mark.long)])
def test_evaluation_is_the_same_with_one_and_several_processes(several, tmp_path):
    """500 test images in batches of 60, and 203 validation images: neither divides. All bits of the results agree."""
    script = tmp_path / "evaluate.py"
    script.write_text(EVALUATE)
    environment = ENVIRONMENT | {"PYTHONPATH": str(REPO)}

    def evaluate(devices):
        results = tmp_path / f"results-{devices}"
        command = [sys.executable, str(script), str(DATA), str(devices), str(results)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        lines = results.read_text().splitlines()
        assert [line for line in lines if line.isdigit()] == [str(devices)] * 4
        return [line for line in lines if not line.isdigit()]

    one = evaluate(1)
    assert len(one) == 8
    assert evaluate(several) == one


def test_two_processes_train_and_test(trained, tmp_path):
    def train():
        flags = [*LENET, "--accelerator=cpu", "--devices=2", "--max_epochs=2", "--batch_size=50"]
        return run(*flags, folder=tmp_path, timeout=240)

    def test():
        return run("test", f"--ckpt_path={trained.best}", "--accelerator=cpu", "--devices=2", folder=tmp_path)

    with ThreadPoolExecutor(2) as pool:
        training, testing = pool.submit(train).result(), pool.submit(test).result()
    out = good(training)
    found = record(tmp_path / "logs" / "lenet" / "version_0")
    assert (found["devices"], found["batch_size"]) == (2, 100)
    assert out.count("Test on 500 images") == 1
    assert len([line for line in out.splitlines() if line.startswith("epoch ")]) == 2
    expected = record(trained.folder)["test"]
    wanted = f"test on 500 images: accuracy {expected['accuracy']:.4f}, loss {expected['loss']:.4f}\n"
    assert good(testing).endswith(wanted)  # PyTorch 2.8 prints lines about its connections before it


# --- precision -------------------------------------------------------------------------------------------------------


def _no_bfloat16():
    torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu.get_capabilities = dict  # type: ignore[assignment]


def _little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30))


def _small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def _bfloat16():
    torch.cpu._is_avx512_bf16_supported = lambda: True


@pytest.mark.parametrize(
    ("cpu", "flags", "precision"),
    [
        (_bfloat16, [], "bf16-mixed"),
        (_no_bfloat16, [], "32-true"),
        (_no_bfloat16, ["--precision", "bf16-mixed"], "bf16-mixed"),
    ],
)
def test_a_recipe_in_bfloat16_runs_in_float32_where_the_cpu_only_imitates_it(tmp_path, cpu, flags, precision):
    recipe = tmp_path / "mine.yaml"
    text = (REPO / "configs" / "lenet.yaml").read_text()
    recipe.write_text(text.replace("trainer:", "trainer:\n  precision: bf16-mixed"))
    command = ["fit", *LENET[2:], *FAST, "--model", str(recipe), "--accelerator", "cpu", *flags]
    out = good(run_forked(*command, folder=tmp_path, prepare=cpu))
    assert f"precision {precision}" in out
    assert ("no bfloat16 instructions" in out) == (precision == "32-true")
    assert record(tmp_path / "logs" / "mine" / "version_0")["precision"] == precision


@pytest.mark.parametrize(
    ("cpu", "flags", "precision"),
    [(_bfloat16, [], "bf16-mixed"), (_bfloat16, ["--precision", "32"], "32-true"), (_no_bfloat16, [], "32-true")],
)
def test_bfloat16_is_the_default_where_the_cpu_has_instructions_for_it(tmp_path, cpu, flags, precision):
    command = ["fit", *LENET[2:], *FAST, "--model", "lenet", "--accelerator", "cpu", *flags]
    out = good(run_forked(*command, folder=tmp_path, prepare=cpu))
    assert f"precision {precision}" in out
    assert ("--precision 32 for float32" in out) == (precision == "bf16-mixed")
    saved = torch.load(tmp_path / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    weights = saved["state_dict"]["net.classifier.5.weight"]
    assert weights.dtype == torch.float32


def test_arm_has_bfloat16_where_its_pytorch_has_onednn(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64", "bf16": True}, raising=False)
    for onednn in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda onednn=onednn: onednn)
        assert cpu_has_bfloat16() == onednn


@pytest.mark.parametrize("recipe", [[], ["--model", "lenet_classic"]])
def test_a_run_goes_on_in_the_precision_that_it_began_in(tmp_path, recipe):
    begin = ["fit", *LENET[2:], *FAST, "--model", "lenet_classic", "--accelerator", "cpu"]
    good(run_forked(*begin, folder=tmp_path, prepare=_no_bfloat16))
    saved = tmp_path / "logs/lenet_classic/version_0/checkpoints/last.ckpt"
    more = ["--ckpt_path", str(saved), "--accelerator", "cpu", *LENET[2:], *FAST[1:]]
    out = good(run_forked("fit", *recipe, *more, "--max_epochs", "2", folder=tmp_path, prepare=_bfloat16))
    assert "precision 32-true" in out


def test_the_precision_of_a_run_outlives_that_of_its_recipe(tmp_path):
    run = ["fit", "--model=fast/30s", *LENET[2:], *FAST, "--accelerator=cpu"]
    assert "precision 32-true" in good(run_forked(*run, "--precision=32", folder=tmp_path))
    for more, precision in (([], "32-true"), (["--precision=bf16-mixed"], "bf16-mixed")):
        answer = run_forked(*run, "--ckpt_path=last", *more, folder=tmp_path, prepare=_bfloat16)
        assert f"precision {precision}" in good(answer)


@pytest.mark.parametrize(("precision", "recipe"), [("bf16-true", "lenet"), ("64-true", "best/lenet")])
def test_weights_may_have_another_precision_than_float32(tmp_path, precision, recipe):
    """With class weights, and with averages where these can move; losses are summed in float64 all the same."""
    more = ["--model", recipe, "--precision", precision, "--class_weights"]
    fit = good(run_forked("fit", *LENET[2:], *FAST, *more, folder=tmp_path))
    saved = torch.load(tmp_path / f"logs/{recipe}/version_0/checkpoints/last.ckpt", weights_only=True)
    weights = saved["state_dict"]["net.classifier.5.weight"]
    assert weights.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert ("61,706" if recipe == "lenet" else "61,750") in fit
    (epoch,) = record(tmp_path / f"logs/{recipe}/version_0")["epochs"]
    loss = torch.tensor(epoch["val/loss"], dtype=torch.float64)
    assert loss != loss.bfloat16()


def test_numbers_of_16_bits_hold_no_average(tmp_path):
    more = ["--model", "best/lenet", "--precision", "bf16-true"]
    answer = run_forked("fit", *LENET[2:], *FAST, *more, folder=tmp_path)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert "averaged weights; take bf16-mixed" in answer.err


# ---- Every mistake ends with one line on standard error and exit code 2; nothing is written. All processes are real.

# What the line must say, beside the command; {files} is a folder of broken files.
LIGHT = {
    "unknown recipe": ("--model alexnett", "unknown recipe 'alexnett'; did you mean alexnet?"),
    "no recipe": ("", "give --model RECIPE"),
    "recipe without its flag": ("alexnet", "did you mean --model alexnet?"),
    "two recipes": ("--model lenet --model nin", "two recipes, lenet and nin"),
    "recipe file that is missing": ("--model own.yaml", "the recipe file own.yaml does not exist"),
    "unknown subcommand": ("trian --model lenet", "unknown subcommand 'trian'"),
    "two subcommands": ("fit test --model lenet", "two subcommands, fit and test"),
    "misspelt flag": ("--model lenet --bath_size 3", "unknown flag --bath_size; did you mean --batch_size?"),
    "prefix of a flag": ("--model lenet --max_epoch 3", "unknown flag --max_epoch; did you mean --max_epochs?"),
    "flag without its value": ("--model lenet --lr", "--lr needs a value"),
    "value of a switch": ("--model lenet --compile=yes", "--compile takes nothing, true or false, got 'yes'"),
    "word for a number": ("--model lenet --max_epochs two", "--max_epochs must be an integer of at least 1, got 'two'"),
    "negative lr": ("--model lenet --lr -0.1", "--lr must be a positive number, got '-0.1'"),
    "NaN lr": ("--model lenet --lr nan", "--lr must be a positive number, got 'nan'"),
    "infinite lr": ("--model lenet --lr inf", "--lr must be a positive number, got 'inf'"),
    "batch size 0": ("--model lenet --batch_size 0", "--batch_size must be an integer of at least 1, got '0'"),
    "negative val size": ("--model lenet --val_size -1", "--val_size must be an integer of at least 0, got '-1'"),
    "large seed": ("--model lenet --seed 4294967296", "--seed must be an integer from 0 to 4294967295"),
    "devices": ("--model lenet --devices abc", "--devices must be a number of at least 1"),
    "precision": ("--model lenet --precision 7", "--precision must be one of 32, bf16"),
    "accelerator": ("--model lenet --accelerator tpuu", "--accelerator must be one of auto, cpu, gpu"),
    "linked setting": ("--model lenet --model.net.image_size 32", "set --image_size instead"),
    "missing YAML": ("--model lenet --config none.yaml", "none.yaml does not exist"),
    "folder for a YAML": ("--model lenet --config {files}", "is a folder; a YAML file was expected"),
    "empty YAML": ("--model lenet --config {files}/empty.yaml", "empty.yaml holds no settings"),
    "broken YAML": ("--model lenet --config {files}/broken.yaml", "broken.yaml is not valid YAML"),
    "list for a YAML": ("--model lenet --config {files}/list.yaml", "list.yaml holds no settings"),
    "bytes for a YAML": ("--model lenet --config {files}/bytes.yaml", "bytes.yaml is not valid YAML"),
    "duplicate key": ("--model lenet --config {files}/twice.yaml", "'lr' appears twice, the second time in line 5"),
    "no run to continue": ("--model lenet --ckpt_path last", "there is no run of lenet to continue"),
    "last of what": ("fit --ckpt_path last", "--model RECIPE"),
    "nothing to test": ("test", "nothing to test: a network needs trained weights; give --ckpt_path PATH"),
}

HEAVY = {
    "prefix of a long flag": (
        "--trainer.max_epoch 3",
        "unknown flag --trainer.max_epoch; did you mean --trainer.max_epochs?",
    ),
    "batch that normalises nothing": (
        "--model.net models.googlenet.GoogLeNet --model.net.batch_norm true --image_size 32 --batch_size 1",
        "Expected more than 1 value per channel",
    ),
    "layers that ImageNet's network has not": (
        "--pretrained --model.net models.vgg.VGG --model.net.pool_first true --image_size 64",
        "is missing in this network",
    ),
    "misspelt group": ("--model.nett 3", "unknown flag --model.nett; did you mean --model.net?"),
    "misspelt argument": ("--model.net.paddin 1", "unknown setting model.net.paddin; did you mean padding?"),
    "argument of another class": ("--model.optimizer.momentum=1", "unknown setting model.optimizer.momentum"),
    "word for a long number": (
        "--trainer.max_epochs two",
        "trainer.max_epochs=two is not valid: an integer or null was expected",
    ),
    "word for a long lr": ("--model.optimizer.lr=fast", "model.optimizer.lr=fast is not valid: a number was expected"),
    "negative long lr": ("--model.optimizer.lr=-1", "learning rate: -1.0"),
    "NaN long lr": ("--model.optimizer.lr=.nan", "learning rate: nan"),
    "infinite weight decay": (
        "--model.optimizer.weight_decay=.inf",
        "optimizer weight_decay=inf must be a finite number",
    ),
    "negative weight decay": ("--model.optimizer.weight_decay=-1", "weight_decay value: -1.0"),
    "NaN mean": ("--data.mean nan", "data.mean=nan is not valid"),
    "choice": ("--model.net.activation tanh", "model.net.activation=tanh is not valid: relu or sigmoid was expected"),
    "long batch size 0": ("--data.batch_size 0", "data.batch_size=0 must be at least 1"),
    "long seed": ("--seed_everything -1", "seed_everything=-1 must lie between 0 and 4294967295"),
    "classes": ("--model.num_classes 12", "model.num_classes=12, but the pictures have 10 classes; leave it out"),
    "checkpoints without their settings": (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.save_weights_only=true",
        "save_weights_only leaves out how the network was trained",
    ),
    "machines": ("--num_nodes 2", "--num_nodes 2 alone doesn't say where the machines meet"),
    "smoothing": ("--model.label_smoothing 1.5", "label_smoothing=1.5 must lie in [0, 1)"),
    "channels": ("--data.channels 2", "data.channels=2 must be 1 or 3"),
    "long devices": ("--trainer.accelerator cpu --trainer.devices abc", "devices"),
    "long precision": ("--trainer.precision 7", "trainer.precision=7 is not valid: 64, 32, 16"),
    "long accelerator": ("--trainer.accelerator tpuu", "invalid accelerator name"),
    "unknown key": (
        "--config {files}/unknown.yaml",
        "unknown.yaml: unknown setting trainer.max_epoch; did you mean trainer.max_epochs?",
    ),
    "unknown group": (
        "--config {files}/group.yaml",
        "group.yaml: unknown setting traner.max_epochs; did you mean trainer.max_epochs?",
    ),
    "unknown argument in YAML": (
        "--config {files}/argument.yaml",
        "argument.yaml: unknown setting model.net.init_args.pading; did you mean padding?",
    ),
    "word in YAML": (
        "--config {files}/word.yaml",
        "word.yaml: trainer.max_epochs=two is not valid: an integer or null was expected",
    ),
    "misspelt class": ("--model.net models.lenet.LeNett", "models.lenet has no LeNett; did you mean LeNet?"),
    "misspelt module": ("--model.net modles.lenet.LeNet", "there is no module modles"),
    "misspelt torchvision network": ("--model.net torchvision.models.resnet188", "did you mean resnet18?"),
    "misspelt optimizer": ("--model.optimizer torch.optim.Adm", "torch.optim has no Adm; did you mean Adam?"),
    "class that is no network": ("--model.net fractions.Fraction", "it is not a subclass of Module"),
    "network without its arguments": ("--model.net torch.nn.Linear", "it needs in_features, out_features"),
    "schedule without its argument": ("--model.scheduler torch.optim.lr_scheduler.OneCycleLR", "it needs max_lr"),
    "schedule that ignores --lr": (
        "--model.scheduler torch.optim.lr_scheduler.OneCycleLR --model.scheduler.max_lr 0.1 --lr 0.2",
        "--lr would change nothing; set --model.scheduler.init_args.max_lr",
    ),
    "schedule that needs each epoch's validation": (
        "--model.scheduler lightning.pytorch.cli.ReduceLROnPlateau --model.scheduler.monitor val/loss "
        "--model.scheduler_interval epoch --trainer.val_check_interval 00:00:00:10",
        "watches val/loss after each epoch: trainer.val_check_interval can't be a time",
    ),
    "schedule of an unknown length": (
        "--model.scheduler torch.optim.lr_scheduler.CosineAnnealingLR --model.scheduler.T_max -1 "
        "--model.scheduler_interval step --trainer.callbacks GradientAccumulationScheduler "
        '--trainer.callbacks.scheduling {{"0":4}}',
        "--model.scheduler.T_max), or --trainer.accumulate_grad_batches instead",
    ),
    "schedule of an unknown length in epochs": (
        "--model.scheduler torch.optim.lr_scheduler.CosineAnnealingLR --model.scheduler.T_max -1 "
        "--model.scheduler_interval epoch --trainer.max_steps 9 "
        '--trainer.callbacks GradientAccumulationScheduler --trainer.callbacks.scheduling {{"0":4}}',
        "--model.scheduler.T_max), or --trainer.accumulate_grad_batches instead",
    ),
    "image too small": ("--image_size 8", "image_size=8 is too small for LeNet: with padding=2 it needs at least 12"),
    "image too small, seen in forward": ("--model.net models.nin.NiN --image_size 66", "at least 67x67"),
    "image too small for torchvision's": (
        "--model.net torchvision.models.vgg11 --data.channels 3 --model.net.num_classes 10 --image_size 16",
        "VGG can't take images of 3x16x16",
    ),
    "wrong number of channels": ("--data.channels 3", "LeNet can't take images of 3x28x28"),
    "model that can't be printed": ("--data.channels 3 --print_model", "LeNet can't take images of 3x28x28"),
    "wrong number of logits": (
        "--model.net.num_classes 7",
        "outputs of shape (7,) for one image; 10 logits were expected",
    ),
    "output of wrong shape": (
        "--model.net torch.nn.BatchNorm2d --model.net.num_features 1",
        "outputs of shape (1, 28, 28)",
    ),
    "network that is not a whole one": (
        "--model.net torch.nn.Conv2d --model.net.in_channels 2 --model.net.out_channels 3 --model.net.kernel_size 3",
        "Conv2d can't take images of 1x28x28",
    ),
    "val size too large": ("--val_size 1500", "data.val_size=1500 leaves none of the 1500 training images"),
    "patience without validation": ("--val_size 0 --patience 2", "validation images: set --val_size above 0"),
    "patience with no batch of it": ("--trainer.limit_val_batches 0 --patience 2", "set --trainer.limit_val_batches"),
    "two data sets": ("--config {files}/mnist.yaml --data fashion_mnist", "mnist.yaml, which names other pictures"),
    "setting of other pictures": ("--data.balanced true", "is for pictures other than Fashion-MNIST's: add --data"),
    "file for a data folder": ("--data_dir {files}/empty.yaml", "empty.yaml is a file, but a folder is expected"),
    "file for a log folder": ("--log_dir {files}/empty.yaml/logs", "runs can't be written to"),
}
if not torch.cuda.is_available():
    HEAVY["no GPU"] = (
        "--accelerator cuda",
        "PyTorch finds no such device on this machine; use --accelerator cpu or auto",
    )

CHECKPOINTS = {
    "missing": ("none.ckpt", "does not exist"),
    "folder": ("", "is a folder; give the path of a .ckpt file"),
    "empty": ("empty.ckpt", "is empty"),
    "truncated": ("truncated.ckpt", "is damaged or is not a checkpoint"),
    "cut by a few bytes": ("cut.ckpt", "is damaged or is not a checkpoint"),
    "bit flipped in a tensor": ("flipped.ckpt", "is damaged: "),
    "text": ("text.ckpt", "is damaged or is not a checkpoint"),
    "another file of torch's": ("tensor.ckpt", "it holds no state_dict"),
    "malicious": ("malicious.ckpt", "holds objects that a checkpoint of this project never holds"),
    "malicious plain pickle": ("pickle.ckpt", "is damaged or is not a checkpoint"),
    "malicious class": (
        "class.ckpt",
        "names the class os.system, which this project, torch and torchvision do not have",
    ),
    "without its configuration": ("unexplained.ckpt", "does not say how it was trained; add --model RECIPE"),
    "without weights": ("weightless.ckpt", "its state_dict must hold the weights, and nothing else"),
    "with null for a weight": ("null.ckpt", "its state_dict must hold the weights, and nothing else"),
    "without a weight": ("incomplete.ckpt", "net.classifier.5.bias is missing there"),
}


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def files(tmp_path_factory, trained):
    """Broken files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in {
        "empty": "",
        "broken": "trainer: {max_epochs: [3}",
        "list": "- trainer\n",
        "twice": "model:\n  optimizer:\n    init_args:\n      lr: 1\n      lr: 2\n",
        "unknown": "trainer: {max_epoch: 2}",
        "group": "traner: {max_epochs: 2}",
        "argument": "model: {net: {class_path: models.lenet.LeNet, init_args: {pading: 2}}}",
        "word": "trainer: {max_epochs: two}",
        "mnist": "data: {dataset: mnist}",
    }.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "bytes.yaml").write_bytes(b"\xff\xfe\x00")

    good = trained.best.read_bytes()
    content = torch.load(trained.best, weights_only=True)
    payload = {"state_dict": {}, "config": Payload(folder / "executed")}
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for name, data in {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "cut": good[:-20],
        "flipped": bytes(flipped),
        "text": b"weights\n" * 100,
        "pickle": pickle.dumps(payload),
    }.items():
        (folder / f"{name}.ckpt").write_bytes(data)
    weights = {name: value for name, value in content["state_dict"].items() if name != "net.classifier.5.bias"}
    for name, saved in {
        "tensor": torch.zeros(3),
        "malicious": payload,
        "class": content | {"config": content["config"].replace("models.lenet.LeNet", "os.system")},
        "unexplained": {name: value for name, value in content.items() if name != "config"},
        "incomplete": content | {"state_dict": weights},
        "weightless": content | {"state_dict": {}},
        "null": content | {"state_dict": weights | {"net.classifier.5.bias": None}},
    }.items():
        torch.save(saved, folder / f"{name}.ckpt")
    return folder


def check(answer, folder, expected):
    lines = answer.err.splitlines()
    assert (len(lines), answer.code, answer.out) == (1, 2, ""), answer
    assert lines[0].startswith("train.py: error: ")
    assert expected in lines[0]
    assert len(lines[0]) < 300
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("case", LIGHT)
def test_light_mistakes(case, files, tmp_path):
    line, expected = LIGHT[case]
    check(run(*line.format(files=files).split(), folder=tmp_path), tmp_path, expected)


@pytest.mark.parametrize("case", HEAVY)
def test_heavy_mistakes(case, files, tmp_path):
    line, expected = HEAVY[case]
    line = f"--model lenet --data_dir {DATA} --val_size 200 {line.format(files=files)}"  # a later value wins
    check(run_forked(*line.split(), folder=tmp_path), tmp_path, expected)


@pytest.mark.parametrize("case", CHECKPOINTS)
@pytest.mark.parametrize("subcommand", ["test", "fit"])
def test_checkpoints(case, subcommand, files, tmp_path):
    name, expected = CHECKPOINTS[case]
    answer = run_forked(subcommand, f"--ckpt_path={files / name}", f"--data_dir={DATA}", folder=tmp_path)
    check(answer, tmp_path, expected)
    assert not (files / "executed").exists()


def test_the_malicious_pickle_would_have_been_executed(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.long
def test_heavy_mistakes_in_processes_of_their_own(files, tmp_path):
    """The same end where Python starts from nothing; two at a time."""
    lines = [
        "--model lenet --trainer.max_epoch 3",
        f"--model lenet --data_dir {DATA} --val_size 2000",
        f"test --ckpt_path {files}/malicious.ckpt",
        "--model lenet --model.net.activation tanh",
    ]
    expected = ["--trainer.max_epochs?", "leaves none of", "never holds", "relu or sigmoid"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda line: run(*line.split(), folder=tmp_path), lines))
    for answer, text in zip(answers, expected, strict=True):
        check(answer, tmp_path, text)
    assert not (files / "executed").exists()


def test_no_flipped_bit_passes_unnoticed(trained, tmp_path):
    """Wherever a bit flips, the file is refused or means the same as before."""
    good = trained.best.read_bytes()
    whole = torch.load(trained.best, weights_only=True)
    refused = 0
    for offset in range(7, len(good), len(good) // 150):
        damaged = bytearray(good)
        damaged[offset] ^= 4
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(damaged)
        try:
            content = read_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert content["state_dict"].keys() == whole["state_dict"].keys()
        for name, tensor in whole["state_dict"].items():
            assert torch.equal(content["state_dict"][name], tensor), f"byte {offset} changed {name}"
        assert content["config"] == whole["config"]
    assert refused > 100


def test_a_network_is_measured_on_images_like_those_that_it_was_trained_on(tmp_path):
    """Also where a recipe, which the last run has to be found by, says otherwise."""
    data = [*LENET[2:], "--accelerator=cpu"]
    own = ["--model=small/googlenet", "--image_size=40", "--data.mean=0.4", "--val_size=100"]
    good(run_forked("fit", *data, *FAST, *own, folder=tmp_path))
    best = "logs/small/googlenet/version_0/checkpoints/best.ckpt"
    for subcommand in ("test", "validate"):
        right = good(run_forked(subcommand, f"--ckpt_path={best}", *data[:2], folder=tmp_path))
        for more in ([], ["--model=small/googlenet"]):
            where = "--ckpt_path=last" if more else f"--ckpt_path={best}"
            assert good(run_forked(subcommand, *more, where, *data[:2], folder=tmp_path)) == right
        other = ["--model=small/googlenet", "--ckpt_path=last", "--image_size=32"]
        assert good(run_forked(subcommand, *other, *data[:2], folder=tmp_path)) != right
    (tmp_path / "place.yaml").write_text(yaml.safe_dump({"data": {"data_dir": str(DATA)}}))
    answer = run_forked("fit", "--config=place.yaml", folder=tmp_path)
    assert answer.code == 2 and "no network is named: add --model RECIPE" in answer.err
    assert good(run_forked("validate", f"--ckpt_path={best}", "--config=place.yaml", folder=tmp_path)) == right


def test_pictures_of_ones_own_are_measured_like_those_trained_on(tmp_path):
    """With the recipe as without it: grey ones by a network for colours, in which a class is missing."""
    run = f"--model photos/10min --image_size 32 --data {DATA / 'photos'} --accelerator cpu --max_epochs 1"
    assert run_forked("fit", *run.split(), "--data.fit=pad", folder=tmp_path).code == 0
    for number, picture in enumerate(sorted((DATA / "photos").rglob("*.jpg"))[:3]):
        folder = tmp_path / "grey" / "test" / picture.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        Image.open(picture).convert("L").save(folder / f"{number}.png")
    best = "logs/photos/10min/version_0/checkpoints/best.ckpt"
    measured = [
        run_forked("test", *which.split(), "--data", "grey", "--accelerator=cpu", folder=tmp_path)
        for which in (f"--ckpt_path {best}", "--model photos/10min --ckpt_path last")
    ]
    assert measured[0] == measured[1] and measured[0].code == 0, measured
    command = ["predict", "--model=photos/10min", "--ckpt_path=last", "--images=grey", "--accelerator=cpu"]
    assert run_forked(*command, folder=tmp_path).code == 0


def test_a_folder_in_which_a_process_trains_is_left_to_it(tmp_path):
    run = ["fit", *LENET, *FAST, "--accelerator=cpu"]
    good(run_forked(*run, folder=tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")}
    with FileLock(tmp_path / "logs/lenet/version_0/.lock"):
        answer = run_forked(*run, "--ckpt_path=last", folder=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert "another process is training in logs/lenet/version_0" in answer.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")} == before
    good(run_forked(*run, "--ckpt_path=last", folder=tmp_path))


TRYING = """
import subprocess, sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class Trying(Callback):
    def on_test_start(self, trainer, pl_module):
        lock = "logs/lenet/version_0/.lock"
        code = f"from filelock import FileLock; FileLock({lock!r}, timeout=0).acquire()"
        Path("tried").write_text(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr)
"""


def test_a_folder_whose_run_is_tested_is_left_to_it_too(tmp_path):
    (tmp_path / "trying.py").write_text(TRYING)
    flags = [*LENET, *FAST, "--accelerator=cpu", "--trainer.callbacks+=trying.Trying"]
    assert run_forked(*flags, folder=tmp_path).code == 0
    assert "could not be acquired" in (tmp_path / "tried").read_text()


def test_a_schedule_that_moves_with_the_recipes_batches_is_mentioned(tmp_path):
    run = ["fit", *LENET, *FAST, "--model.scheduler=torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=2"]
    answer = run_forked(*run, folder=tmp_path)
    assert answer.code == 0 and "StepLR moves after each batch" in answer.err
    for interval in ("step", "epoch"):
        good(run_forked(*run, f"--model.scheduler_interval={interval}", folder=tmp_path))


def test_a_setting_that_contradicts_the_checkpoint(trained, tmp_path):
    for line, expected in (
        ("test --image_size 32", "image_size=28, not 32"),
        ("test --model alexnet", "models.lenet.LeNet, not models.alexnet.AlexNet"),
        ("fit --lr 0.1", "lr=0.005, not 0.1"),
        ("fit --max_epochs 5", "max_epochs=3, not 5"),
        ("fit --trainer.limit_val_batches 0", "limit_val_batches=None, not 0; a checkpoint keeps its settings: leave"),
    ):
        answer = run_forked(*line.split(), f"--ckpt_path={trained.best}", f"--data_dir={DATA}", folder=tmp_path)
        check(answer, tmp_path, expected)


def test_a_plain_mistake_is_answered_before_torch_is_imported():
    code = "import sys, train; print(train.main(['--model', 'lenet', '--lr', 'x']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n"


# ---- Signals end a run in good order; a process that dies takes the others with it.

HANGS = 300.0
CONTINUE = re.compile(r"Continue with: python train\.py (.*)")


@pytest.mark.parametrize(
    ("signum", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGUSR1, 143, "SIGUSR1"),
        (signal.SIGHUP, 143, "SIGHUP"),
    ],
)
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_each_signal_saves_and_says_how_to_continue(
    signum: signal.Signals, code: int, name: str, stage: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "run")
    answer = train(folder, "--lr", "0.02", at=[stage, 1, 1, 0], signals=(signum,))
    assert answer.code == code
    assert "Traceback" not in answer.err
    assert f"Stopped by {name}" in answer.err
    assert checkpoint(folder)["global_step"] == (7 if stage == "train" else 10)
    match = CONTINUE.search(answer.err)
    assert match, answer.err
    (folder / "command.json").write_text("{}")
    answer = run_forked(*shlex.split(match[1]), folder=folder)
    assert answer.code == 0, answer.err
    assert checkpoint(folder)["global_step"] == 15
    assert answer.out.count("  lr ") == 2 and "lr 0.00e+00" not in answer.out  # even where an epoch had no step left


@pytest.mark.parametrize(("stage", "signum", "code"), [("test", signal.SIGTERM, 143), ("end", signal.SIGINT, 130)])
def test_a_stop_after_training_says_how_to_test(stage: str, signum: signal.Signals, code: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    (folder / "command.json").write_text(f'{{"at": ["{stage}", 1, 0, 0], "signals": [{int(signum)}]}}')
    answer = run_forked(*flags("--max_epochs", "1")[1:], folder=folder)
    match = CONTINUE.search(answer.err)
    assert answer.code == code and "Training is complete" in answer.err and match, answer
    (folder / "command.json").write_text("{}")
    answer = run_forked(*shlex.split(match[1]), folder=folder)
    assert answer.code == 0 and "Test on" in answer.out, answer


def test_a_stop_after_training_alone_speaks_of_no_test(tmp_path: Path) -> None:
    answer = train(write(tmp_path / "run"), "--max_epochs", "1", at=["trained", 1, 0, 0])
    assert answer.code == 143 and answer.err.endswith("Training is complete.\n"), answer


def test_command_to_continue_works_as_printed(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    answer = train(folder, "--trainer.logger", "true", "--log_dir", "my runs", at=["train", 1, 1, 0])
    match = CONTINUE.search(answer.err)
    assert answer.code == 143 and match, answer.err
    (folder / "command.json").write_text("{}")
    answer = run_forked(*shlex.split(match[1]), folder=folder)
    assert answer.code == 0, answer.err
    assert [path.name for path in (folder / "my runs" / "recipe").iterdir()] == ["version_0"]


def test_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    answer = train(folder, at=["train", 0, 1, 0], signals=(signal.SIGINT, signal.SIGINT))
    assert answer.code == 130
    assert "press Ctrl-C again" in answer.err and "Stopped at once" in answer.err
    assert not (folder / SAVED).exists()


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_is_answered_though_it_has_ended_tee(again: bool, tmp_path: Path) -> None:
    """In `train.py 2>&1 | tee log` tee gets the signal, too."""
    folder = write(tmp_path / "run")
    process = start(folder)
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stderr.close()
    try:
        if again:
            sent_to_sleep(folder, process, 60)
        process.send_signal(signal.SIGINT)
        if again:
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert (checkpoint(folder)["global_step"] == 5) == again


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_testing_ends_at_once(signum: signal.Signals, code: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, "--max_epochs", "1").code == 0
    (folder / "command.json").write_text(f'{{"at": ["test", 0, 1, 0], "signals": [{int(signum)}]}}')
    arguments = ["test", "--model", "recipe.yaml", "--data_dir", str(DATA), "--max_epochs", "1"]
    answer = run_forked(*arguments, "--ckpt_path", "last", folder=folder)
    assert answer.code == code, answer
    assert answer.err.strip().splitlines()[-1].startswith("Stopped by")
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("devices", "signum", "code"),
    [pytest.param(1, signal.SIGTERM, 143, marks=pytest.mark.long), (2, signal.SIGINT, 130)],
)
def test_signal_to_the_whole_group_with_workers(
    devices: int, signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    """As a terminal sends Ctrl-C: to the processes and to the loaders' workers alike."""
    folder = write(tmp_path / "run", num_workers=2)
    process = start(folder, "--devices", str(devices), "--batch_size", str(250 // devices))
    os.killpg(process.pid, signum)
    began = time.monotonic()
    answer = finish(process, timeout=HANGS)
    assert answer.code == code, answer.err
    assert time.monotonic() - began < 30
    assert "Traceback" not in answer.err
    assert answer.err.count("Stopped by") == 1
    assert checkpoint(folder)["global_step"] > 5


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize(
    ("halted", "signals", "code"),
    [
        pytest.param(1, (signal.SIGTERM,), 143, marks=pytest.mark.long),
        (0, (signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_hung_process_can_be_ended(halted: int, signals: tuple[signal.Signals, ...], code: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    process = start(folder, "--devices", "2")
    pids = [process.pid, int(_children(process.pid)[0])]
    os.kill(pids[halted], signal.SIGSTOP)
    time.sleep(1)
    for number in signals:
        os.killpg(process.pid, number)
        time.sleep(1)
    answer = finish(process, timeout=HANGS)
    assert answer.code == (code if halted else -signal.SIGKILL), answer.err
    assert "Traceback" not in answer.err
    assert all(_is_gone(pid) for pid in pids)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize(
    ("signum", "halted"),
    [
        (signal.SIGINT, 0.0),
        (signal.SIGTERM, 0.0),
        (signal.SIGINT, 2.5),  # seconds after which the first process waits for the other, deaf to signals
    ],
)
def test_stop_while_processes_start_leaves_none(signum: signal.Signals, halted: float, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    (folder / "command.json").write_text('{"sleep": 0.2}')
    command = [sys.executable, str(REPO / "train.py"), *flags("--devices", "2")]
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (children := _children(process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    while "libtorch" not in Path(f"/proc/{children[0]}/maps").read_text():  # earlier, Python itself would report SIGINT
        assert process.poll() is None
        time.sleep(0.05)
    if halted:
        os.kill(int(children[0]), signal.SIGSTOP)
        time.sleep(halted)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    if halted:
        os.kill(int(children[0]), signal.SIGCONT)
    answer = finish(process, timeout=HANGS)  # reads until the last process has closed its output
    assert answer.code == (130 if signum == signal.SIGINT else 143), answer.err
    assert "Stopped by " in answer.err and "Traceback" not in answer.err
    assert all(_is_gone(int(pid)) for pid in children)


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """All that is written to it afterwards is an error."""
    folder = write(tmp_path / "run")
    (folder / "command.json").write_text('{"sleep": 0.2, "at": ["train", 1, 0, 0], "signals": []}')
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, str(REPO / "train.py"), *flags()], ENVIRONMENT)
    try:
        end = time.monotonic() + HANGS
        while not (folder / "pid-0").exists():
            assert time.monotonic() < end
            if select.select([terminal], [], [], 0.1)[0]:
                os.read(terminal, 10_000)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert checkpoint(folder)["global_step"] > 5


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_killing_one_process_ends_the_others(victim: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    process = start(folder, "--devices", "2")
    other = int(_children(process.pid)[0])
    began = time.monotonic()
    os.kill(other if victim else process.pid, signal.SIGKILL)
    answer = finish(process, timeout=HANGS)  # reads until the last process has closed its output
    assert time.monotonic() - began < 60
    assert answer.code == (1 if victim else -signal.SIGKILL)
    lines = [line for line in answer.err.splitlines() if "error" in line]
    assert len(lines) == 1, answer.err
    assert f"process {victim} {'was killed by SIGKILL' if victim else 'is gone'}" in lines[0]
    assert "Traceback" not in answer.err
    assert _is_gone(other)
    assert checkpoint(folder)["global_step"] == 5


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, {}, ("auto", 1)),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6"}, {}, (2, 3)),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, {"devices": "2,3"}, ("2,3", 1)),
        ({"SLURM_NTASKS": "1"}, {"devices": "2,"}, ("2,", 1)),
        ({"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, {"devices": 4}, "devices=4"),
        ({"SLURM_NTASKS": "4"}, {}, "not started by srun"),
        ({"SLURM_NTASKS": "1"}, {}, (1, 1)),
        ({"SLURM_NTASKS": "1"}, {"devices": 2}, "devices=2"),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, {"devices": 2}, (2, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}, {}, (2, 2)),
        ({"SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NNODES": "2"}, {}, "every machine"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, {"num_nodes": 2}, "num_nodes=2"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "LOCAL_RANK": "0"}, {}, "SLURM_PROCID is 5"),
        ({"SLURM_NTASKS": "two"}, {}, "SLURM_NTASKS is 'two'"),
    ],
)
def test_launchers_say_how_many_processes_there_are(
    variables: dict, flags: dict, expected: tuple | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]
    own = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE")
    for name in {*found, *own, "LOCAL_RANK", "WORLD_SIZE"}:
        monkeypatch.setenv(name, "")  # so that what is set under test is taken back
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = Namespace(**{"devices": "auto", "num_nodes": 1} | flags)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            take_over_processes(trainer)
    else:
        take_over_processes(trainer)
        assert (trainer.devices, trainer.num_nodes) == expected


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({"RANK": "1"}, [], "RANK is '1'"),
        ({"LOCAL_RANK": "1"}, [], "LOCAL_RANK is '1'"),
        ({"SLURM_PROCID": "1"}, [], "SLURM_PROCID is '1'"),
        ({"LOCAL_RANK": "first"}, [], "LOCAL_RANK is 'first', not a whole number"),
        ({"NODE_RANK": "first"}, ["--num_nodes=2"], "NODE_RANK is 'first'; a whole number"),
        ({"NODE_RANK": "2"}, ["--num_nodes=2"], "NODE_RANK is 2, but of --num_nodes 2 machines the last is 1"),
        ({"MASTER_PORT": "x"}, ["--num_nodes=2"], "MASTER_PORT is 'x'"),
        pytest.param({"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "x"}, ["--devices=2"], "", marks=pytest.mark.slow),
        pytest.param({"NODE_RANK": "1"}, ["--devices=2"], "", marks=pytest.mark.slow),
    ],
)
def test_variables_that_another_job_left(variables: dict, flags: list, expected: str, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "train.py"), *LENET, *FAST, "--accelerator=cpu", *flags]
    environment = ENVIRONMENT | variables
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if expected:
        check(Answer(done.returncode, done.stdout, done.stderr), tmp_path, expected)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun_without_devices(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = [*LENET, *FAST, "--accelerator=cpu", "--trainer.limit_test_batches=1"]
    done = subprocess.run(
        [*command, str(REPO / "train.py"), *more], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.rglob("record.json")
    assert json.loads(record.read_text())["devices"] == 2


def _has_own_disk() -> bool:
    """Whether a process may hide a folder from the others."""
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "-rm", "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _has_own_disk(), reason="needs Linux's mount namespaces (unshare -rm)")
def test_machines_without_a_shared_disk_do_not_test_other_weights(tmp_path: Path) -> None:
    first, second = _two_machines(tmp_path)
    assert "trained, not tested: logs/lenet/version_0/checkpoints/best.ckpt is not on every machine" in first
    assert "trained, not tested" not in second


FAILING = """
import errno
from lightning.pytorch.callbacks import Callback

class Failing(Callback):
    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank:
            raise PermissionError(errno.EACCES, "Permission denied", "notes.txt")
"""


@pytest.mark.slow
@pytest.mark.skipif(not _has_own_disk(), reason="needs Linux's mount namespaces (unshare -rm)")
def test_a_machine_on_which_the_runs_folder_never_was_does_not_miss_it(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING, encoding="utf-8")
    _, second = _two_machines(tmp_path, "--trainer.callbacks+=failing.Failing")
    assert "train.py: error: notes.txt can't be read or written: Permission denied" in second
    assert "was removed" not in second


def _two_machines(folder: Path, *more: str) -> list[str]:
    """What a run on two machines, which fails on both, leaves in standard error; the second has logs of its own."""
    (folder / "logs").mkdir()
    address = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    train = [str(REPO / "train.py"), *LENET, *FAST, "--accelerator=cpu", "--num_nodes=2", *more]
    alone = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs none {folder}/logs && exec "$@"', "-"]
    machines = []
    for number, before in enumerate(([], alone)):
        command = [*before, sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={number}"]
        machines.append(
            subprocess.Popen(
                [*command, *address, *train], cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
            )
        )
    said = [machine.communicate(timeout=600)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], said
    return said


def test_slurm_job_is_saved_and_requeued(tmp_path: Path) -> None:
    """With a stand-in for `scontrol`; Lightning's SLURM environment is the real one."""
    folder = write(tmp_path / "run")
    assert train(folder, "--log_dir", "before", at=FIRST).code == 143
    (folder / "pid-0").unlink()
    begin = ("--ckpt_path", "before/recipe/version_0/checkpoints/last.ckpt")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    process = start(folder, *begin, environment={**job, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"})
    os.kill(process.pid, signal.SIGUSR1)
    answer = finish(process, timeout=HANGS)
    assert answer.code == 143, answer.err
    assert "requeued" in answer.err and "Traceback" not in answer.err
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]
    assert checkpoint(folder)["global_step"] > 5
    whole = write(tmp_path / "whole")
    assert train(whole).code == 0
    # SLURM starts the same command again, and says so: it goes on where it was stopped, not where it first began. It
    # takes neither another job's run for its own nor another command's.
    (folder / "command.json").write_text("{}")
    again = {**ENVIRONMENT, **job, "SLURM_RESTART_COUNT": "1"}
    command = [sys.executable, str(REPO / "train.py"), *flags(*begin)]
    other_job, other_run = again | {"SLURM_JOB_ID": "18"}, [*command, "--stop_at_chance"]
    for number, (words, environment) in enumerate(((command, again), (command, other_job), (other_run, again))):
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=2 * HANGS)
        assert done.returncode == 0, done.stderr
        assert number or "goes on in" not in done.stderr
        assert len(list((folder / SAVED.parents[1]).iterdir())) == 1 + number
    expected, found = checkpoint(whole), checkpoint(folder)
    assert not [d for key in COMPUTED for d in differences(expected[key], found[key], key)]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())
def test_slurm_itself_requeues_the_job(tmp_path: Path) -> None:
    """Two tasks, SIGUSR1, requeue: in the end the weights of the job that nobody stopped."""
    whole, folder = (write(tmp_path / name, batch_size=125) for name in ("whole", "run"))
    (whole / "command.json").write_text("{}")
    (folder / "command.json").write_text('{"sleep": 0.5, "at": ["train", 1, 0, 0], "signals": []}')
    job = "#!/bin/sh\nexec srun --ntasks=2 " + shlex.join(
        [sys.executable, str(REPO / "train.py"), *flags("--devices", "2")]
    )
    (tmp_path / "job").write_text(job + "\n")
    sbatch = ["sbatch", "--parsable", "--ntasks=2", "--requeue", "--open-mode=append", "--output=%x.out"]

    def wait(what: Callable[[], object]) -> None:
        end = time.monotonic() + 3 * HANGS
        while not what():
            assert time.monotonic() < end, [path.read_text() for path in tmp_path.rglob("*.out")]
            time.sleep(0.2)

    with slurm.cluster(tmp_path / "slurm") as cluster:
        environment = {**ENVIRONMENT, **cluster}
        number = slurm.ask(environment, *sbatch, f"--chdir={folder}", str(tmp_path / "job")).strip()

        def has_ended() -> bool:
            # A requeued job waits two minutes unless it is told not to; that is an error until it has stopped.
            slurm.ask(environment, "scontrol", "update", f"JobId={number}", "StartTime=now")
            return not slurm.ask(environment, "squeue", "--noheader")

        wait((folder / "pid-0").exists)
        slurm.ask(environment, "scancel", "--signal=USR1", number)
        wait(lambda: "Stopped by SIGUSR1" in (folder / "job.out").read_text())
        order(folder)
        wait(has_ended)
        assert "Restarts=1" in slurm.ask(environment, "scontrol", "show", "job", number)
        number = slurm.ask(environment, *sbatch, f"--chdir={whole}", str(tmp_path / "job")).strip()
        wait(has_ended)
    assert len(list((folder / SAVED.parents[1]).iterdir())) == 1
    expected, found = checkpoint(whole), checkpoint(folder)
    assert not [d for key in COMPUTED for d in differences(expected[key], found[key], key)]


def _children(pid: int) -> list[str]:
    """The processes of the run that this one has started; not what libraries start for a moment when imported."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):  # it has just ended
            found += [child] if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes() else []
    return found


def _is_gone(pid: int) -> bool:
    """Whether the process has ended, or does within seconds: its output is closed a moment before."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


# ---- A run that is stopped and continued ends with the weights of the uninterrupted run, bit for bit.

# What a continued run must not change: everything that training computes.
AVERAGED = ("current_model_state", "averaging_state")
FIRST, MIDDLE, LAST = ["train", 0, 0, 0], ["train", 1, 2, 0], ["train", 1, 4, 0]
VALIDATION, LAST_OF_ALL = ["validation", 1, 1, 0], ["train", 2, 4, 0]


def stop_and_continue(folder: Path, points: list[list], *flags: str) -> None:
    """Stop at each of the points in turn, then train to the end."""
    more: tuple[str, ...] = ()
    for point in points:
        answer = train(folder, *flags, *more, at=point)
        assert answer.code == 143, (point, answer)
        more = ("--ckpt_path", "last")
    answer = train(folder, *flags, *more)
    assert answer.code == 0, answer.err


@pytest.mark.parametrize(
    ("settings", "flags", "points"),
    [
        ({"ema": True}, (), [FIRST, VALIDATION, LAST_OF_ALL]),
        ({}, ("--data.num_workers", "2"), [FIRST, MIDDLE, LAST, VALIDATION]),
        ({"scheduler": PLATEAU}, (), [LAST, ["validation", 2, 2, 0]]),
        ({"scheduler": PLATEAU, "batch_size": 150}, ("--trainer.val_check_interval", "0.4"), [["train", 1, 6, 0]]),
        ({"scheduler": WATCHING}, (), [FIRST, MIDDLE, VALIDATION, LAST_OF_ALL]),
        ({"val_size": 0}, (), [["train", 0, 5, 0], MIDDLE]),
        ({}, ("--model.optimizer", "optimizers.muon.Muon"), [FIRST, MIDDLE]),
        ({}, ("--trainer.max_steps", "12", "--trainer.max_epochs", "-1"), [LAST, VALIDATION]),
        ({}, ("--trainer.max_steps", "9", "--trainer.max_epochs", "-1"), [MIDDLE]),
        (
            {},
            ("--trainer.accumulate_grad_batches", "2", "--model.checkpoint_activations", "true"),
            [FIRST, MIDDLE, LAST],
        ),
        ({}, ("--trainer.val_check_interval", "0.4"), [["train", 0, 1, 0], ["validation", 1, 0, 0], MIDDLE]),
        (
            {"ema": True},
            ("--trainer.val_check_interval", "0.4", "--trainer.accumulate_grad_batches", "3", "--precision", "64-true"),
            [["validation", 1, 1, 0]],
        ),
        pytest.param(
            {"batch_size": 83},
            ("--devices", "3", "--trainer.val_check_interval", "0.4", "--trainer.accumulate_grad_batches", "3"),
            [["validation", 1, 0, 1]],
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
        (
            {"ema": True, "batch_size": 125},
            ("--devices", "2", "--data.num_workers", "2", "--precision", "32"),
            [["train", 0, 4, 1], ["validation", 1, 0, 1]],
        ),
    ],
    ids=[
        "ema",
        "workers",
        "plateau",
        "plateau of the validation within an epoch",
        "plateau of the training loss",
        "no validation",
        "Muon",
        "max_steps",
        "one step of max_steps left",
        "memory savers",
        "several validations",
        "between two steps, float64",
        "three processes",
        "processes",
    ],
)
def test_continued_run_is_bit_equal(settings: dict, flags: tuple[str, ...], points: list[list], tmp_path: Path) -> None:
    settings = AUGMENTATION | settings
    runs = whole, parts = write(tmp_path / "whole", **settings), write(tmp_path / "parts", **settings)
    answer = train(whole, *flags)
    assert answer.code == 0, answer.err
    stop_and_continue(parts, points, *flags)
    expected, found = checkpoint(whole), checkpoint(parts)
    keys = COMPUTED + (AVERAGED if settings.get("ema") else ())
    assert not [d for key in keys for d in differences(expected[key], found[key], key)]
    if settings.get("val_size") != 0:
        best, found_best = checkpoint(whole, "best"), checkpoint(parts, "best")
        assert not differences(best["state_dict"], found_best["state_dict"])
    uninterrupted, continued = (record(run / SAVED.parent)["epochs"] for run in runs)
    for name in ("train/loss", "train/accuracy", "val/loss"):
        assert [epoch.get(name) for epoch in uninterrupted] == [epoch.get(name) for epoch in continued]
    images = [
        [round(epoch["images_per_second"] * epoch["seconds"]) for epoch in run] for run in (uninterrupted, continued)
    ]
    assert images[0] == images[1]


def test_a_signal_that_comes_twice_at_once_asks_once(tmp_path: Path) -> None:
    """As `timeout` sends it, to process and group; the batch lasts longer than a second request would be waited for."""
    folder = write(tmp_path / "run")
    process = start(folder)
    sent_to_sleep(folder, process, 5)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert finish(process, 60).code == 143
    assert checkpoint(folder)["epoch"] >= 0
    assert (folder / SAVED / "last.ckpt").stat().st_mtime > (folder / "command.json").stat().st_mtime


def test_a_run_whose_time_is_over_says_so(tmp_path: Path) -> None:
    flags = ["fit", *LENET, "--batch_size=4", "--trainer.max_time=00:00:00:02", "--max_epochs=100"]
    assert run_forked(*flags, folder=tmp_path).code == 0
    answer = run_forked(*flags, "--ckpt_path=last", folder=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (0, 1)
    assert "trainer.max_time is over" in answer.err


def test_the_command_that_continues_names_what_started_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Namespace()
    config["data.batch_size"], config["model.optimizer.init_args.lr"] = 64, 0.5
    command = Command(arguments=["--model", "lenet", "--lr", "auto", "--batch_size=auto"])  # found by an earlier start
    rest = "train.py --model lenet --batch_size=64 --lr=0.5 --ckpt_path a.ckpt"
    assert how_to_continue(command, config, Path("a.ckpt")) == f"python {rest}"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert how_to_continue(command, config, Path("a.ckpt")) == f"srun python {rest}"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert how_to_continue(command, config, Path("a.ckpt")) == f"torchrun ... {rest}"


def test_a_file_with_sections_overrides_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("fit: {trainer: {max_epochs: 3}, data: {batch_size: 77}}\n", encoding="utf-8")
    out = good(run_forked("fit", "--model=lenet", "--config=mine.yaml", "--print_config", folder=tmp_path))
    config = yaml.safe_load(out)
    assert (config["trainer"]["max_epochs"], config["data"]["batch_size"]) == (3, 77)
    (tmp_path / "plain.yaml").write_text("{trainer: {max_epochs: 4}, model: {net: models.lenet.LeNet}}\n")
    for names, epochs in ((("mine", "plain"), 4), (("plain", "mine"), 3)):  # the last one wins
        files = [f"--config={name}.yaml" for name in names]
        out = good(run_forked("fit", *files, "--print_config", folder=tmp_path))
        assert yaml.safe_load(out)["trainer"]["max_epochs"] == epochs


def test_own_pictures_continue_bit_equal(tmp_path: Path) -> None:
    """With what turns and scales them, drawn with replacement, weighted by their classes."""
    flags = ["fit", "--model=lenet", f"--data={DATA / 'photos'}", f"--data_dir={tmp_path}"]
    flags += ["--batch_size=8", "--accelerator=cpu", "--max_epochs=3", "--trainer.callbacks+=probe.Probe"]
    flags += ["--data.rotation=20", "--data.zoom=0.2", "--data.shift=0.1", "--data.saturation=0.3"]
    flags += ["--data.balanced=true", "--class_weights"]

    def fit(name: str, *more: str, at: list | None = None) -> int:
        command = {"at": at, "signals": [int(signal.SIGTERM)]}
        (tmp_path / name / "command.json").write_text(json.dumps(command), encoding="utf-8")
        return run_forked(*flags, *more, folder=tmp_path / name).code

    for name in ("whole", "parts"):
        write(tmp_path / name)
    assert fit("whole") == 0
    assert fit("parts", at=["train", 1, 2, 0]) == 143
    assert fit("parts", "--ckpt_path=last") == 0
    expected, found = (
        torch.load(tmp_path / name / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "parts")
    )
    assert expected["epoch"] == 2
    assert not [d for key in COMPUTED for d in differences(expected[key], found[key], key)]


@pytest.mark.slow
def test_two_processes_train_on_own_pictures(tmp_path: Path) -> None:
    common = [f"--data={DATA / 'photos'}", f"--data_dir={tmp_path}", "--accelerator=cpu"]
    flags = ["--model=lenet", "--batch_size=8", "--max_epochs=1", "--precision=32", "--devices=2"]
    answer = run(*flags, *common, folder=tmp_path)
    assert answer.code == 0 and "Traceback" not in answer.err, answer
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    found = record(tmp_path / "logs/lenet/version_0")
    assert (found["devices"], found["train_images"], found["test"]["images"]) == (2, 40, 16)
    best = tmp_path / "logs/lenet/version_0/checkpoints/best.ckpt"
    one = run_forked("test", f"--ckpt_path={best}", *common, folder=tmp_path)
    assert f"accuracy {found['test']['accuracy']:.4f}, loss {found['test']['loss']:.4f}" in one.out


@pytest.mark.slow
def test_two_processes_train_in_the_folder_of_the_pictures(tmp_path: Path) -> None:
    """The one looks for classes when the other may have made a folder for the run."""
    folder = shutil.copytree(DATA / "photos" / "train", tmp_path / "own")
    flags = ["--model=lenet", "--batch_size=8", "--max_epochs=1", "--precision=32", "--devices=2", "--data=."]
    for number in range(2):
        answer = run(*flags, "--accelerator=cpu", folder=folder)
        assert answer.code == 0 and "Traceback" not in answer.err, answer
        names = record(folder / f"logs/lenet/version_{number}")["config"]["data"]["class_names"]
        assert names == ["dress", "hat", "pants", "shoes"]


REFUSING = """
from lightning.pytorch.callbacks import Callback
from errors import UserError

class Refusing(Callback):
    def setup(self, trainer, pl_module, stage):
        raise UserError("not today")
"""


@pytest.mark.parametrize("recipe", ["lenet", "small/googlenet"])
def test_a_run_that_is_refused_in_setup_leaves_nothing(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(REFUSING, encoding="utf-8")
    run = [f"--model={recipe}", *LENET[2:], "--accelerator=cpu", "--trainer.callbacks+=refusing.Refusing"]
    before = {*tmp_path.iterdir(), tmp_path / "__pycache__"}
    for others in ([], ["logs/mine"]):
        for folder in others:
            (tmp_path / folder).mkdir(parents=True)
        answer = run_forked(*run, folder=tmp_path)
        assert answer.code == 2 and answer.err.endswith("not today\n"), answer
        left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("logs/**/*")]
        assert left == others and set(tmp_path.iterdir()) - before == {tmp_path / "logs" for _ in others}


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


@pytest.mark.parametrize("often", [(), ("--trainer.check_val_every_n_epoch=2",)])
def test_continuing_from_an_epochs_end_is_bit_equal(often: tuple[str, ...], tmp_path: Path) -> None:
    """As after `kill -9`: the checkpoint is the one that each epoch leaves."""
    whole, parts = write(tmp_path / "whole", scheduler=PLATEAU), write(tmp_path / "parts", scheduler=PLATEAU)
    assert train(whole, *often).code == 0
    assert train(parts, *often, at=["train", 2, 0, 0], signals=(signal.SIGKILL,)).code == -signal.SIGKILL
    answer = train(parts, *often, "--ckpt_path", "last")
    assert answer.code == 0, answer.err
    expected, found = checkpoint(whole), checkpoint(parts)
    assert expected["lr_schedulers"][0]["last_epoch"] == (1 if often else 3)  # it has seen each validation, once
    assert not [d for key in COMPUTED for d in differences(expected[key], found[key], key)]
    epochs = record(parts / SAVED.parent)["epochs"]
    assert [epoch["seconds"] > 0 for epoch in epochs] == 3 * [True] and "val/accuracy" in epochs[1]


def test_a_stop_before_training_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, at=["fit", 0, 0, 0]).code == 143
    assert not list(folder.rglob("record.json"))
    assert train(folder, at=MIDDLE).code == 143
    (run,) = (path.parent for path in folder.rglob("record.json"))
    before = record(run)
    assert train(folder, "--ckpt_path", "last", at=["fit", 0, 0, 0]).code == 143
    assert record(run) == before and len(before["epochs"]) == 1


@pytest.mark.slow
@pytest.mark.long
def test_a_stop_waits_for_the_batches_that_are_accumulated(tmp_path: Path) -> None:
    """However long they take together: much longer than one."""
    folder = write(tmp_path / "run", batch_size=20)
    command = {"at": ["train", 0, 20, 0], "signals": [signal.SIGTERM], "sleep": 0.8}
    (folder / "command.json").write_text(json.dumps(command))
    answer = run_forked(*flags("--trainer.accumulate_grad_batches", "20"), folder=folder)
    assert answer.code == 143 and "Saved: " in answer.err, answer


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
    (key,) = (key for key in after["callbacks"] if "val/accuracy" in key and key.startswith("RunCheckpoint"))
    best, path = (after["callbacks"][key][name] for name in ("best_model_score", "best_model_path"))
    assert best >= before["callbacks"][key]["best_model_score"]
    assert Path(path) == saved.with_name("best.ckpt")
    assert len(after["callbacks"][key]["best_k_models"]) == 1


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, at=FIRST).code == 143
    answer = train(folder, "--devices", "2", "--ckpt_path", "last")
    assert answer.code == 2
    assert len(answer.err.strip().splitlines()) == 1 and "trained by one process, not 2" in answer.err
    assert checkpoint(folder)["global_step"] == 1


def test_probe_sees_a_difference() -> None:
    """The comparison itself can fail."""
    state = {"a": torch.zeros(2), "b": [1, {"c": torch.ones(1)}]}
    other = {"a": torch.zeros(2), "b": [1, {"c": torch.ones(1) + 1e-7}]}
    assert differences(state, other) == [".b.1.c"]
    assert differences(state, state) == []


# ---- Freed memory is kept, out of memory is one line with advice, and the largest batch that fits can be found.

FIND_BATCH_SIZE = ("--data_dir", str(DATA), "--val_size", "200", "--max_epochs", "1", "--accelerator", "cpu")


FAULTS = """
import json, resource
from pathlib import Path
from typing import Any
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
        *("fit", "--model", "vgg11_small", *FIND_BATCH_SIZE, *size, "--trainer.callbacks+=faults.Faults"),
        folder=tmp_path,
    )
    assert answer.code == 0, answer
    counts = json.loads((tmp_path / "faults.json").read_text())
    # What happens once, such as a collection of garbage, falls into one of two windows of five steps.
    pages = min(counts[-1] - counts[-6], counts[-6] - counts[-11])
    # The largest of many tensors, after the first convolution, has 16 * 8 * 128 * 128 * 4 bytes: 2,048 pages of 4 KB.
    assert pages < 2048, pages


@pytest.mark.parametrize(
    ("model", "subcommand"), [("googlenet", "fit"), ("lenet", "fit")], ids=["in training", "while the network is built"]
)
def test_out_of_memory_names_sizes_and_what_to_try(model: str, subcommand: str, tmp_path: Path) -> None:
    sizes = ("--batch_size", "1200", "--image_size", "20000")  # hundreds of gigabytes
    flags = ("--model", model, *FIND_BATCH_SIZE, *sizes)
    answer = run_forked(subcommand, *flags, folder=tmp_path, prepare=_little_memory)
    assert answer.code == 1, answer
    lines = answer.err.strip().splitlines()
    assert len(lines) == 1, answer.err
    assert "out of memory with batches of 1,200 images of 20000x20000" in lines[0]
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
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_largest_batch_size_is_bounded_by_most() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.Adam(net.parameters())
    size = largest_batch_size(net, lambda: optimizer, (1, 28, 28), torch.device("cpu"), None, most=100)
    assert size == 64


@pytest.mark.parametrize(("free", "processes"), [(1 << 20, 1), (1 << 40, 1 << 20)])
def test_largest_batch_size_shrinks_with_memory(free: int, processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.memory._free", lambda device: free)
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 10))
    optimizer = torch.optim.Adam(net.double().parameters())
    size = largest_batch_size(net, lambda: optimizer, (1, 28, 28), torch.device("cpu"), None, 8192, processes)
    assert size < 8192


def _no_trial() -> None:
    def refuse(*arguments: Any) -> None:
        raise UserError(f"{arguments[-1]} processes share the memory")

    launch.found.largest_batch_size = refuse  # type: ignore[assignment]


def test_batch_size_auto_knows_how_many_processes_share_the_memory(tmp_path: Path) -> None:
    flags = (*FIND_BATCH_SIZE, "--batch_size=auto", "--devices=2")
    answer = run_forked("fit", "--model=lenet", *flags, folder=tmp_path, prepare=_no_trial)
    assert "2 processes share the memory" in answer.err


@pytest.mark.parametrize(
    ("kind", "names", "no_limit", "statistics"),
    [
        ("", ("memory.max", "memory.current"), "max", "anon 9\ninactive_file 100\n"),
        # Whose own part leaves out the groups within.
        (
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            "9223372036854771712",
            "inactive_file 1\ntotal_inactive_file 100\n",
        ),
    ],
    ids=["version 2", "version 1"],
)
@pytest.mark.parametrize("seen", ["/host/job/step", "/job/step"])  # the first from within a container
def test_control_groups_limit_the_free_memory(
    kind: str, names: tuple[str, str], no_limit: str, statistics: str, seen: str, tmp_path: Path
) -> None:
    """Those of containers and of a cluster's jobs, which may lie within each other."""
    limited = tmp_path / "sys" / kind / ("job" if seen == "/job/step" else "")
    for group, limit, used in ((limited, "1000", 400), (limited / "step", no_limit, 300)):
        group.mkdir(parents=True)
        for name, text in zip((*names, "memory.stat"), (f"{limit}\n", f"{used}\n", statistics), strict=True):
            (group / name).write_text(text)
    own = tmp_path / "cgroup"
    own.write_text(f"3:cpu,cpuacct:/other\n2:name=systemd:/other\n1:{kind}:{seen}\n")
    assert min(_free_of_groups(own, tmp_path / "sys")) == 1000 - 400 + 100
    assert [*_free_of_groups(tmp_path / "none", tmp_path / "sys")] == [math.inf]


@pytest.mark.parametrize(
    ("given", "size", "reason"),
    [(4, 8, "leaves 100 steps an epoch"), (48, 32, "is not above the recipe's 48")],  # of 800 images
)
def test_batch_size_auto_leaves_steps_enough(given: int, size: int, reason: str, tmp_path: Path) -> None:
    """And the run starts from the same weights as with that size given."""
    folders = [tmp_path / "auto", tmp_path / "given"]
    for folder, sizes in zip(
        folders, ((f"--data.batch_size={given}", "--batch_size=auto"), (f"--batch_size={size}",)), strict=True
    ):
        folder.mkdir()
        answer = run_forked("fit", "--model", "lenet", *FIND_BATCH_SIZE, *sizes, folder=folder)
        assert answer.code == 0, answer.err
        if folder.name == "auto":
            assert f"Batch size {size}: the largest power of two that {reason}" in answer.out
            assert f"the one for batches of {given}; --lr auto finds one for {size}" in answer.out
    runs = [folder / "logs" / "lenet" / "version_0" for folder in folders]
    assert yaml.safe_load((runs[0] / "config.yaml").read_text(encoding="utf-8"))["data"]["batch_size"] == size
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_batch_size_auto_tries_an_optimizer_that_needs_the_loss_several_times(tmp_path: Path) -> None:
    flags = ("--model.optimizer=LBFGS", "--model.scheduler=null", "--trainer.limit_train_batches=1")
    answer = run_forked("fit", "--model=lenet", *FIND_BATCH_SIZE, *flags, "--batch_size=auto", folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert "Batch size 128: the largest power of two" in answer.out


def test_batch_size_auto_is_for_new_runs(tmp_path: Path) -> None:
    answer = run_forked("--model", "lenet", "--batch_size", "auto", "--ckpt_path", "x.ckpt", folder=tmp_path)
    assert answer.code == 2
    assert "a checkpoint keeps its batch size" in answer.err


# ---- `--lr auto`: the rate that is found, the run that follows, and what is left of the search.

FIND_LR = ("fit", "--model", "lenet", "--data_dir", str(DATA), "--val_size", "200", "--accelerator", "cpu")


def find_and_train(*flags: str, folder: Path) -> Answer:
    folder.mkdir(exist_ok=True)
    return run_forked(*FIND_LR, "--max_epochs", "2", *flags, folder=folder)


def rate_in_config(folder: Path) -> float:
    config = yaml.safe_load((folder / "logs/lenet/version_0/config.yaml").read_text(encoding="utf-8"))
    return config["model"]["optimizer"]["init_args"]["lr"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("found")
    answer = find_and_train("--lr", "auto", folder=folder)
    assert answer.code == 0, answer.err
    assert f"Learning rate {rate_in_config(folder):g}: a tenth of that with the lowest loss" in answer.out
    assert answer.err == ""  # no bar of the finder's
    return folder


def test_the_run_is_that_of_the_rate_given(found: Path, tmp_path: Path) -> None:
    assert find_and_train("--lr", str(rate_in_config(found)), folder=tmp_path).code == 0
    path = "logs/lenet/version_0/checkpoints/last.ckpt"
    first, second = (torch.load(folder / path, weights_only=True) for folder in (found, tmp_path))
    assert first["config"] == second["config"]
    assert first["lr_schedulers"] == second["lr_schedulers"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_curve_lies_beside_the_run_and_nothing_else_is_left(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    plot(Curve(**curve), run / "again.png")
    (axes,) = drawn[0].axes
    left, right = axes.get_xlim()
    assert curve["rates"][20] < left < curve["learning_rate"] < lowest < right  # without the flat part
    assert any(list(line.get_xdata()) == [lowest] for line in axes.lines)
    assert [path.name for path in found.iterdir()] == ["logs"]
    assert sorted(path.name for path in found.rglob("*.ckpt")) == ["best.ckpt", "last.ckpt"]


def test_a_run_can_be_continued_with_the_rate_found(found: Path) -> None:
    flags = ["--lr", "auto", "--max_epochs=2"]
    _replace(flags, "--lr", rate_in_config(found))
    assert flags == ["--max_epochs=2", f"--lr={rate_in_config(found)}"]
    answer = find_and_train("--ckpt_path", "last", *flags, folder=found)
    assert answer.code == 0, answer.err


def test_a_rate_is_found_where_gradients_are_clipped_in_mixed_precision(tmp_path: Path) -> None:
    flags = ("--trainer.gradient_clip_val", "1", "--precision", "bf16-mixed", "--max_epochs", "1", "--batch_size", "32")
    answer = find_and_train("--lr", "auto", *flags, folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert "Clipping gradients in bf16-mixed: AdamW runs without its fused kernel" in answer.out


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_train_with_one_rate(tmp_path: Path) -> None:
    answer = find_and_train("--lr", "auto", "--devices", "2", folder=tmp_path)
    assert answer.code == 0, answer.err
    assert answer.out.count("Learning rate") == 1
    first = torch.load(tmp_path / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    other = tmp_path / "given"
    assert find_and_train("--lr", str(rate_in_config(tmp_path)), "--devices", "2", folder=other).code == 0
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
        (("--model.net", "torch.nn.Flatten"), "torch.nn.Flatten, which has nothing to train"),
        (("--model.net", "torch.nn.LazyLinear", "--model.net.out_features", "10"), "LazyLinear has lazy layers"),
        (("--model.optimizer", "torch.optim.LBFGS"), "--lr auto can't find a rate for LBFGS"),
        (("--model.optimizer", "Rprop", "--batch_size", "auto"), "--lr auto can't find a rate for Rprop"),
        (("--model.optimizer", "torch.optim.SparseAdam"), "SparseAdam can't be used with these settings"),
        (("--trainer.strategy", "mine"), "invalid strategy name"),
    ],
)
def test_mistakes_are_one_line(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    answer = find_and_train("--lr", "auto", *flags, folder=tmp_path)
    assert answer.code == 2, answer
    assert message in answer.err
    assert len(answer.err.strip().splitlines()) == 1, answer.err
    assert not (tmp_path / "logs").exists()


class Slope(pl.LightningModule):
    """Its loss falls at any rate, and its batches have losses of their own; notes the rate of each step."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.losses, self.scheduler = losses, "none"
        self.rates: list[float] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=123.0)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.losses[len(self.rates)] + self.weight * 0 + batch.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Numbers(pl.LightningDataModule):
    """Batches of one number each: -1, 0, 1, -1, 0, 1, ..., whose losses average to that of the step."""

    train_set, batch_size = [-1.0, 0.0, 1.0] * 4, 1

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_set)  # type: ignore[arg-type]  # a list is a data set too


def search(losses: list[float]) -> tuple[Slope, Any]:
    """`--lr auto` on steps of three batches, with these losses."""
    model, state = Slope(losses), torch.get_rng_state()
    try:
        return model, find_learning_rate(model, Numbers(), torch.device("cpu"), 3, accelerator="cpu")
    finally:
        assert torch.equal(state, torch.get_rng_state())


def test_each_step_of_the_search_is_taken_at_the_rate_and_has_the_loss_that_it_says() -> None:
    losses = [2.0] * 60 + [1.0] * 20 + [1.5] * (STEPS - 80)
    model, curve = search(losses)
    assert curve.rates == model.rates == pytest.approx([10 ** (-8 + 0.08 * (step + 1)) for step in range(STEPS)])
    assert curve.losses[:60] == pytest.approx([2.0] * 60)  # smoothing keeps a constant
    assert curve.losses[60:62] == pytest.approx([1.9, 1.81], abs=2e-3)
    assert curve.learning_rate == float(f"{curve.rates[79] / 10:.3g}")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 50.0])
def test_the_search_ends_where_the_loss_explodes(bad: float) -> None:
    _, curve = search([2.0] * 40 + [1.0] * 20 + [bad] * (STEPS - 60))
    assert len(curve.losses) == len(curve.rates) < 65
    assert curve.learning_rate == float(f"{curve.rates[59] / 10:.3g}")


@pytest.mark.parametrize("losses", [[2.0] * STEPS, [math.nan] * STEPS, [2.0, *[3.0] * STEPS]])
def test_a_search_without_a_fall_is_refused(losses: list[float]) -> None:
    with pytest.raises(UserError, match="no learning rate made the loss fall"):
        search(losses)


# ---- Everything that Lightning and PyTorch offer: it works, or is refused in one line before anything runs.

SAMPLE = ["--model=lenet", f"--data_dir={DATA}", "--val_size=100", "--accelerator=cpu", "--batch_size=32"]
SHORT = ["--max_epochs=1", *(f"--trainer.limit_{stage}_batches=3" for stage in ("train", "val", "test"))]
OPTIMIZERS = {  # flags, and what the refusal says where there is one
    "ASGD": "",
    "Adadelta": "",
    "Adafactor": "",
    "Adagrad": "",
    "Adam": "--model.optimizer.fused false --model.optimizer.foreach true",
    "AdamW": "--model.optimizer.fused true",
    "Adamax": "",
    "LBFGS": "",
    "Muon": "! Muon only supports 2D parameters",
    "NAdam": "",
    "Optimizer": "! defaults",
    "RAdam": "",
    "RMSprop": "",
    "Rprop": "",
    "SGD": "--lr 0.1 --model.optimizer.momentum 0.9 --model.optimizer.nesterov true",
    "SparseAdam": "! does not support dense gradients",
}
SCHEDULERS = {
    "ChainedScheduler": "! is made of other schedules",
    "ConstantLR": "",
    "CosineAnnealingLR": "T_max=-1",
    "CosineAnnealingWarmRestarts": "T_0=2",
    "CyclicLR": "base_lr=0.001 max_lr=0.1 step_size_up=2 cycle_momentum=false",
    "ExponentialLR": "gamma=0.9",
    "LRScheduler": "! NotImplementedError",
    "LambdaLR": "lr_lambda=mine.half",
    "LinearLR": "total_iters=-1",
    "MultiStepLR": "milestones=[1,2]",
    "MultiplicativeLR": "lr_lambda=mine.half",
    "OneCycleLR": "max_lr=0.01",
    "PolynomialLR": "total_iters=-1",
    "ReduceLROnPlateau": "epoch",
    "SequentialLR": "! is made of other schedules",
    "StepLR": "step_size=2",
    "_LRScheduler": "! NotImplementedError",
}
OF_THE_USERS = """
import hashlib, json, time
from lightning.pytorch import Callback
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LinearLR, LRScheduler, SequentialLR, StepLR

def half(step):
    return 0.5

def stepped(optimizer) -> LRScheduler:
    return StepLR(optimizer, 1)

def steady(parameters) -> Optimizer:
    return SGD(parameters, lr=0.01)

class Both(SequentialLR):
    def __init__(self, optimizer):
        super().__init__(optimizer, [LinearLR(optimizer, 0.1, total_iters=2), ConstantLR(optimizer, 1.0)], [2])

class Note(Callback):
    def note(self, **values):
        with open("notes.jsonl", "a") as file:
            file.write(json.dumps(values) + "\\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        images = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch[0]]
        self.note(epoch=trainer.current_epoch, images=images)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        gradients = [weight.grad.float() for weight in pl_module.parameters()]  # as the optimiser has used them
        total = sum(float(gradient.square().sum()) for gradient in gradients)
        self.note(norm=total**0.5, largest=max(float(gradient.abs().max()) for gradient in gradients))

    def on_train_epoch_start(self, trainer, pl_module):
        accuracy = trainer.callback_metrics.get("val/accuracy")
        self.note(rate=trainer.optimizers[0].param_groups[0]["lr"], accuracy=accuracy and float(accuracy))

class Slow(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(3 if trainer.current_epoch else 0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(OF_THE_USERS, encoding="utf-8")
    return tmp_path


def works(*flags: str, folder: Path) -> Answer:
    answer = run_forked(*SAMPLE, *SHORT, *flags, folder=folder)
    assert answer.code == 0 and "Traceback" not in answer.err, answer
    return answer


def refused(*flags: str, folder: Path) -> str:
    """The one line."""
    answer = run_forked(*SAMPLE, *SHORT, *flags, folder=folder)
    assert answer.code == 2, answer
    (line,) = answer.err.splitlines()
    assert not list(folder.rglob("*.ckpt")) and not list(folder.rglob("record.json"))
    return line


def notes(folder: Path, key: str) -> list:
    lines = map(json.loads, (folder / "notes.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if key in line]


def classes(module, base: type) -> set[str]:
    return {name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}


def test_every_optimizer_and_scheduler_is_sorted() -> None:
    """A class that a later PyTorch brings has to be put into the tables, and so be tried."""
    assert classes(torch.optim, torch.optim.Optimizer) <= set(OPTIMIZERS)
    assert classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler) <= set(SCHEDULERS)


def _offered(table: dict[str, str], module) -> list[str]:
    return [name for name in table if hasattr(module, name)]  # an older PyTorch has no Muon


OFFERED = _offered(OPTIMIZERS, torch.optim), _offered(SCHEDULERS, torch.optim.lr_scheduler)


@pytest.mark.parametrize("name", [name for name in OFFERED[0] if OPTIMIZERS[name].startswith("!")])
def test_an_optimizer_that_cannot_train_is_one_line(name: str, folder: Path) -> None:
    line = refused("--model.optimizer", f"torch.optim.{name}", folder=folder)
    assert name in line and OPTIMIZERS[name].removeprefix("! ") in line


@pytest.mark.parametrize("name", [name for name in OFFERED[1] if SCHEDULERS[name].startswith("!")])
def test_a_schedule_that_cannot_be_made_is_one_line(name: str, folder: Path) -> None:
    line = refused("--model.scheduler", f"torch.optim.lr_scheduler.{name}", folder=folder)
    assert name.lstrip("_") in line and SCHEDULERS[name].removeprefix("! ") in line


GOOD = [
    [name for name in names if not table[name].startswith("!")]
    for names, table in zip(OFFERED, (OPTIMIZERS, SCHEDULERS), strict=True)
]


@pytest.mark.parametrize(("optimizer", "scheduler"), [*itertools.zip_longest(*GOOD)])
def test_every_other_optimizer_and_schedule_trains(optimizer: str | None, scheduler: str | None, folder: Path) -> None:
    flags = []
    if optimizer:
        flags += ["--model.optimizer", f"torch.optim.{optimizer}", *OPTIMIZERS[optimizer].split()]
    if scheduler:
        flags += ["--model.scheduler", f"torch.optim.lr_scheduler.{scheduler}"]
        settings = SCHEDULERS[scheduler].split()
        flags += [f"--model.scheduler.{setting}" for setting in settings if "=" in setting]
        flags += ["--model.scheduler_interval=epoch"] if "epoch" in settings else []
    works("fit", *flags, folder=folder)
    checkpoint = torch.load(folder / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in checkpoint["state_dict"].values())


def test_a_schedule_made_of_schedules_in_a_file_of_the_users(folder: Path) -> None:
    """What the refusal advises."""
    flags = (
        "--model.optimizer",
        "torch.optim.SGD",
        "--lr=0.1",
        "--model.scheduler=mine.Both",
        "--trainer.callbacks=mine.Note",
    )
    works("fit", *flags, "--model.scheduler_interval=epoch", "--max_epochs=4", folder=folder)
    assert [line["rate"] for line in notes(folder, "rate")] == pytest.approx([0.01, 0.055, 0.1, 0.1])


@pytest.mark.parametrize(
    "flags",
    [
        "--model.scheduler=mine.stepped --model.scheduler_interval=step --lr=0.01",
        "--model.optimizer=mine.steady --model.scheduler_interval=epoch",
        "--model.optimizer=mine.steady --batch_size=auto",
    ],
)
def test_an_optimizer_or_a_schedule_that_a_function_makes_trains(flags: str, folder: Path) -> None:
    works("fit", *flags.split(), folder=folder)


def test_the_rate_of_an_optimizer_that_a_function_makes_is_its_own(folder: Path) -> None:
    assert "--lr auto needs a class" in refused("--model.optimizer=mine.steady", "--lr=auto", folder=folder)


@pytest.mark.parametrize("mode", ["", "max"])
def test_watching_an_accuracy_fall_is_mentioned(mode: str, folder: Path) -> None:
    """As is done where the mode is left out."""
    watching = "{monitor: val/accuracy" + (f", mode: {mode}}}" if mode else "}")
    callbacks = [f"{{class_path: {name}, init_args: {watching}}}" for name in ("EarlyStopping", "ModelCheckpoint")]
    schedule = [
        "lightning.pytorch.cli.ReduceLROnPlateau",
        ".monitor=val/accuracy",
        *([f".mode={mode}"] if mode else []),
    ]
    flags = [f"--model.scheduler{'' if part[0] == '.' else '='}{part}" for part in schedule]
    flags += ["--model.scheduler_interval=epoch", f"--trainer.callbacks=[{', '.join(callbacks)}]"]
    err = works("fit", *flags, folder=folder).err
    owners = re.findall(r"(\S+) takes a rising val/accuracy for worse: its mode is min; set mode max", err)
    assert sorted(owners) == ([] if mode else ["EarlyStopping", "ModelCheckpoint", schedule[0]])


# Every argument of Lightning's Trainer: values that work, together in one run where they don't touch each other (a test
# below looks closer at what those in brackets do), or what is said where a value is refused.
TOGETHER = """
accelerator=cpu devices=1 num_nodes=1 strategy=ddp precision=bf16-mixed logger=true (callbacks=mine.Note) min_epochs=1
max_steps=5 min_steps=2 max_time=00:01:00:00 limit_train_batches=4 limit_val_batches=0.5 limit_test_batches=3
limit_predict_batches=1 val_check_interval=2 check_val_every_n_epoch=1 num_sanity_val_steps=1 log_every_n_steps=2
enable_checkpointing=true enable_progress_bar=true enable_model_summary=true accumulate_grad_batches=2
(gradient_clip_val=1) gradient_clip_algorithm=value deterministic=true benchmark=false inference_mode=false
use_distributed_sampler=true detect_anomaly=true plugins=[LightningEnvironment] sync_batchnorm=true
reload_dataloaders_every_n_epochs=1 enable_autolog_hparams=false model_registry=mine max_epochs=2
"""
APART = ("fast_dev_run=2", "(overfit_batches=2)", "(profiler=simple)")
NOT_HERE = {
    **({} if torch.cuda.is_available() else {"accelerator=cuda": "finds no such device"}),
    "accumulate_grad_batches=0": "at least 1",
    "barebones=true": "leave it out",
    "check_val_every_n_epoch=0": "at least 1",
    "callbacks=BackboneFinetuning": "FreezeFeatures",
    "callbacks=BatchSizeFinder": "--batch_size auto",
    "callbacks=LearningRateFinder": "--lr auto",
    "callbacks=[{class_path: EarlyStopping, init_args: {monitor: val_loss}}]": "did you mean val/loss?",
    "callbacks=SpikeDetection": "which always runs",
    "callbacks=[{class_path: StochasticWeightAveraging, init_args: {swa_lrs: 0.01}}]": "callbacks.ema.EMA",
    "callbacks=[{class_path: ModelPruning, init_args: {pruning_fn: l1_unstructured}}]": "--model.channels_last false",
    "default_root_dir=mine": "--log_dir",
    "gradient_clip_algorithm=mine --trainer.gradient_clip_val=1": "gradient_clip_algorithm",
    "gradient_clip_val=.nan": "gradient_clip_val=nan",
    "gradient_clip_val=-1": "at least 0",
    "limit_test_batches=0.01": "limit_test_batches=0.01 is less than a batch",
    "limit_train_batches=0": "leaves nothing to fit",
    "limit_train_batches=0.01": "limit_train_batches=0.01 is less than a batch",
    "limit_val_batches=0.01 --val_size=200": "limit_val_batches=0.01 is less than a batch",
    "max_steps=0": "leaves nothing to fit",
    "max_time=bogus": "trainer.max_time=bogus is not valid",
    "log_every_n_steps=0": "at least 1",
    "max_epochs=-1": "this run has no end",
    "overfit_batches=0.01": "overfit_batches=0.01 is less than a batch",
    "precision=mine": "precision",
    "profiler=mine": "profiler",
    "profiler=xla": "torch_xla",
    "strategy=ddp_fork --devices=2": "ddp_fork",
    "strategy=ddp_notebook --devices=2": "ddp_notebook",
    "strategy=ddp_spawn --devices=2": "set --trainer.strategy ddp",
    "strategy=fsdp": "fsdp",
    "sync_batchnorm=true --devices=2 --model.net=mine.Normed": "sync_batchnorm",
    "val_check_interval=0": "must be above 0; --val_size 0 trains without validation",
    "val_check_interval=10000": "3 training batches",
    "val_check_interval=00:00:00:10 --devices=2": "can't be a time with several processes",
}


def test_every_argument_of_the_trainer_is_sorted() -> None:
    sorted_in = " ".join([TOGETHER, *APART, *NOT_HERE])
    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments <= set(re.findall(r"(\w+)=", sorted_in))


def trainer_flags(text: str) -> list[str]:
    return [f"--trainer.{setting.strip('()')}" for setting in text.split()]


def test_arguments_of_the_trainer_work_together(folder: Path) -> None:
    answer = works("--val_size=200", *trainer_flags(TOGETHER), folder=folder)
    assert (run := record(folder / "logs/lenet/version_0"))["precision"] == "bf16-mixed"
    # Half of the 7 batches of validation are 3; of the training and the test 4 and 3 batches of 32 were asked for.
    assert [run[name] for name in ("train_images", "val_images")] == [128, 96]
    assert run["test"]["images"] == 96 and "Test on 96 images" in answer.out
    assert len(run["epochs"]) == 2 and "Clipping gradients in bf16-mixed" in answer.out


@pytest.mark.parametrize("setting", NOT_HERE)
def test_an_argument_of_the_trainer_that_cannot_work_is_one_line(setting: str, folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    flags = [f"--trainer.{setting}"] if "{" in setting else f"--trainer.{setting}".split()
    assert NOT_HERE[setting] in refused(*flags, folder=folder)


OTHER_NETWORKS = """
from typing import Optional
from urllib.request import urlopen

from models import LeNet
from torch import nn

class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))

class Empty(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]

class Fetching(nn.Linear):  # as torchvision's with weights=DEFAULT, offline
    def __init__(self):
        urlopen("http://127.0.0.1:1/weights.pth")

class Failing(nn.Linear):
    def __init__(self, early=True):
        super().__init__(784, 10)
        self.early = early and {}["width"]

    def forward(self, images):
        return super().forward(images.flatten(1)) * {}["scale"]

class WithMore(nn.Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass

class Dropping(nn.Sequential):
    def __init__(self, dropout: Optional[float] = 0.5, width=None, bias=True):
        super().__init__(nn.Flatten(), nn.Dropout(dropout or 0), nn.Linear(784, 10, bias=bias is None))

class Longer(LeNet):
    def __init__(self, extra: int = 1, **kwargs):
        super().__init__(**kwargs)

class Outer:
    class Inner(LeNet):
        pass

class Spare(LeNet):
    def __init__(self, image_size: int = 28):
        super().__init__(image_size=image_size)
        self.spare = nn.Linear(1, 1)

made = LeNet()
"""


@pytest.mark.parametrize(
    "settings",
    [
        "check_val_every_n_epoch=5",
        "val_check_interval=2",
        "val_check_interval=4 --trainer.check_val_every_n_epoch=null",
        "val_check_interval=00:00:00:01",
    ],
)
def test_the_last_checkpoint_is_the_end_of_training(settings: str, folder: Path) -> None:
    works("--val_size=200", "--max_epochs=2", *f"--trainer.{settings}".split(), folder=folder)
    last = torch.load(folder / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 6


STANDSTILL = "monitor: val/accuracy, mode: max, min_delta: 9"  # no accuracy is so much better
AT_ONCE = "val_check_interval={microseconds: 1}"  # after each step


def watching(callback: str, settings: str) -> str:
    return f"--trainer.callbacks=[{{class_path: {callback}, init_args: {{{settings}}}}}]"


def test_a_callback_that_ends_training_looks_at_validations_by_time(folder: Path) -> None:
    stopped = watching("EarlyStopping", f"{STANDSTILL}, patience: 4")  # in the fifth validation
    works("fit", "--max_epochs=9", stopped, f"--trainer.{AT_ONCE}", folder=folder)
    last = torch.load(folder / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 5


STOPPING, SAVING = ("EarlyStopping", "check_on_train_epoch_end"), ("ModelCheckpoint", "save_on_train_epoch_end")
RARELY = "check_val_every_n_epoch=2"


@pytest.mark.parametrize(
    ("kind", "settings", "often", "advice"),
    [
        (STOPPING, "monitor: train/loss", "", ""),
        (STOPPING, "monitor: train/loss", "val_check_interval=0.5", "set its check_on_train_epoch_end to true"),
        (STOPPING, "monitor: train/loss, WHEN: true", "val_check_interval=0.5", ""),
        (STOPPING, "monitor: train/loss, WHEN: false", "", "set its check_on_train_epoch_end to true"),
        (STOPPING, "monitor: train/loss_step", "val_check_interval=2; log_every_n_steps=1", ""),
        (STOPPING, "monitor: val/loss, WHEN: true", RARELY, "leave out its check_on_train_epoch_end"),
        (STOPPING, "monitor: val/loss, WHEN: true", AT_ONCE, "leave out its check_on_train_epoch_end"),
        (STOPPING, "monitor: val/loss, WHEN: true", "val_check_interval=0.5", ""),
        (SAVING, "monitor: train/accuracy, mode: max", RARELY, "set its save_on_train_epoch_end to true"),
        (SAVING, "monitor: val/loss, WHEN: true", RARELY, "leave out its save_on_train_epoch_end"),
        (SAVING, "monitor: val/loss, WHEN: true, every_n_epochs: 2", RARELY, ""),
    ],
)
def test_a_callback_looks_at_a_metric_that_is_known(
    kind: tuple[str, str], settings: str, often: str, advice: str, folder: Path
) -> None:
    callback, when = kind
    flags = ["fit", "--max_epochs=3", *(f"--trainer.{setting}" for setting in often.split("; ") if setting)]
    flags.append(watching(callback, settings.replace("WHEN", when)))
    if advice:
        assert advice in refused(*flags, folder=folder)
    else:
        works(*flags, folder=folder)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--max_epochs=8 --trainer.check_val_every_n_epoch=5", "9 steps"),
        ("--max_epochs=2 --trainer.max_steps=4", "1 step"),
        ("--max_epochs=2", ""),
        ("--trainer.max_steps=2", ""),  # nothing was validated, so the last weights are tested
    ],
)
def test_an_end_that_was_not_validated_is_mentioned(flags: str, steps: str, folder: Path) -> None:
    err = works("--val_size=200", *flags.split(), folder=folder).err
    assert re.findall(r"the run took (.*) after its last validation", err) == ([steps] if steps else []), err


def test_a_run_that_is_continued_at_an_epochs_end_is_validated_to_its_end(folder: Path) -> None:
    flags = ("--val_size=200", "--model.scheduler=null")
    works("fit", *flags, folder=folder)
    for epochs in ("2", "2"):  # the second time nothing is left to train
        assert "validat" not in works(*flags, f"--max_epochs={epochs}", "--ckpt_path=last", folder=folder).err


def test_weights_that_lightning_averages_are_tested(folder: Path) -> None:
    works("--val_size=200", "--max_epochs=2", "--trainer.callbacks=EMAWeightAveraging", folder=folder)
    run = folder / "logs/lenet/version_0"
    flags = [f"--ckpt_path={run / 'checkpoints/best.ckpt'}", "--accelerator=cpu", "--trainer.limit_test_batches=3"]
    tested = run_forked("test", *flags, folder=folder)
    assert f"accuracy {record(run)['test']['accuracy']:.4f}, loss {record(run)['test']['loss']:.4f}" in tested.out


def test_a_timer_stops_the_run(folder: Path) -> None:
    timer = ["--trainer.callbacks=Timer", "--trainer.callbacks.duration=00:00:00:01"]
    works("--max_epochs=10000", "--model.scheduler=null", *timer, folder=folder)
    assert len(record(folder / "logs/lenet/version_0")["epochs"]) < 10_000


@pytest.mark.parametrize(
    ("often", "patience", "expected"),
    [
        ("", 1, 2),
        ("--trainer.check_val_every_n_epoch=2", 2, 4),
        ("--trainer.check_val_every_n_epoch=null --trainer.val_check_interval=6", 2, 4),
    ],
)
def test_patience_may_change_when_a_run_is_continued(often: str, patience: int, expected: int, folder: Path) -> None:
    standing = [
        "--val_size=200",
        "--max_epochs=6",
        "--model.scheduler=null",
        "--model.optimizer=torch.optim.SGD",
        "--lr=1e-9",
        *often.split(),
    ]
    works(*standing, f"--patience={patience}", folder=folder)
    run = folder / "logs/lenet/version_0"
    assert len(record(run)["epochs"]) == expected
    answer = works(*standing, f"--patience={patience}", "--ckpt_path=last", folder=folder)
    assert len(record(run)["epochs"]) == expected and f"--patience {patience} has ended this run" in answer.err
    works(*standing, "--patience=9", "--ckpt_path=last", folder=folder)
    assert len(record(run)["epochs"]) == 6


def test_patience_is_kept_by_a_run_that_is_continued_without_it(tmp_path: Path) -> None:
    """From the checkpoint alone, and in a new folder: `--log_dir` is not given."""
    folder = write(tmp_path / "run")
    flat = ("--patience", "1", "--max_epochs", "30", "--lr", "1e-9", "--log_dir", "runs")
    assert train(folder, *flat, at=FIRST).code == 143
    (folder / "command.json").write_text("{}")
    checkpoint = "runs/recipe/version_0/checkpoints/last.ckpt"
    trusted = ("--ckpt_path", checkpoint, "--trust_checkpoint")
    answer = run_forked("fit", *trusted, "--data_dir", str(DATA), folder=folder)
    assert answer.code == 0, answer.err
    assert len(record(folder / SAVED.parent)["epochs"]) < 10
    warning = "the run goes on in logs/recipe/version_0, not in runs/recipe/version_0"
    assert warning in answer.err


def test_the_command_to_continue_names_this_run_not_the_newest(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    answer = train(folder, at=MIDDLE)
    assert train(folder, "--max_epochs", "1").code == 0
    match = CONTINUE.search(answer.err)
    assert match, answer.err
    (folder / "command.json").write_text("{}")
    answer = run_forked(*shlex.split(match[1]), folder=folder)
    assert answer.code == 0, answer.err
    assert len(record(folder / SAVED.parent)["epochs"]) == 3


@pytest.mark.parametrize(
    ("often", "expected"),
    [
        ("--trainer.val_check_interval=0.34", 3),
        ("--trainer.check_val_every_n_epoch=2", 4),
        ("--trainer.check_val_every_n_epoch=null --trainer.val_check_interval=2", 3),
    ],
)
def test_patience_counts_epochs_however_often_one_validates(often: str, expected: int, folder: Path) -> None:
    standing = ["--val_size=200", "--model.scheduler=null", "--model.optimizer=torch.optim.SGD", "--lr=1e-9"]
    works("fit", *standing, "--max_epochs=9", "--patience=2", *often.split(), folder=folder)
    epochs = record(folder / "logs/lenet/version_0")["epochs"]
    assert len(epochs) == expected
    assert epochs[-1]["train/loss"] != epochs[-2]["train/loss"]


def test_the_best_accuracy_is_that_of_the_best_checkpoint(folder: Path) -> None:
    """Also where an epoch's best validation isn't its last."""
    often = "--trainer.val_check_interval=10 --trainer.limit_val_batches=1.0 --trainer.limit_train_batches=30"
    # The last third of the epoch spoils the network.
    spoiled = "--model.scheduler=StepLR --model.scheduler.step_size=20 --model.scheduler.gamma=1000"
    flags = (*often.split(), *spoiled.split(), "--model.scheduler_interval=step", "--lr=0.002")
    works("fit", *flags, "--batch_size=32", "--val_size=200", "--max_epochs=1", folder=folder)
    run = folder / "logs/lenet/version_0"
    callbacks = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"].values()
    (best,) = (state["best_model_score"] for state in callbacks if state.get("monitor") == "val/accuracy")
    assert record(run)["best_val_accuracy"] == best.item()
    assert max(epoch["val/accuracy"] for epoch in record(run)["epochs"]) < best.item()  # else the test says nothing


def test_patience_with_less_than_an_epoch(folder: Path) -> None:
    works("--val_size=200", "--batch_size=32", "--patience=2", "--trainer.max_steps=3", folder=folder)
    assert (folder / "logs/lenet/version_0/checkpoints/last.ckpt").exists()


def test_a_run_continued_without_its_best_is_not_tested_on_an_older_one(folder: Path) -> None:
    flags = ("--val_size=200", "--model.scheduler=null")
    works(*flags, "--max_epochs=1", folder=folder)
    run = folder / "logs/lenet/version_0"
    before = record(run)["test"]["loss"]
    answer = works(*flags, "--max_epochs=3", "--ckpt_path=last", "--trainer.enable_checkpointing=false", folder=folder)
    assert record(run)["test"]["loss"] != before
    assert "best.ckpt" not in answer.out


def test_a_recipe_by_its_path_has_its_name(folder: Path) -> None:
    path = str(REPO / "configs" / "best" / "lenet.yaml")
    answer = run_forked(
        "fit", f"--model={path}", f"--data_dir={DATA}", "--val_size=200", "--max_epochs=1", folder=folder
    )
    assert answer.code == 0, answer.err
    assert record(folder / "logs/best/lenet/version_0")["recipe"] == "best/lenet"


@pytest.mark.parametrize("logger", ["false", "[]"])
def test_a_run_without_a_logger_has_its_folder(logger: str, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    works(f"--trainer.logger={logger}", folder=folder)
    assert {path.name for path in folder.iterdir()} - before == {"logs"}
    assert {path.name for path in (folder / "logs/lenet/version_0").iterdir()} >= {"checkpoints", "record.json"}
    assert not list(folder.rglob("events.*"))


@pytest.mark.parametrize(("first", "drawn"), [("TensorBoardLogger", True), ("CSVLogger", False)])
def test_pictures_are_drawn_where_the_first_of_several_loggers_is_tensorboards(
    first: str, drawn: bool, folder: Path
) -> None:
    loggers = [first, *{"CSVLogger", "TensorBoardLogger"} - {first}]
    listed = ", ".join(f"{{class_path: {name}, init_args: {{save_dir: {name}}}}}" for name in loggers)
    works("fit", f"--trainer.logger=[{listed}]", folder=folder)
    (events,) = folder.glob("TensorBoardLogger/*/*/events.*")
    assert (b"errors/confusion_matrix" in events.read_bytes()) == drawn
    assert list(folder.glob("CSVLogger/*/*/metrics.csv"))


def test_fast_dev_run_takes_a_few_batches_and_leaves_nothing(folder: Path) -> None:
    answer = works("--trainer.fast_dev_run=2", folder=folder)
    assert "Test on 64 images" in answer.out
    assert not list((folder / "logs").rglob("*"))


@pytest.mark.parametrize(
    ("flags", "measure", "limit"),
    [
        ("--precision=bf16-mixed", "norm", 0.01),
        ("--precision=bf16-mixed --trainer.gradient_clip_algorithm=value", "largest", 0.001),
        ("--precision=32", "norm", 0.01),
    ],
)
def test_gradients_are_clipped(flags: str, measure: str, limit: float, folder: Path) -> None:
    flags = f"{flags} --trainer.callbacks=mine.Note --trainer.gradient_clip_val={limit}"
    works("fit", *flags.split(), folder=folder)
    found = [line[measure] for line in notes(folder, measure)]
    assert len(found) == 3 and all(0 < value <= 1.01 * limit for value in found)


def test_overfitting_shows_the_same_images_each_epoch(folder: Path) -> None:
    works("fit", "--trainer.overfit_batches=2", "--max_epochs=3", "--trainer.callbacks=mine.Note", folder=folder)
    batches = [(line["epoch"], line["images"]) for line in notes(folder, "images")]
    epochs = [[images for epoch, images in batches if epoch == number] for number in range(3)]
    assert len(epochs[0]) == 2 and epochs[0] == epochs[1] == epochs[2]
    assert record(folder / "logs/lenet/version_0")["train_images"] == 64


@pytest.mark.parametrize(
    ("name", "line"), [("simple", "run_training_epoch"), ("advanced", "cumulative"), ("pytorch", "Self CPU")]
)
def test_profilers_report(name: str, line: str, folder: Path) -> None:
    answer = works("fit", f"--trainer.profiler={name}", folder=folder)
    assert line in answer.err


def test_a_rate_that_follows_the_training_loss_does_so_after_every_epoch(folder: Path) -> None:
    flags = "--model.scheduler=lightning.pytorch.cli.ReduceLROnPlateau --model.scheduler.monitor=train/loss"
    flags += " --model.scheduler.mode=max --model.scheduler.patience=0 --model.scheduler_interval=epoch"
    rare = ("--trainer.check_val_every_n_epoch=5", "--max_epochs=5", "--trainer.callbacks=mine.Note")
    works("fit", *flags.split(), *rare, folder=folder)
    assert notes(folder, "rate")[-1]["rate"] < notes(folder, "rate")[0]["rate"]


@pytest.mark.parametrize(("interval", "rates"), [("epoch", [1e-2, 1e-3]), ("step", [1e-4, 1e-7])])
def test_an_epochs_line_shows_the_rate_of_its_last_step(interval: str, rates: list[float], folder: Path) -> None:
    settings = ("=StepLR", ".step_size=1", f"_interval={interval}")
    flags = ["--lr=0.01", "--max_epochs=2", *(f"--model.scheduler{setting}" for setting in settings)]
    out = works("fit", *flags, folder=folder).out
    assert [float(rate) for rate in re.findall(r"  lr (\S+)", out)] == pytest.approx(rates)


def test_the_rate_follows_the_metric_that_was_named(folder: Path) -> None:
    settings = "class=lightning.pytorch.cli.ReduceLROnPlateau .monitor=val/accuracy .mode=max .patience=0"
    settings += " .threshold=0.1 .threshold_mode=abs"  # which no accuracy can rise by in each of twelve epochs
    flags = [f"--model.scheduler{setting.removeprefix('class')}" for setting in settings.split()]
    epoch = ("--max_epochs=12", "--model.scheduler_interval=epoch", "--trainer.callbacks=mine.Note", "--lr=0.02")
    works("fit", *flags, *epoch, folder=folder)
    rows = notes(folder, "rate")
    rates = [rows[0]["rate"]]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], rates[0])
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", patience=0, threshold=0.1, threshold_mode="abs"
    )
    for row in rows[1:]:
        schedule.step(row["accuracy"])
        rates.append(optimizer.param_groups[0]["lr"])
    assert [row["rate"] for row in rows] == pytest.approx(rates)
    assert rates[-1] < rates[0]


def test_a_plateau_is_looked_for_where_there_was_a_validation(folder: Path) -> None:
    flags = ("--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.scheduler_interval=epoch")
    assert "--val_size" in refused("fit", *flags, "--val_size=0", folder=folder)
    works("fit", *flags, "--max_epochs=2", "--trainer.check_val_every_n_epoch=2", folder=folder)


@pytest.mark.parametrize("limit", ["max_steps=4", "max_time={seconds: 3}", "val_check_interval=0.25"])
def test_an_epoch_that_is_cut_short_has_its_own_numbers(limit: str, folder: Path) -> None:
    stopped = watching("EarlyStopping", f"{STANDSTILL}, patience: 3")  # in the second epoch's first validation
    more = {"max_time": ["--trainer.callbacks=mine.Slow"], "val_check_interval": [stopped]}.get(limit.partition("=")[0])
    answer = works("fit", "--max_epochs=90", f"--trainer.{limit}", *(more or []), folder=folder)
    *_, before, last = record(folder / "logs/lenet/version_0")["epochs"]
    shared = {name for name in last if name in before and last[name] == before[name] and "accuracy" not in name}
    assert not shared and {"train/loss", "train/accuracy", "seconds", "images_per_second"} <= set(last)
    lines = [line for line in answer.out.splitlines() if line.startswith("epoch ")]
    assert ("val loss" in lines[-1]) == ("val/loss" in last)


def test_a_progress_bar_of_the_users_takes_the_place_of_ours(folder: Path) -> None:
    answer = works("fit", "--trainer.callbacks=TQDMProgressBar", folder=folder)
    assert "Epoch 0" in answer.err + answer.out and "epoch 1/1" not in answer.out


@pytest.mark.parametrize(
    ("flags", "steps", "says"),
    [
        ("--model.scheduler_interval=step", 2, "which takes 3 steps"),
        ("--model.scheduler_interval=step", 3, ""),
        ("--max_epochs=2 --model.scheduler_interval=step", 3, "which takes 4 steps"),
        ("--max_epochs=2 --model.scheduler_interval=step", 4, ""),
        ("--max_epochs=3 --model.scheduler_interval=epoch", 2, "which takes 3 steps"),
        ("--max_epochs=-1 --model.scheduler_interval=step", 9, "ends after 9 steps, the run never: give --max_epochs"),
    ],
)
def test_one_cycle_must_not_end_before_the_run(flags: str, steps: int, says: str, folder: Path) -> None:
    settings = ("=OneCycleLR", ".max_lr=0.01", f".total_steps={steps}")
    schedule = [f"--model.scheduler{setting}" for setting in settings]
    together = watching("GradientAccumulationScheduler", "scheduling: {0: 1, 1: 3}")  # three steps, then one an epoch
    if says:
        assert says in refused("fit", *flags.split(), *schedule, together, folder=folder)
    else:
        works("fit", *flags.split(), *schedule, together, folder=folder)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_a_network_with_further_outputs_in_training_is_one_line(name: str, folder: Path) -> None:
    net = [f"--model.net=torchvision.models.{name}", "--model.net.num_classes=10", "--model.net.init_weights=false"]
    size = 32 if name == "googlenet" else 299
    flags = (*net, "--data.channels=3", f"--image_size={size}", "--trainer.limit_train_batches=1")
    assert "--model.net.aux_logits false" in refused("fit", *flags, folder=folder)
    if name == "googlenet":
        works("fit", *flags, "--model.net.aux_logits=false", folder=folder)


def test_curves_on_a_full_disk_are_one_line(folder: Path) -> None:
    # A limit on the size of files makes a write fail half-way, just as a full disk does.
    flags = (*SAMPLE, *SHORT, "--trainer.enable_checkpointing=false", "--max_epochs=2")
    answer = run_forked("fit", *flags, folder=folder, prepare=_small_files)
    (line,) = answer.err.splitlines()
    assert answer.code == 1 and line.endswith("can't be written: File too large")


@pytest.mark.parametrize(
    ("net", "message"),
    {
        "Empty": "nothing to train",
        "Fetching": "mine.Fetching can't fetch its weights: [Errno 111] Connection refused; get online",
        "Failing": "mine.Failing can't be made: KeyError: 'width'",
        "Failing --model.net.early=false": "Failing can't take images of 1x28x28 (channels x height x width): KeyError",
        "WithMore --model.net.in_features=784 --model.net.out_features=10": "keeps more in its state_dict than tensors",
        "made": "model.net names an object of LeNet; name its class",
    }.items(),
)
def test_a_network_that_can_not_be_used_is_one_line(net: str, message: str, folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    assert message in refused("fit", *f"--model.net=mine.{net}".split(), folder=folder)


def test_a_class_within_a_class_trains(folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    works("fit", "--model.net=mine.Outer.Inner", "--image_size=32", folder=folder)
    assert record(folder / "logs/lenet/version_0")["config"]["model"]["net"]["init_args"]["image_size"] == 32


def test_a_network_that_extends_one_of_ours_follows_the_pictures(folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    pictures = (f"--data={DATA / 'photos'}", f"--data_dir={folder}", "--image_size=32", "--batch_size=8")
    works("fit", "--model.net=mine.Longer", *pictures, folder=folder)
    arguments = record(folder / "logs/lenet/version_0")["config"]["model"]["net"]["init_args"]
    assert [arguments[name] for name in ("in_channels", "num_classes", "image_size")] == [3, 4, 32]


@pytest.mark.slow
def test_parameters_that_take_no_part_are_one_line_that_names_the_strategy(folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    flags = ("fit", *SAMPLE, *SHORT, "--model.net=mine.Spare", "--devices=2")
    answer = run(*flags, folder=folder)
    (line,) = answer.err.splitlines()
    assert answer.code == 1 and "not every parameter of the network takes part in each step" in line
    _, _, advice = line.partition("; add ")
    assert run(*flags, *advice.split(), folder=folder).code == 0


def test_null_reaches_a_parameter_that_takes_it(folder: Path) -> None:
    (folder / "mine.py").write_text(OTHER_NETWORKS, encoding="utf-8")
    net = ("--model.net=mine.Dropping", "--model.net.dropout=null", "--model.net.bias=null")
    works("fit", *net, folder=folder)
    assert record(folder / "logs/lenet/version_0")["parameters"] == 784 * 10 + 10


@pytest.mark.parametrize("subcommand", ["test", "validate", "predict"])
def test_a_measurement_of_nothing_is_one_line(subcommand: str, folder: Path) -> None:
    limit = {"test": "test", "validate": "val", "predict": "predict"}[subcommand]
    flags = (f"--ckpt_path={REPO / 'weights/lenet.ckpt'}", f"--trainer.limit_{limit}_batches=0")
    answer = run_forked(subcommand, *flags, folder=folder)
    assert answer.code == 2 and f"leaves nothing to {subcommand}" in answer.err
