"""What a run shows, records and guards."""

import fcntl
import hashlib
import http.server
import io
import json
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from commands import DATA, ENVIRONMENT, REPO, Answer, free_port, run, run_forked
from conftest import Run
from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint
from PIL import Image
from stoppable import COMPUTED, SAVED, checkpoint, differences, flags, train, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix
from torchvision.models import get_model, get_model_weights

from callbacks.class_weights import ClassWeights, weighted_cross_entropy
from callbacks.distillation import Distillation
from callbacks.divergence_guard import DivergenceGuard
from callbacks.exact_resume import ordered_mean
from callbacks.fine_tuning import FreezeFeatures
from callbacks.graceful_stop import GracefulStop
from callbacks.processes import Processes
from callbacks.run_folder import RunFolder
from callbacks.temperature import GRID, PRIOR, best_temperature
from callbacks.tensorboard import drawing
from callbacks.tensorboard.pictures import is_drawn
from checkpoints.writing import AtomicCheckpointIO
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from errors import Diverged, UserError
from inspection.graph import network_graph
from lit_modules import LitClassifier
from lit_modules.execution.out_of_distribution import OutOfDistribution
from models import VGG, GoogLeNet, LeNet, NiN
from pictures.feature_maps import feature_maps
from pictures.feature_maps import grid as grid_of
from pictures.mistakes import Mistake, explain_mistakes
from weights.imagenet import _first_convolution, _weights_for, start_from_imagenet

# ---- Training that has gone wrong ends, or says so, and keeps the last good checkpoint.


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


@pytest.mark.parametrize("then_test", [False, True])
@pytest.mark.parametrize("failing", [None, "on_train_end", "on_test_start"])
def test_a_runs_folder_is_locked_until_the_run_is_over(then_test: bool, failing: str | None, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("failed")

    def is_free() -> bool:
        with suppress(Timeout), FileLock(tmp_path / "lenet" / "version_0" / ".lock", timeout=0):
            return True
        return False

    folder, free = RunFolder("lenet", None, then_test), []
    folder.log_dir = tmp_path
    watching = LambdaCallback(on_train_start=lambda *_: free.append(is_free()), **({failing: fail} if failing else {}))
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits: Any = {"max_steps": 1, "limit_val_batches": 0, "limit_test_batches": 1, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[folder, watching], **quiet, **limits)
    data, model = FashionMNISTDataModule(str(DATA), val_size=100, image_size=28), LitClassifier(LeNet())
    with suppress(RuntimeError):
        trainer.fit(model, data)
        free.append(is_free())
        trainer.test(model, data, verbose=False)
    assert free == [False, *([not then_test] if failing != "on_train_end" else [])]
    assert is_free()


def test_a_stop_waits_for_a_checkpoint_that_is_written_slowly(tmp_path: Path) -> None:
    processes, waits, after = Processes(), [], []

    class Slow(AtomicCheckpointIO):
        def save_checkpoint(self, *arguments: Any, **named: Any) -> None:
            waits.append(processes.watch.patience)
            super().save_checkpoint(*arguments, **named)

    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1),
            processes,
            GracefulStop(processes, None, str, then_test=True),
            LambdaCallback(on_train_batch_end=lambda *_: after.append(processes.watch.patience)),
        ],
        plugins=[Slow()],
    )
    trainer.fit(LitClassifier(LeNet()), FashionMNISTDataModule(str(DATA), val_size=100, image_size=28, batch_size=32))
    assert waits[:2] == 2 * [math.inf]
    assert len(after) == 4 and max(after) < 3600


def test_one_process_is_enough_to_stop_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    answer = train(folder, "--devices", "2", poison=[1, 2, 1])
    assert answer.code == 3, answer
    assert answer.err.count("the loss is not finite") == 1
    assert "Traceback" not in answer.err
    assert checkpoint(folder)["epoch"] == 0


NOTED = """
import torch
from lightning.pytorch.callbacks import Callback

class Noted(Callback):
    def on_validation_batch_end(self, trainer, pl_module, *_):
        torch.save(pl_module.net.layers[1].state_dict(), f"statistics-{trainer.global_step}-{trainer.global_rank}.pt")
"""


def test_processes_validate_with_the_same_statistics_between_two_steps(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    (folder / "noted.py").write_text(NOTED)
    flags = ("--max_epochs=1", "--trainer.accumulate_grad_batches=3", "--trainer.val_check_interval=0.4")
    answer = train(folder, *flags, "--trainer.callbacks+=noted.Noted", "--devices", "2")
    assert answer.code == 0, answer.err
    for step in (0, 1):  # of five batches, validated after the second and the fourth
        first, second = (torch.load(folder / f"statistics-{step}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert not differences(first, second), step


def lenet(folder: Path, *more: str) -> Answer:
    """650 batches of LeNet."""
    data = ["--data_dir", str(DATA), "--val_size", "200", "--batch_size", "4", "--max_epochs", "2"]
    return run_forked("fit", "--model", "lenet", *data, "--trainer.logger", "false", *more, folder=folder)


def test_tensorboard_starts() -> None:
    command = [sys.executable, "-m", "tensorboard.main", "--version"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


def test_real_divergence(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e10")
    assert answer.code == 3
    assert "the loss is not finite in epoch 1" in answer.err
    assert not list(tmp_path.rglob("*.ckpt"))


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
    assert not list(tmp_path.rglob("*.ckpt"))


CHANGING = "[{class_path: GradientAccumulationScheduler, init_args: {scheduling: {1: 4}}}]"  # in the second epoch


@pytest.mark.parametrize("more", [(), ("--model.scheduler=null", f"--trainer.callbacks={CHANGING}")])
def test_network_at_chance_is_reported_once(more: tuple[str, ...], tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e-12", *more)
    assert answer.code == 0
    assert answer.err.count("has not left chance") == 1
    assert "over 500 batches" in answer.err and "--seed" in answer.err


def test_network_at_chance_can_stop_the_run(tmp_path: Path) -> None:
    answer = lenet(tmp_path, "--lr", "1e-12", "--stop_at_chance")
    assert answer.code == 3
    assert answer.err.startswith("train.py: error: the network has not left chance")
    (saved,) = tmp_path.rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["epoch"] == 0


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


# ---- The temperature that makes probabilities honest.


def optimum(logits, labels):
    """By brute force."""
    logits = logits.double()
    temperatures = torch.linspace(math.log(0.2), math.log(20), 20_001).exp()

    def loss(temperature):
        return F.cross_entropy(logits / temperature, labels, reduction="sum") + PRIOR * temperature.log() ** 2

    near = int(torch.stack([loss(temperature) for temperature in temperatures[::20]]).argmin()) * 20
    around = temperatures[max(0, near - 40) : near + 41]
    return float(around[torch.stack([loss(temperature) for temperature in around]).argmin()])


def on_grid(logits, labels):
    return torch.stack([F.cross_entropy(logits / place.exp(), labels, reduction="sum") for place in GRID]).double()


@pytest.mark.parametrize("truth", [0.4, 1.0, 1.7, 6.0])
def test_recovers_how_overconfident_logits_are(truth):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4000, 10, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    found = best_temperature(on_grid(truth * logits, labels))
    assert found == pytest.approx(truth, rel=0.06)  # of drawn labels
    assert found == pytest.approx(optimum(truth * logits, labels), rel=0.002)


@pytest.mark.parametrize("losses", [torch.zeros(len(GRID)), torch.full((len(GRID),), torch.nan)])
def test_says_nothing_without_images_or_with_nan(losses):
    assert best_temperature(losses) is None


def test_a_few_images_that_are_all_right_move_it_little_and_many_do():
    logits, labels = 5 * torch.eye(10), torch.arange(10)
    few: Any = best_temperature(on_grid(logits, labels))
    many: Any = best_temperature(on_grid(logits.repeat(500, 1), labels.repeat(500)))
    assert 0.7 < few < 1
    assert 0.2 <= many < 0.5


def val_logits(path):
    classifier = LitClassifier.load_from_checkpoint(path)
    data = FashionMNISTDataModule.load_from_checkpoint(path)
    data.setup("fit")
    classifier.eval()
    with torch.no_grad():
        return classifier, classifier(data.preprocess(data.val_set.images)), data.val_set.labels


def test_each_checkpoint_holds_that_of_its_own_weights(trained):
    for path in (trained.best, trained.best.with_name("last.ckpt")):
        classifier, logits, labels = val_logits(path)
        assert type(torch.load(path, weights_only=True)["temperature"]) is float
        assert classifier.temperature == pytest.approx(optimum(logits, labels), rel=0.002)
        assert classifier.temperature != 1


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_fit_it_on_all_validation_images(tmp_path):
    flags = "fit --model lenet --val_size 297 --max_epochs 1 --batch_size 32 --accelerator cpu --devices 2"
    answer = run(*flags.split(), f"--data_dir={DATA}", folder=tmp_path, timeout=300)
    assert answer.code == 0, answer.err
    classifier, logits, labels = val_logits(tmp_path / "logs" / "lenet" / "version_0" / "checkpoints" / "best.ckpt")
    assert classifier.temperature == pytest.approx(optimum(logits, labels), rel=0.002)


def test_is_1_without_validation_images(tmp_path):
    flags = "fit --model lenet --val_size 0 --max_epochs 1 --batch_size 128 --accelerator cpu --devices 1"
    answer = run(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    path = tmp_path / "logs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    assert LitClassifier.load_from_checkpoint(path).temperature == 1


def test_probabilities_are_calibrated_and_leave_the_mode_alone(trained):
    classifier = LitClassifier.load_from_checkpoint(trained.best)
    images = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    classifier.train()
    classifier.net.get_submodule("features").eval()  # as while they are frozen
    modes = [layer.training for layer in classifier.net.modules()]
    probabilities = classifier.probabilities(images)
    assert [layer.training for layer in classifier.net.modules()] == modes
    assert not probabilities.requires_grad
    expected = (classifier.net(images) / classifier.temperature).softmax(dim=1)
    assert torch.allclose(probabilities, expected)


@pytest.mark.parametrize("stored", [math.nan, 0.0, -1.0, math.inf, "2", None])
def test_a_senseless_one_in_a_checkpoint_counts_as_1(trained, stored):
    classifier = LitClassifier.load_from_checkpoint(trained.best)
    classifier.on_load_checkpoint({"temperature": stored})
    assert classifier.temperature == 1


# ---- The score of images unlike those trained on.


def fitted_to(logits: Tensor) -> OutOfDistribution:
    fitted = OutOfDistribution.fit(logits)
    assert fitted is not None
    return fitted


def drawn(images: int, classes: int = 10, seed: int = 0) -> Tensor:
    """Logits of images that a network is mostly sure of."""
    generator = torch.Generator().manual_seed(seed)
    return 8 * F.one_hot(torch.arange(images) % classes, classes) + torch.randn(images, classes, generator=generator)


@pytest.mark.parametrize("each", [20, 60])
def test_new_images_are_rarely_strange_where_validation_images_are_few(each):
    for classes in (10, 40):
        fitted = fitted_to(drawn(each * classes, classes))
        assert len(fitted.means) == classes
        assert (fitted.score(drawn(4000, classes, seed=1)) > 1).float().mean() < 0.07
        assert (fitted.score(torch.randn(500, classes)) > 1).float().mean() > 0.95


@pytest.mark.parametrize(("images", "classes", "gaussians"), [(2000, 10, 10), (150, 10, 0), (2000, 100, 0)])
def test_what_is_unlike_the_validation_images_scores_above_1(images, classes, gaussians):
    torch.manual_seed(0)
    fitted = fitted_to(drawn(images, classes))
    assert len(fitted.means) == gaussians
    assert 0.03 < (fitted.score(drawn(images, classes)) > 1).float().mean() < 0.06  # fitted to them
    assert (fitted.score(drawn(4000, classes, seed=1)) > 1).float().mean() == pytest.approx(0.05, abs=0.04)
    assert (fitted.score(torch.randn(500, classes)) > 1).float().mean() > 0.95  # sure of nothing
    two_at_once = drawn(images, classes) + drawn(images, classes).roll(1, dims=0)
    assert ((fitted.score(two_at_once) > 1).float().mean() > 0.95) == (gaussians > 0)
    back: Any = OutOfDistribution.stored({"out_of_distribution": fitted._asdict()}, classes)
    assert torch.equal(back.score(two_at_once), fitted.score(two_at_once))


def test_nothing_is_fitted_to_few_images_or_to_nan():
    assert OutOfDistribution.fit(drawn(19)) is None
    assert OutOfDistribution.fit(drawn(500).index_fill(0, torch.tensor([3]), torch.nan)) is None


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("means", torch.zeros(10, 9)),
        ("means", torch.zeros(())),
        ("whitening", torch.zeros(9, 10, 10)),
        ("log_volumes", [0.0] * 10),
        ("centres", torch.zeros(2, dtype=torch.int64)),
        ("scales", torch.tensor([1.0, 0.0])),
        ("scales", torch.tensor([1.0, torch.nan])),
        ("scales", None),
    ],
)
def test_a_senseless_score_in_a_checkpoint_is_none(name, wrong):
    right = fitted_to(drawn(500))._asdict()
    assert OutOfDistribution.stored({"out_of_distribution": right}, 10)
    assert OutOfDistribution.stored({"out_of_distribution": right | {name: wrong}}, 10) is None
    assert OutOfDistribution.stored({"out_of_distribution": [1]}, 10) is None
    assert OutOfDistribution.stored({}, 10) is None


def test_each_checkpoint_holds_the_score_of_its_own_weights(trained):
    for path in (trained.best, trained.best.with_name("last.ckpt")):
        classifier, logits, _ = val_logits(path)
        expected = fitted_to(logits).score(logits)
        assert torch.allclose(classifier.out_of_distribution.score(logits), expected, atol=1e-3)


# ---- Class weights.


def test_class_weights_are_the_usual_balanced_ones_and_reach_the_loss():
    model = LitClassifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), num_classes=3)
    labels = torch.tensor([0] * 6 + [2] * 3)
    images = torch.randn(9, 1, 2, 2)
    data = SimpleNamespace(train_set=SimpleNamespace(labels=labels))
    loop = SimpleNamespace(_should_accumulate=lambda: True)
    trainer: Any = SimpleNamespace(datamodule=data, fit_loop=loop)
    model._trainer = trainer
    ClassWeights().on_fit_start(trainer, model)
    (weights,) = model.loss_function.args
    assert weights.tolist() == [0.5, 0.0, 1.0]  # 9 / (3 * 6), no image, 9 / (3 * 3)
    expected = F.cross_entropy(model(images), labels, weights)
    torch.testing.assert_close(model.training_step((images, labels), 0), expected)
    assert not torch.isclose(expected, F.cross_entropy(model(images), labels))


def test_class_weights_teach_no_rare_class_where_targets_are_soft():
    counts = torch.tensor([1000, 1000, 20])
    labels, weights = torch.arange(3).repeat_interleave(counts), counts.sum() / (3 * counts)
    for targets, smoothing in ((labels, 0.1), (F.one_hot(labels, 3) * 0.9 + 1 / 30, 0.0)):
        logits = torch.zeros(3, 3, requires_grad=True)  # of a network that tells the classes apart
        optimizer = torch.optim.LBFGS([logits], max_iter=100)

        def loss(targets=targets, smoothing=smoothing, logits=logits, optimizer=optimizer):
            optimizer.zero_grad()
            value = weighted_cross_entropy(weights, logits[labels], targets, label_smoothing=smoothing)
            value.backward()
            return value

        optimizer.step(loss)
        expected = torch.full((3, 3), 1 / 30) + 0.9 * torch.eye(3)
        torch.testing.assert_close(logits.softmax(dim=1), expected, atol=0.01, rtol=0)


# ---- A teacher.


def test_what_a_teacher_leaves_open_is_not_taken_for_chance(images, tmp_path):
    flags = ["--trainer.callbacks.temperature=100", "--stop_at_chance", "--batch_size=2", "--max_epochs=1"]
    teacher = ["--trainer.callbacks=callbacks.distillation.Distillation", f"--trainer.callbacks.teacher={BETTER}"]
    base = [word for word in TAUGHT if "best/lenet" not in word]
    answer = run_forked("--model=lenet", *base[1:], *teacher, *flags, folder=tmp_path)
    assert answer.code == 0 and "chance" not in answer.err, answer
    (record,) = tmp_path.rglob("record.json")
    loss = json.loads(record.read_text(encoding="utf-8"))["epochs"][0]["train/loss"]
    assert loss > 0.98 * math.log(10)  # else the test says nothing


TAUGHT = ["fit", "--model=best/lenet_distilled", "--data_dir=images", "--val_size=297", "--accelerator=cpu"]
TAUGHT += ["--devices=1", "--max_epochs=2", "--batch_size=100"]
BETTER = REPO / "weights" / "vgg11_quarter.ckpt"  # trained with mirrored images


@pytest.fixture
def images(tmp_path):
    """A folder of the sample of the data, in which answers can be kept."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in DATA.glob("*.gz"):
        shutil.copy(path, folder)
    return folder


def asked(images: Tensor, temperature: float, path: Path = BETTER) -> Tensor:
    """What a released network says of images and their mirrors, computed apart."""
    teacher = LitClassifier.load_from_checkpoint(path).eval()
    seen = FashionMNISTDataModule.load_from_checkpoint(path)
    with torch.no_grad():
        logits = [teacher.net(seen.preprocess(views)) for views in (images, images.flip(-1))]
    return ((logits[0] + logits[1]) / 2 / temperature).softmax(dim=1)


@pytest.mark.parametrize("writable", [True, False])
def test_the_targets_are_what_the_teacher_says_of_image_and_mirror(writable, images, capsys):
    data = FashionMNISTDataModule(str(images), val_size=297, batch_size=7)
    data.setup("fit")
    labels = data.train_set.labels.clone()
    model = LitClassifier(LeNet())
    if not writable:
        (images / "cache").touch()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    loop = SimpleNamespace(_should_accumulate=lambda: True)
    trainer: Any = SimpleNamespace(datamodule=data, is_global_zero=True, fit_loop=loop, strategy=strategy)
    model._trainer = trainer
    question = f"Asking the teacher {BETTER} about {len(labels):,} images\n"
    for temperature, said in ((1.5, question), (3, "" if writable else question)):  # its logits are kept
        Distillation(str(BETTER), temperature).setup(trainer, model, "fit")
        assert capsys.readouterr().out == said
    if writable:
        (kept,) = (images / "cache").glob("teacher-*.pt")
        kept.write_bytes(kept.read_bytes()[:-200])
        Distillation(str(BETTER), 3).setup(trainer, model, "fit")
        assert capsys.readouterr().out == question  # asked again
    images, targets = data.train_set[torch.arange(20)]
    assert torch.allclose(targets, asked(images, 3), atol=1e-5)
    assert torch.equal(data.train_set.labels, labels)  # for class weights and balanced batches
    images = data.preprocess(images)
    expected = -(targets * model.net(images).log_softmax(dim=1)).sum(dim=1).mean()
    assert torch.isclose(model.training_step((images, targets), 0), expected)


SPY = """
import torch
from lightning.pytorch import Callback

class Spy(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.save(batch[1], f"targets_{trainer.global_step}.pt")
"""


def test_the_recipe_trains_on_what_the_teacher_says(tmp_path, images):
    (tmp_path / "spy.py").write_text(SPY)
    answer = run_forked(*TAUGHT, "--max_epochs=1", "--trainer.callbacks+=spy.Spy", folder=tmp_path)
    assert answer.code == 0, answer.err
    data = FashionMNISTDataModule(str(images), val_size=297)
    data.setup("fit")
    seen = torch.cat([torch.load(file) for file in tmp_path.glob("targets_*.pt")])
    callback = yaml.safe_load((REPO / "configs/best/lenet_distilled.yaml").read_text())["trainer"]["callbacks"][-1]
    settings = callback["init_args"]
    path = REPO / "weights" / f"{settings['teacher']}.ckpt"
    expected = asked(data.train_set.images, settings["temperature"], path)
    assert seen.shape == expected.shape
    assert torch.cdist(seen, expected, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values.max() < 1e-4


def test_a_consistent_teacher_sees_what_the_student_sees(tmp_path, images):
    seen = []

    class Spy(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append([part.clone() for part in batch])

    augmented: Any = {"crop_padding": 1, "horizontal_flip": True, "random_erasing": 0.5}
    data = FashionMNISTDataModule(
        str(images), val_size=297, batch_size=100, image_size=28, mean=0.286, std=0.353, **augmented
    )
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits: Any = {"max_steps": 2, "limit_val_batches": 0, "enable_model_summary": False}
    teacher = Distillation(str(BETTER), 3, consistent=True)
    pl.Trainer(accelerator="cpu", devices=1, callbacks=[teacher, Spy()], **quiet, **limits).fit(
        LitClassifier(LeNet()), data
    )
    whole = FashionMNISTDataModule.load_from_checkpoint(BETTER)
    better = LitClassifier.load_from_checkpoint(BETTER).eval()
    for pixels, targets in seen:
        bytes_seen = (pixels * 0.353 + 0.286).mul(255).round().to(torch.uint8)
        with torch.no_grad():
            expected = (better(whole.preprocess(bytes_seen)) / 3).softmax(dim=1)
        assert torch.allclose(targets, expected, atol=1e-4)
    assert len(seen) == 2 and not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize("consistent", [False, True])
def test_the_images_have_their_labels_again_after_the_lesson(consistent, images):
    data = FashionMNISTDataModule(str(images), val_size=1400, batch_size=100, image_size=28)
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits: Any = {"max_steps": 1, "limit_val_batches": 0, "enable_model_summary": False}
    teacher = Distillation("lenet", consistent=consistent)
    pl.Trainer(accelerator="cpu", devices=1, callbacks=[teacher], **quiet, **limits).fit(LitClassifier(LeNet()), data)
    (_, targets), *_ = data.train_dataloader()
    assert targets.dtype == torch.int64 and sorted(targets.tolist()) == sorted(data.train_set.labels.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("consistent", [False, True])
def test_a_taught_network_continues_bit_equal_and_keeps_no_teacher(consistent, tmp_path, images):
    write(tmp_path / "run")
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    recipe["model"] |= {"mixup": 0, "cutmix": 0}
    settings = {"teacher": "lenet", "consistent": consistent}
    teacher = {"class_path": "callbacks.distillation.Distillation", "init_args": settings}
    recipe["trainer"]["callbacks"].append(teacher)
    folder, data = tmp_path / "run", ("--data_dir", str(images))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(folder, tmp_path / "whole")
    assert train(tmp_path / "whole", *data).code == 0
    assert train(folder, *data, at=["train", 1, 2, 0]).code == 143
    assert train(folder, *data, "--ckpt_path", str(SAVED / "last.ckpt")).code == 0
    expected, found = checkpoint(tmp_path / "whole"), checkpoint(folder)
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    assert not [name for name in found["state_dict"] if "teacher" in name]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--model.mixup=0.2", "mixup, cutmix and data.photographed need labels"),
        ("--data.photographed=0.5", "mixup, cutmix and data.photographed need labels"),
    ],
)
@pytest.mark.usefixtures("images")
def test_mistakes_of_teaching(flags, says, tmp_path):
    answer = run_forked(*TAUGHT, *flags.split(), folder=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert says in answer.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"teacher": "nobody"},
            "no teacher: the checkpoint nobody does not exist; give a checkpoint, or one of ",
        ),
        ({"teacher": "lenet", "temperature": 0.0}, "Distillation: temperature=0.0 must be a positive number"),
    ],
)
@pytest.mark.usefixtures("images")
def test_mistakes_in_naming_a_teacher(arguments, says, tmp_path):
    recipe = yaml.safe_load((REPO / "configs" / "best" / "lenet_distilled.yaml").read_text())
    recipe["trainer"]["callbacks"][-1]["init_args"] = arguments
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    flags = [flag.replace("--model=best/lenet_distilled", "--config=mine.yaml") for flag in TAUGHT]
    answer = run_forked(*flags, folder=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert answer.err.startswith(f"train.py: error: {says}")
    assert len(answer.err) < 200
    assert not list((tmp_path / "logs").rglob("version_*"))


# ---- Every tag that a run leaves for TensorBoard is read back and held against values computed apart.

CLASS_TAGS = {f"per_class_accuracy/{name}" for name in CLASS_NAMES}
SCALARS = CLASS_TAGS | {"learning_rate/AdamW", "speed/images_per_second", "speed/epoch_seconds"}
CURVES = {  # of each stage, in a sub-folder
    "train": {"curves/loss", "curves/accuracy", "curves/loss_step"},
    "val": {"curves/loss", "curves/accuracy", "curves/max_accuracy"},
    "test": {"curves/loss", "curves/accuracy"},
}
FEATURE_MAPS = {
    "stages/01_features.0_Conv2d_6x28x28": 2,  # to the number of layers that lead there, ReLU included
    "stages/02_features.2_MaxPool2d_6x14x14": 3,
    "stages/03_features.3_Conv2d_16x10x10": 5,
    "stages/04_features.5_MaxPool2d_16x5x5": 6,
}
EVERY_EPOCH = {"errors/confusion_matrix", "errors/most_confident", "filters/first_layer"}
EVERY_EPOCH |= FEATURE_MAPS.keys()
# Once, after training and after testing, where the optional package is there.
EXPLAINED = {f"errors/most_confident_explained_{stage}" for stage in ("validation", "test") if find_spec("captum")}


@pytest.fixture(scope="module")
def events(trained: Run) -> EventAccumulator:
    return read(trained.folder)


@pytest.fixture(scope="module")
def curves(trained: Run) -> dict[str, EventAccumulator]:
    return {stage: read(trained.folder / stage) for stage in CURVES}


def normalised(images: Tensor) -> Tensor:
    """What the network sees of images (N, 1, 28, 28) uint8, by the recipe's mean and deviation."""
    return (images / torch.tensor(255.0) - 0.286) / 0.353


class Apart:
    """The last checkpoint's validation results, computed without any of the code under test."""

    def __init__(self, folder: Path, val_size: int = 297, batch_size: int = 32) -> None:
        weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        self.net: Any = LeNet().eval().to(memory_format=torch.channels_last)
        self.net.load_state_dict({name.removeprefix("net."): weights[name] for name in weights if "net." in name})
        data = FashionMNISTDataModule(str(DATA), val_size=val_size)
        data.setup("fit")
        self.train, self.images, self.labels = data.train_set, data.val_set.images, data.val_set.labels
        with torch.no_grad():
            batches = [self.net(normalised(batch)) for batch in self.images.split(batch_size)]
        self.logits = torch.cat(batches)


@pytest.fixture(scope="module")
def apart(trained: Run) -> Apart:
    return Apart(trained.folder)


def read(folder: Path) -> EventAccumulator:
    everything = dict.fromkeys(("images", "scalars", "histograms", "tensors"), 0)
    return EventAccumulator(str(folder), size_guidance=everything).Reload()


def last_picture(events: EventAccumulator, tag: str) -> Tensor:
    return pixels(Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)))


def pixels(picture: Image.Image) -> Tensor:
    picture = picture.convert("RGB")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)


def test_every_tag_is_there_at_every_epoch(events: EventAccumulator, curves: dict[str, EventAccumulator]) -> None:
    tags = events.Tags()
    assert set(tags["scalars"]) == SCALARS
    for stage, stage_tags in CURVES.items():
        assert set(curves[stage].Tags()["scalars"]) == stage_tags
    assert set(tags["images"]) == EVERY_EPOCH | EXPLAINED | {"inputs/training_images"}
    assert tags["graph"]
    validated = [event.step for event in curves["val"].Scalars("curves/accuracy")]
    assert len(validated) == 3
    for tag in EVERY_EPOCH:
        assert [image.step for image in events.Images(tag)] == validated, tag
    for tag in EXPLAINED:
        step = validated[-1] if "validation" in tag else curves["test"].Scalars("curves/accuracy")[0].step
        assert [image.step for image in events.Images(tag)] == [step], tag
    for tag in CLASS_TAGS:
        assert [event.step for event in events.Scalars(tag)] == validated, tag


def test_validation_scalars_are_torchmetrics_values(
    events: EventAccumulator, curves: dict[str, EventAccumulator], apart: Apart
) -> None:
    expected = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average=None)
    for name, accuracy in zip(CLASS_NAMES, expected.tolist(), strict=True):
        assert events.Scalars(f"per_class_accuracy/{name}")[-1].value == pytest.approx(accuracy), name
    overall = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average="micro")
    assert curves["val"].Scalars("curves/accuracy")[-1].value == pytest.approx(overall.item())
    loss = F.cross_entropy(apart.logits, apart.labels)
    assert curves["val"].Scalars("curves/loss")[-1].value == pytest.approx(loss.item(), rel=1e-5)


def test_confusion_matrix_shows_torchmetrics_counts(events: EventAccumulator, apart: Apart) -> None:
    counts = multiclass_confusion_matrix(apart.logits, apart.labels, num_classes=10)
    assert counts.sum() == 297
    expected = pixels(drawing.confusion_matrix(counts, CLASS_NAMES))
    assert torch.equal(last_picture(events, "errors/confusion_matrix"), expected)
    assert not torch.equal(expected, pixels(drawing.confusion_matrix(counts.T, CLASS_NAMES)))


def test_most_confident_mistakes_are_the_most_confident_ones(events: EventAccumulator, apart: Apart) -> None:
    probabilities = apart.logits.softmax(dim=1)
    wrong = [index for index in range(297) if probabilities[index].argmax() != apart.labels[index]]
    worst = sorted(wrong, key=lambda index: -probabilities[index].max().item())[:16]
    assert len(worst) == 16
    expected = drawing.mistakes(
        apart.images[worst, 0],
        [CLASS_NAMES[label] for label in apart.labels[worst].tolist()],
        [CLASS_NAMES[guess] for guess in probabilities[worst].argmax(dim=1).tolist()],
        probabilities[worst].amax(dim=1).tolist(),
    )
    assert torch.equal(last_picture(events, "errors/most_confident"), pixels(expected))


@pytest.mark.skipif(not EXPLAINED, reason="captum is not installed")
def test_explained_mistakes_are_the_most_confident_ones(events: EventAccumulator, apart: Apart, trained: Run) -> None:
    """Of the last weights in validation; in the test, of the best ones, which are loaded for it."""
    data = FashionMNISTDataModule.load_from_checkpoint(trained.best, data_dir=str(DATA))
    data.setup("test")
    classifier = LitClassifier.load_from_checkpoint(trained.best)
    best, test_images = classifier.net, data.test_set.images
    with torch.no_grad():
        test_logits = torch.cat([best(normalised(batch)) for batch in test_images.split(32)])
    for stage, net, images, labels, logits in (
        ("validation", apart.net, apart.images, apart.labels, apart.logits),
        ("test", best, test_images, data.test_set.labels, test_logits / classifier.temperature),  # as predict shows it
    ):
        sure, guesses = logits.softmax(dim=1).max(dim=1)
        worst = (sure * (guesses != labels)).argsort(descending=True, stable=True)[:8].tolist()
        mistakes = [Mistake(i, int(labels[i]), int(guesses[i]), float(sure[i])) for i in worst]
        expected = explain_mistakes(net, data, images[worst, 0], mistakes, CLASS_NAMES)
        quantized = pixels(expected.quantize(256, dither=Image.Dither.NONE))
        assert torch.equal(last_picture(events, f"errors/most_confident_explained_{stage}"), quantized)


def without_captum() -> None:
    sys.modules["captum"] = None  # type: ignore[assignment]


def test_without_captum_nothing_is_explained_and_nothing_said(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 1 --batch_size 250 --accelerator cpu --devices 1"
    answer = run_forked("fit", *flags.split(), f"--data_dir={DATA}", folder=tmp_path, prepare=without_captum)
    assert (answer.code, answer.err) == (0, "")
    assert "captum" not in answer.out
    tags = read(tmp_path / "logs" / "lenet" / "version_0").Tags()["images"]
    assert set(tags) == EVERY_EPOCH | {"inputs/training_images"}


def test_filters_are_the_weights_and_change(events: EventAccumulator, apart: Apart) -> None:
    expected = pixels(drawing.filters(apart.net.features[0].weight.detach()))
    assert torch.equal(last_picture(events, "filters/first_layer"), expected)
    first, *_, last = (image.encoded_image_string for image in events.Images("filters/first_layer"))
    assert first != last


@pytest.mark.parametrize(("tag", "layers"), FEATURE_MAPS.items())
def test_feature_maps_are_the_outputs_of_the_stages(
    events: EventAccumulator, apart: Apart, tag: str, layers: int
) -> None:
    with torch.no_grad():
        maps = apart.net.features[:layers](normalised(apart.images[:1]))[0]
    assert torch.equal(last_picture(events, tag), pixels(feature_maps(maps)))


def test_inputs_are_the_first_training_batch(events: EventAccumulator, apart: Apart) -> None:
    order = torch.randperm(len(apart.train), generator=torch.Generator().manual_seed(0))[:16]  # seed 0, epoch 0
    names = [CLASS_NAMES[label] for label in apart.train.labels[order].tolist()]
    expected = drawing.inputs(normalised(apart.train.images[order]), names)
    assert torch.equal(last_picture(events, "inputs/training_images"), pixels(expected))
    assert len(events.Images("inputs/training_images")) == 1


def test_graph_has_all_layers_and_parameters(events: EventAccumulator) -> None:
    graph = events.Graph()
    nodes = {node.name: node for node in graph.node}
    chain = ["images", *(node.name for node in graph.node if re.match(r"\d\d_", node.name)), "logits"]
    assert [node.name for node in graph.node] == chain
    assert [list(node.input) for node in graph.node] == [[], *([name] for name in chain[:-1])]
    assert sum(node.attr["parameters"].i for node in graph.node) == 61_706
    assert shape(nodes["04_Conv2d/features.3"]) == [1, 16, 10, 10]


def shape(node: Any) -> list[int]:
    return [dim.size for dim in node.attr["_output_shapes"].list.shape[0].dim]


def test_graph_of_branches_joins_them() -> None:
    graph: GraphDef = network_graph(GoogLeNet(), (1, 96, 96))
    nodes = {node.name: node for node in graph.node}
    joint = nodes["features.stage3/0_Inception/cat_0"]
    assert len(joint.input) == 4
    assert shape(joint) == [1, 256, 12, 12]
    heads = [node.name for node in graph.node if list(node.input) == ["features.stage2/2_MaxPool2d"]]
    assert len(heads) == 4
    assert sum(node.attr["parameters"].i for node in graph.node) == 5_977_530


def test_graph_leaves_the_network_as_it_was() -> None:
    net = GoogLeNet(batch_norm=True).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    network_graph(net, (1, 96, 96))
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_one_chart_shows_the_curves_of_all_stages_and_errors_stand_before_feature_maps(
    trained: Run, curves: dict[str, EventAccumulator], events: EventAccumulator
) -> None:
    """TensorBoard draws the folders that share a tag in one chart, and sorts the charts and pictures by tag."""
    recorded = json.loads((trained.folder / "record.json").read_text(encoding="utf-8"))
    for stage in ("train", "val"):
        for metric in ("loss", "accuracy"):
            values = [event.value for event in curves[stage].Scalars(f"curves/{metric}")]
            assert values == pytest.approx([epoch[f"{stage}/{metric}"] for epoch in recorded["epochs"]])
    for metric in ("loss", "accuracy"):
        tested = [event.value for event in curves["test"].Scalars(f"curves/{metric}")]
        assert tested == pytest.approx([recorded["test"][metric]])
    rates = [event.value for event in events.Scalars("learning_rate/AdamW")]
    assert rates[-1] < max(rates) <= 0.005  # the recipe's schedule ends low
    assert [len(events.Scalars(f"speed/{name}")) for name in ("images_per_second", "epoch_seconds")] == [3, 3]
    steps = [[event.step for event in curves[stage].Scalars("curves/loss")] for stage in ("train", "val")]
    assert steps[0] == steps[1]
    best = [event.value for event in curves["val"].Scalars("curves/max_accuracy")]
    assert best == sorted(best)
    assert best[-1] == pytest.approx(recorded["best_val_accuracy"])
    tags = sorted(events.Tags()["images"] + sorted({*events.Tags()["scalars"], *CURVES["val"], *CURVES["train"]}))
    groups = list(dict.fromkeys(tag.partition("/")[0] for tag in tags))
    expected = ["curves", "errors", "filters", "inputs", "learning_rate", "per_class_accuracy", "speed", "stages"]
    assert groups == expected


def test_hyperparameters_have_the_curves_as_metrics(
    events: EventAccumulator, curves: dict[str, EventAccumulator]
) -> None:
    metadata = events.summary_metadata["_hparams_/experiment"]
    experiment = HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    metrics = {info.display_name: info.name for info in experiment.metric_infos}
    assert list(metrics) == ["test accuracy", "test loss", "val max accuracy"]
    assert all(curves[name.group].Scalars(name.tag) for name in metrics.values())
    first = {info.name for info in experiment.hparam_infos if info.differs}
    assert first == {"recipe", "model.optimizer.lr", "data.batch_size", "max_epochs", "seed"}
    start = events.summary_metadata["_hparams_/session_start_info"]
    values = HParamsPluginData.FromString(start.plugin_data.content).session_start_info.hparams
    assert values["recipe"].string_value == "lenet"
    assert values["data.batch_size"].number_value == 32


@pytest.mark.parametrize(
    ("flags", "images"),
    [("--trainer.check_val_every_n_epoch 2 --trainer.limit_val_batches 3", 96), ("--trainer.limit_val_batches 0", 0)],
)
def test_the_record_says_how_many_images_a_validation_takes(flags: str, images: int, tmp_path: Path) -> None:
    fast = "--max_epochs 2 --batch_size 32 --trainer.limit_train_batches 1 --trainer.logger false"
    arguments = f"--model lenet --val_size 297 --accelerator cpu --devices 1 --data_dir {DATA} {fast} {flags}"
    answer = run_forked("fit", *arguments.split(), folder=tmp_path)
    assert answer.code == 0, answer.err
    (path,) = tmp_path.rglob("record.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["val_images"], ["val/loss" in epoch for epoch in record["epochs"]]) == (images, [False, images > 0])


@pytest.mark.slow
def test_machines_without_a_shared_disk_each_write_their_predictions(trained: Run, tmp_path: Path) -> None:
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    flags = f"--ckpt_path={trained.best} --data_dir={DATA} --accelerator=cpu --devices=1 --num_nodes=2".split()
    command, machines = [sys.executable, str(REPO / "train.py"), "predict", *flags], []
    for number in range(2):
        (tmp_path / str(number)).mkdir()  # stands for the machine's disk: the file's path is relative
        environment = ENVIRONMENT | meeting | {"NODE_RANK": str(number)}
        machines.append(subprocess.Popen(command, cwd=tmp_path / str(number), env=environment))
    try:
        assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    files = [tmp_path / f"{number}/outputs/predict_0/predictions-{number}.csv" for number in range(2)]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert sorted(int(line.partition(",")[0]) for line in lines) == list(range(500))


def test_a_long_run_draws_about_ten_times(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 25 --accelerator cpu --devices 1 --patience 21 --lr 1e-12"
    fast = "--trainer.limit_train_batches 1 --trainer.limit_val_batches 1 --batch_size 297"
    answer = run_forked("fit", *flags.split(), *fast.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events = read(folder)
    # After the first epoch, every third, and the 22nd, with which the run ends early; steps count from 0.
    drawn = [0, 2, 5, 8, 11, 14, 17, 20, 21]
    for tag in EVERY_EPOCH:
        assert [image.step for image in events.Images(tag)] == drawn, tag
    assert [event.step for event in events.Scalars("per_class_accuracy/Bag")] == list(range(22))
    pictures_size = sum(len(image.encoded_image_string) for tag in EVERY_EPOCH for image in events.Images(tag))
    size = sum(path.stat().st_size for path in folder.glob("events*"))
    assert size - pictures_size < 22 * 3_000 + 60_000  # an epoch's scalars, and what is there once


@pytest.mark.parametrize(("epochs", "times"), [(3, 3), (10, 10), (11, 7), (200, 11), (1000, 11), (-1, 10)])
def test_number_of_times_that_pictures_are_drawn(epochs: int, times: int) -> None:
    drawn = [epoch for epoch in range(1, (epochs if epochs > 0 else 1000) + 1) if is_drawn(epoch, epochs)]
    assert len(drawn) == times
    assert drawn[0] == 1
    assert drawn[-1] == epochs or epochs < 0


def test_pictures_do_not_change_training(trained: Run, tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 3 --batch_size 32 --accelerator cpu --devices 1 --precision 32"
    answer = run_forked("fit", *flags.split(), f"--data_dir={DATA}", "--trainer.logger=false", folder=tmp_path)
    assert answer.code == 0, answer.err
    (plain,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(plain, weights_only=True)["state_dict"]
    pictured = torch.load(trained.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert weights.keys() == pictured.keys()
    assert all(torch.equal(weights[name], pictured[name]) for name in weights)


def test_histograms_on_request_and_without_validation(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 0 --max_epochs 1 --batch_size 100 --accelerator cpu --devices 1 --histograms"
    answer = run_forked(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events = read(folder)
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    names = [name.removeprefix("net.") for name in weights if name.startswith("net.")]
    tags = {f"{kind}/{name}" for kind in ("weights", "gradient_norms") for name in names}
    assert set(events.Tags()["histograms"]) == tags
    shown = events.Histograms("weights/features.0.weight")[-1].histogram_value
    expected = weights["net.features.0.weight"]
    assert (shown.min, shown.max, shown.num) == pytest.approx((expected.min().item(), expected.max().item(), 150))
    norms = events.Histograms("gradient_norms/classifier.5.bias")[-1].histogram_value
    assert norms.num == 15  # 1,500 images in steps of 100
    assert norms.min > 0
    assert "errors/confusion_matrix" not in events.Tags()["images"]
    assert FEATURE_MAPS.keys() < set(events.Tags()["images"])


@pytest.mark.slow
def test_two_processes_count_every_image_once(tmp_path: Path) -> None:
    flags = "--model lenet --val_size 297 --max_epochs 1 --batch_size 32 --accelerator cpu --devices 2 --precision 32"
    answer = run_forked(*flags.split(), f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err
    folder = tmp_path / "logs" / "lenet" / "version_0"
    events, apart = read(folder), Apart(folder)
    counts = multiclass_confusion_matrix(apart.logits, apart.labels, num_classes=10)
    expected = pixels(drawing.confusion_matrix(counts, CLASS_NAMES))
    assert torch.equal(last_picture(events, "errors/confusion_matrix"), expected)
    for tag in ("errors/most_confident", *EXPLAINED):
        assert len(events.Images(tag)) == 1, tag
    per_class = multiclass_accuracy(apart.logits, apart.labels, num_classes=10, average=None)
    assert events.Scalars("per_class_accuracy/Bag")[-1].value == pytest.approx(per_class[8].item())


def test_grid_places_tiles_row_by_row() -> None:
    tiles = torch.arange(1, 4, dtype=torch.uint8)[:, None, None].expand(3, 2, 2)
    grid = pixels(grid_of(tiles, columns=2, scale=2, background=9))[:, :, 0]
    assert grid.shape == (4 + 2 + 4, 4 + 2 + 4)
    assert grid[:4, :4].unique().tolist() == [1]
    assert grid[:4, 6:].unique().tolist() == [2]
    assert grid[6:, :4].unique().tolist() == [3]
    assert grid[4:6].unique().tolist() == [9]
    assert grid[6:, 6:].unique().tolist() == [9]


def test_filters_show_zero_as_grey_and_each_at_full_contrast() -> None:
    weight = torch.zeros(2, 1, 1, 2)
    weight[0, 0, 0, 0], weight[1, 0, 0, 0] = 0.5, -3.0
    picture = pixels(drawing.filters(weight))[:, :, 0]
    levels = picture.unique().tolist()
    assert levels == [0, 128, 255]
    assert drawing.filters(torch.randn(96, 3, 11, 11)).mode == "RGB"


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_feature_maps_without_contrast_are_drawn(value: float) -> None:
    picture = feature_maps(torch.full((5, 6, 6), value))
    assert pixels(picture)[0, 0].tolist() == [68, 1, 84]


def test_confusion_matrix_is_blue_where_right_and_orange_where_wrong() -> None:
    picture = pixels(drawing.confusion_matrix(torch.tensor([[10, 0], [5, 5]]), ["first", "second"])).int()
    cell, left, head = 36, 86, 84
    corners = picture[head + 2 :: cell, left + 2 :: cell][:2, :2]  # where no digit stands
    red, blue = corners[..., 0], corners[..., 2]
    assert (blue > red).tolist() == [[True, False], [False, True]]
    assert corners[0, 1].tolist() == [255, 255, 255]
    assert red[1, 0] > blue[1, 0]


def test_a_class_without_images_has_no_accuracy() -> None:
    picture = pixels(drawing.confusion_matrix(torch.tensor([[0, 3], [0, 0]]), ["first", "second"]))
    cell, left, head = 36, 86, 84
    none_right, no_images = ((picture[head + row * cell :][:cell, left + 2 * cell :] < 128).sum() for row in range(2))
    assert 0 < no_images < none_right / 4  # "-" and "0.0%"


def test_confusion_matrix_of_many_classes_stays_small() -> None:
    picture = drawing.confusion_matrix(3 * torch.eye(1000, dtype=torch.long), [f"class {i}" for i in range(1000)])
    assert max(picture.size) < 1600
    seen = pixels(picture)[84:, 86:1086].int()
    assert (seen[..., 2] > seen[..., 0] + 99).nonzero()[:, 0].tolist() == list(range(1000))  # a blue diagonal


def test_no_mistakes_is_said() -> None:
    picture = drawing.mistakes(torch.empty(0, 28, 28, dtype=torch.uint8), [], [], [])
    assert (pixels(picture) < 128).any()


def test_large_inputs_are_shrunk_and_small_ones_enlarged() -> None:
    large = drawing.enlarge(torch.randint(0, 256, (2, 224, 224), dtype=torch.uint8))
    assert large.shape == (2, 112, 112)
    small = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert torch.equal(drawing.enlarge(small)[:, ::4, ::4], small)


def test_compiled_and_plain_networks_have_one_graph() -> None:
    net: Any = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 3))
    plain = network_graph(net, (1, 8, 8))
    net.compile()
    assert network_graph(net, (1, 8, 8)) == plain


# ---- VGG from ImageNet weights, and convolutions that are frozen first; without a network, on weights made here.

MEAN, STD = 0.449, 0.226
NOWHERE = "http://127.0.0.1:9/"  # where nobody listens


def weights(name):
    return get_model_weights(name)["IMAGENET1K_V1"]


def write_weights(folder, name):
    """A file like torchvision's, named by its content; its linear layers share a few numbers, so that it is small."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in get_model(name).state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        if key.startswith("classifier") and len(shape) == 2:
            state[key] = (torch.randn(sum(shape)) / 100).as_strided(shape, (1, 1))
        elif "num_batches" not in key:  # which batch normalisation lacked when torchvision's files were made
            state[key] = torch.rand(shape) + 0.5 if "running_var" in key else torch.randn(shape)
            if len(shape) == 4:
                state[key] *= (2 / (9 * shape[1])) ** 0.5
    path = folder / "weights.pth"
    torch.save(state, path)
    return path.rename(folder / f"{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")


def use(home, urls):
    """Have torch.hub keep its files in `home`, and torchvision look for weights at these addresses."""
    os.environ["TORCH_HOME"] = str(home)
    for name, url in urls.items():
        weights(name).value.url = url


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A TORCH_HOME with the weights of vgg11 and vgg11_bn."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("vgg11", "vgg11_bn"):
        write_weights(folder / "hub" / "checkpoints", name)
    yield folder
    shutil.rmtree(folder)


def urls_of(home):
    files = (home / "hub" / "checkpoints").glob("*.pth")
    return {path.name.rpartition("-")[0]: NOWHERE + path.name for path in files}


@pytest.fixture
def cache(home, monkeypatch):
    """The same home, in this process; returns the weights by name."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    for name, url in urls_of(home).items():
        monkeypatch.setattr(weights(name).value, "url", url)
    files = (home / "hub" / "checkpoints").glob("*.pth")
    return {path.name.rpartition("-")[0]: torch.load(path, weights_only=True) for path in files}


def vgg(**arguments):
    """Without drawing weights, which takes longer than all the rest."""
    with torch.device("meta"):
        net = VGG(11, **arguments)
    net.to_empty(device="cpu")
    for tensor in net.state_dict().values():
        tensor.zero_()
    return net.eval()


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_are_those_of_the_same_network(depth, batch_norm):
    with torch.device("meta"):
        net = VGG(depth, batch_norm=batch_norm, image_size=32)
    assert str(_weights_for(net)) == f"VGG{depth}{'_BN' * batch_norm}_Weights.IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("batch_norm", "channels", "mean", "std"), [(False, 1, MEAN, STD), (True, 1, 0.0, 1.0), (False, 3, 0.3, 0.5)]
)
def test_features_of_a_grey_image_are_torchvisions(cache, batch_norm, channels, mean, std):
    """At 224, where what the first convolution sees around the image reaches all but the middle 3x3 of the features."""
    name = "vgg11_bn" if batch_norm else "vgg11"
    net = vgg(batch_norm=batch_norm, in_channels=channels)
    line = start_from_imagenet(net, mean, std)
    with torch.device("meta"):
        theirs = get_model(name).features.eval()
    features = {key.removeprefix("features."): t for key, t in cache[name].items() if key.startswith("features.")}
    theirs.load_state_dict(features, strict=False, assign=True)
    grey = torch.rand(1, 1, 224, 224, generator=torch.Generator().manual_seed(0))
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    with torch.no_grad():
        found = net.features(((grey - mean) / std).expand(-1, channels, -1, -1))
        expected = theirs((grey.expand(-1, 3, -1, -1) - imagenet[0]) / imagenet[1])
    assert expected[..., 2:5, 2:5].std() > 0.01
    torch.testing.assert_close(
        found[..., 2:5, 2:5], expected[..., 2:5, 2:5], rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )
    for key in ("classifier.0", "classifier.3"):
        for kind in ("weight", "bias"):
            assert torch.equal(net.state_dict()[f"{key}.{kind}"], cache[name][f"{key}.{kind}"])
    assert not net.classifier[6].weight.any()
    assert line == f"Starting from {weights(name)}: convolutions and hidden layers; the last layer is new"


def test_sum_over_rgb_is_exact_where_the_channels_are_normalised_alike(cache):
    weight, bias = (cache["vgg11"][f"features.0.{kind}"].double() for kind in ("weight", "bias"))
    fitted = _first_convolution(weight, bias, 1, shift=torch.zeros(3), scale=torch.ones(3))
    grey = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(grey, *fitted, padding=1), F.conv2d(grey.expand(-1, 3, -1, -1), weight, bias, padding=1)
    )


def test_another_image_size_gets_a_new_classifier(cache):
    net = vgg(image_size=64)
    line = start_from_imagenet(net, MEAN, STD)
    assert torch.equal(net.features[3].weight, cache["vgg11"]["features.3.weight"])
    assert not any(parameter.any() for parameter in net.classifier.parameters())
    assert line.endswith(": convolutions; the classifier is new: ImageNet's has hidden layers for images of 224x224")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        (LeNet, {}, "ImageNet weights for VGG-11, 13, 16 and 19, not for LeNet; use --model pretrained/vgg16"),
        (NiN, {}, "not for NiN"),
        (VGG, {"width_divisor": 8}, "features.0.weight is (8, 1, 3, 3) in this network, (64, 3, 3, 3) in ImageNet's"),
        (VGG, {"in_channels": 2}, "features.0.weight is (64, 2, 3, 3)"),
    ],
)
def test_wrong_network(network, arguments, says):
    with torch.device("meta"):
        net = network(**arguments)
    with pytest.raises(UserError, match="--pretrained") as error:
        start_from_imagenet(net, MEAN, STD)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cached_file_of_other_content_is_named_and_not_used(cache, home, tmp_path, monkeypatch):
    name = Path(weights("vgg11").url).name
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    content = (home / "hub" / "checkpoints" / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="delete it, and it will be fetched again") as error:
        start_from_imagenet(vgg(image_size=32), MEAN, STD)
    assert str(error.value).startswith(f"{folder / name} is damaged or a different file: its SHA-256 begins with ")
    assert f"not {name[-12:-4]}" in str(error.value)


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and counts."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(home):
    """The address of the weights."""
    Files.asked.clear()
    handler = partial(Files, directory=str(home / "hub" / "checkpoints"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()
        thread.join()


def test_one_fetches_and_the_others_wait(cache, server, tmp_path, monkeypatch, capsys):
    name = Path(weights("vgg11").url).name
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights("vgg11").value, "url", server + name)
    nets = [vgg(image_size=32) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda net: start_from_imagenet(net, MEAN, STD), nets))
    assert Files.asked == [f"/{name}"]
    assert all(torch.equal(net.features[3].weight, cache["vgg11"]["features.3.weight"]) for net in nets)


@pytest.mark.parametrize(
    ("name", "says"),
    [("vgg11-00000000.pth", "404"), ("vgg11-11111111.pth", "invalid hash value"), (None, "Connection refused")],
)
def test_what_cannot_be_fetched(home, server, name, says, tmp_path, monkeypatch, capsys):
    if name == "vgg11-11111111.pth":
        (home / "hub" / "checkpoints" / name).write_bytes(b"something else")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights("vgg11").value, "url", server + name if name else f"{NOWHERE}vgg11-22222222.pth")
    with pytest.raises(UserError, match=says) as error:
        start_from_imagenet(vgg(image_size=32), MEAN, STD)
    (home / "hub" / "checkpoints" / "vgg11-11111111.pth").unlink(missing_ok=True)
    folder = tmp_path / "hub" / "checkpoints"
    assert str(error.value).startswith(f"--pretrained needs {folder}/vgg11-")
    assert "\n" not in str(error.value)
    assert not [path for path in folder.iterdir() if path.suffix != ".lock"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_recipe_trains_and_its_checkpoint_needs_no_weights(home, cache, tmp_path):
    recipe = ["--model", "pretrained/vgg16", "--model.net.depth=11", "--image_size=32", "--data_dir", str(DATA)]
    fast = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--max_epochs=1", "--val_size=200"]
    here = partial(use, home, urls_of(home))
    nowhere = partial(use, tmp_path, {"vgg11": f"{NOWHERE}vgg11-22222222.pth"})
    answer = run_forked("fit", *recipe, *fast, folder=tmp_path, prepare=here)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("Starting from VGG11_Weights.IMAGENET1K_V1: convolutions; the classifier is new")
    path = tmp_path / "logs" / "pretrained" / "vgg16" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["net.features.3.weight"], cache["vgg11"]["features.3.weight"])  # frozen

    answer = run_forked("test", "--ckpt_path", str(path), folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err) == (0, "")
    answer = run_forked("fit", "--ckpt_path", str(path), *fast[:2], folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err) == (0, "")
    assert "Starting" not in answer.out
    record = yaml.safe_load((path.parents[1] / "record.json").read_text())
    assert record["config"]["pretrained"] is True
    answer = run_forked("fit", *recipe, *fast, folder=tmp_path, prepare=nowhere)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "Connection refused; try again when online" in answer.err
    assert [run.name for run in (tmp_path / "logs" / "pretrained" / "vgg16").iterdir()] == ["version_0"]
    shutil.rmtree(tmp_path / "logs")


# --- freezing --------------------------------------------------------------------------------------------------------


def narrow(folder, *, epochs=1, lr_factor=0.1, net=None, optimizer=None):
    """An experiment of three epochs of five batches with a narrow VGG that is frozen in the first."""
    write(folder, image_size=32)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    arguments = {"depth": 11, "width_divisor": 16, "batch_norm": True}
    recipe["model"]["net"] = {"class_path": "models.vgg.VGG", "init_args": net or arguments}
    recipe["model"]["optimizer"] = optimizer or recipe["model"]["optimizer"]
    settings = {"epochs": epochs, "lr_factor": lr_factor}
    callback = {"class_path": "callbacks.fine_tuning.FreezeFeatures", "init_args": settings}
    recipe["trainer"]["callbacks"].insert(0, callback)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def changed(first, second):
    """Which parts of the network differ."""
    names = differences(first["state_dict"], second["state_dict"])
    return {name.split(".")[2] for name in names if name.startswith(".net.")}


def test_a_second_fit_freezes_again():
    model = LitClassifier(VGG(depth=11, width_divisor=16))
    trainer: Any = SimpleNamespace(world_size=1, is_global_zero=True)
    for _ in range(2):
        FreezeFeatures(epochs=1, lr_factor=0.1).setup(trainer, model, "fit")
        groups = model.optimizer(model.parameters()).param_groups
        assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-4])


def test_freezing_unfreezing_and_continuing_in_both_phases(tmp_path):
    whole, parts = narrow(tmp_path / "whole"), narrow(tmp_path / "parts")
    assert train(whole).code == 0
    saved: list[dict] = []
    more = drawn = ["--trainer.logger", "true"]  # whose graph is drawn with the network as it then is
    for point in (["train", 0, 0, 0], ["train", 0, 4, 0], ["train", 1, 0, 0], ["train", 1, 3, 0]):
        answer = train(parts, *more, at=point)
        assert answer.code == 143, answer.err
        saved.append(checkpoint(parts))
        more = [*drawn, "--ckpt_path", str(SAVED / "last.ckpt")]
    answer = train(parts, *more)
    assert answer.code == 0, answer.err
    assert changed(saved[0], saved[1]) == {"classifier"}  # batch normalisation's statistics included
    assert changed(saved[1], saved[2]) == {"features", "classifier"}
    for state in saved:  # the schedule moves both
        rates = {group["name"]: group["lr"] for group in state["optimizer_states"][0]["param_groups"]}
        assert rates["features"] == pytest.approx(0.1 * rates["classifier"])
    assert not [d for key in COMPUTED for d in differences(checkpoint(whole)[key], checkpoint(parts)[key], key)]


def test_processes_train_what_was_unfrozen_together(tmp_path):
    """Two processes compute what one does with batches of twice the size."""
    plain = {"depth": 11, "width_divisor": 16, "dropout": 0.0}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    begin, one, two = (narrow(tmp_path / name, net=plain, optimizer=sgd, lr_factor=0.5) for name in ("0", "1", "2"))
    # Batches of one size, whose mean is the whole's, and nothing that processes draw for themselves.
    same = ("--val_size=250", "--model.mixup=0", "--model.cutmix=0", "--model.initialization=he", "--precision=32")
    assert train(begin, *same, "--batch_size", "250", at=["train", 1, 0, 0]).code == 143
    start = checkpoint(begin)["state_dict"]
    assert train(one, *same, "--batch_size", "250").code == 0
    answer = train(two, *same, "--batch_size", "125", "--devices", "2")
    assert answer.code == 0, answer.err
    expected, found = checkpoint(one)["state_dict"], checkpoint(two)["state_dict"]
    for name in ("net.features.0.weight", "net.features.18.weight", "net.classifier.6.weight"):
        moved = (expected[name] - start[name]).norm()
        assert (found[name] - expected[name]).norm() < 0.01 * moved


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trainer.callbacks.lr_factor=0", "FreezeFeatures: lr_factor=0.0 must lie above 0"),
        ("--trainer.callbacks.epochs=-1", "FreezeFeatures: epochs=-1 must be at least 0"),
        ("--model.net=torchvision.models.resnet18 --data.channels=3 --model.net.num_classes=10", "no part called feat"),
        ("--model.scheduler=OneCycleLR --model.scheduler.max_lr=0.01", "take one that has no max_lr"),
        ("--model.net=models.nin.NiN --image_size=67", "NiN has no weights but its features"),
        ("--model.optimizer=LBFGS --model.scheduler=null", "take another optimizer, such as AdamW"),
    ],
)
def test_mistakes_of_freezing(flags, says, tmp_path):
    callback = "--trainer.callbacks=callbacks.fine_tuning.FreezeFeatures"
    answer = run_forked(
        "--model", "lenet", f"--data_dir={DATA}", "--val_size=200", callback, *flags.split(), folder=tmp_path
    )
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert says in answer.err


def test_a_continued_run_keeps_its_freezing(tmp_path):
    folder = narrow(tmp_path / "run")
    assert train(folder, at=["train", 0, 0, 0]).code == 143
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("lr_factor: 0.1", "lr_factor: 0.5"))
    answer = train(folder, "--ckpt_path", str(SAVED / "last.ckpt"))
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer
    assert "the checkpoint was made with trainer.callbacks=" in answer.err


# ---- What a terminal shows while a run works.


def on_a_terminal(*arguments: str, folder: Path, columns: int = 80, code: int = 0) -> str:
    """All that train.py writes to a terminal of so many columns."""
    end, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    command = [sys.executable, str(REPO / "train.py"), *arguments]
    # Pytest's own processes are told a width in COLUMNS, which would count for more than the terminal's.
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES")}
    environment["TERM"] = "xterm-256color"
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=child, stderr=child, stdin=child)
    os.close(child)
    written = b""
    with suppress(OSError):  # Linux's way to say that the other end is closed
        while data := os.read(end, 65536):
            written += data
    os.close(end)
    assert process.wait(60) == code, written.decode()
    return written.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.long)])
def test_a_terminal_shows_one_line_an_epoch(columns: int, tmp_path: Path) -> None:
    recipe = (
        "--model=lenet",
        "--val_size=200",
        "--max_epochs=2",
        "--batch_size=16",
        "--accelerator=cpu",
        "--devices=1",
    )
    written = on_a_terminal(*recipe, f"--data_dir={DATA}", folder=tmp_path, columns=columns)
    # A bar of one line goes back to that line's beginning; one of several would go up by lines too.
    assert written.count("\x1b[1A") <= 3  # one for each bar that is removed: two epochs and the test
    assert "\x1b[2A" not in written
    drawn = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", written)]
    assert max(len(line) for line in drawn if line.startswith(("epoch", "test"))) <= columns
    bars = [line for line in drawn if line.startswith("epoch 2/2 ") and line.rstrip().endswith("left")]
    assert any(re.search(r"━.* loss \d\.\d{4}  [\d,]+ images/s ", line) for line in bars)
    results = [line for line in drawn if re.match(r"epoch \d/2  train loss", line)]
    assert [line[:9] for line in results] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r"val loss \d\.\d{4} accuracy 0\.\d{4}", line) for line in results)
    assert all((" lr " in line) == (columns == 120) for line in results)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_an_epoch_that_is_continued_has_its_bar(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, at=["train", 1, 2, 0]).code == 143
    (folder / "command.json").write_text("{}")
    written = on_a_terminal(*flags("--ckpt_path", "last"), folder=folder)
    assert re.search(r"epoch 2/3 [^\r\n]*━", written), written


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_run_that_is_ended_at_once_leaves_the_terminal_its_cursor(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    (folder / "command.json").write_text(json.dumps({"at": ["train", 0, 1, 0], "signals": 2 * [signal.SIGINT]}))
    written = on_a_terminal(*flags(), folder=folder, code=130)
    hidden, shown = (written.rfind(f"\x1b[?25{letter}") for letter in "lh")
    assert 0 < hidden < shown


def test_ddp_takes_the_hook_that_orders_its_sums():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net, images = torch.nn.Linear(4, 2), torch.randn(3, 4)
        (expected,) = torch.autograd.grad(net(images).sum(), net.weight)
        parallel = torch.nn.parallel.DistributedDataParallel(net)
        parallel.register_comm_hook(torch.distributed.group.WORLD, ordered_mean)
        parallel(images).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert net.weight.grad is not None and torch.equal(net.weight.grad, expected)
