"""Checkpoint files: written so that a crash loses nothing, read without trust."""

import codecs
import copy
import errno
import fcntl
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import yaml
from audited import use_everywhere
from commands import DATA, ENVIRONMENT, REPO, read_only_folder, run_forked
from conftest import Run, examples
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from stoppable import SAVED, differences, flags, train, write
from torch.optim import lr_scheduler

import compare
import export
import models
from checkpoints.plain import plain_settings, read_settings, recipe_name
from checkpoints.reading import read_checkpoint
from checkpoints.state import _checkpoints, _MisfitError, _optimizer, _schedule
from checkpoints.trust import Trusted, find
from checkpoints.writing import AtomicCheckpointIO
from datamodules import FashionMNISTDataModule
from datamodules.files.finding import whole_below
from errors import RunError, UserError
from lit_modules import LitClassifier
from models.lenet import LeNet
from optimizers.muon import Muon

# ---- Checkpoints survive kills, full disks and damage.

SMALLEST: dict[str, Any] = {"state_dict": {"weight": torch.zeros(1)}}  # what is taken for a checkpoint


def keep_writing(path: Path) -> None:
    """Save ever new checkpoints of 8 MB, and note each that is done, until killed."""
    for step in itertools.count():
        state = {"state_dict": {"weights": torch.full((2_000_000,), float(step))}, "step": step}
        AtomicCheckpointIO().save_checkpoint(state, path.with_name("best.ckpt"))
        assert AtomicCheckpointIO().link_checkpoint(path.with_name("best.ckpt"), path)
        with path.with_suffix(".done").open("a") as done:
            done.write(f"{step}\n")


def test_kills_while_writing_leave_a_valid_checkpoint(tmp_path: Path) -> None:
    """A few kills at random moments; benchmarks/reliability.py does hundreds."""
    path = tmp_path / "last.ckpt"
    done = path.with_suffix(".done")
    for _ in range(6):
        done.unlink(missing_ok=True)
        writer = multiprocessing.get_context("forkserver").Process(target=keep_writing, args=(path,))
        writer.start()
        deadline = time.monotonic() + 60
        while not (done.exists() and "\n" in done.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        writer.kill()
        writer.join()
        for written in (path, path.with_name("best.ckpt")):
            content = read_checkpoint(written)
            assert content["step"] >= max(int(line) for line in done.read_text().split("\n")[:-1])
            assert (content["state_dict"]["weights"] == content["step"]).all()


def test_leftovers_of_killed_processes_are_removed_but_not_those_of_living_ones(tmp_path: Path) -> None:
    stale = tmp_path / "last.ckpt.12345678.partial"
    stale.write_bytes(b"half a checkpoint")
    living = tmp_path / "last.ckpt.87654321.partial"
    hold = f"import fcntl, time; file = open({str(living)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
    hold += "print(1, flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        assert holder.stdout
        holder.stdout.readline()
        AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", living.name]
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc, to see which files are open")
def test_no_open_file_is_renamed(like_windows: None, tmp_path: Path) -> None:
    stale = tmp_path / "last.ckpt.12345678.partial"
    stale.write_bytes(b"half a checkpoint")
    with stale.open("rb"), pytest.raises(PermissionError):
        stale.replace(tmp_path / "other")
    for step in range(2):
        state = SMALLEST | {"step": step}
        AtomicCheckpointIO().save_checkpoint(state, tmp_path / "best.ckpt")
        assert AtomicCheckpointIO().link_checkpoint(tmp_path / "best.ckpt", tmp_path / "last.ckpt")
        assert read_checkpoint(tmp_path / "last.ckpt") == state
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    reader = (tmp_path / "last.ckpt").open("rb")
    threading.Timer(0.3, reader.close).start()
    AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")  # waits for the reader
    with (tmp_path / "last.ckpt").open("rb"), pytest.raises(RunError, match="is open; the checkpoint saved before it"):
        AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")


def test_file_systems_without_locks_are_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    (living := tmp_path / "last.ckpt.12345678.partial").touch()
    monkeypatch.setattr(fcntl, "flock", refuse)
    AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == SMALLEST
    assert living.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_checkpoint_does_not_pass_through_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", None)
    AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == SMALLEST


def test_loading_never_unpickles_objects(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not (tmp_path / "executed").exists()


def shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


def test_file_that_can_not_be_written_whole_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, at=["train", 1, 1, 0]).code == 143
    before = (folder / SAVED / "last.ckpt").read_bytes()
    (folder / "command.json").write_text("{}")
    command = [sys.executable, str(REPO / "train.py"), *flags("--ckpt_path", "last")]
    (folder / "seen-0").unlink()
    done = shell(f"ulimit -f 40; {' '.join(command)}", folder)  # files of 40 KiB at most
    assert done.returncode == 1, done.stderr
    assert "can't be written: File too large; the checkpoint saved before it is untouched" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (folder / SAVED / "last.ckpt").read_bytes() == before
    assert sorted(path.name for path in (folder / SAVED).iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs Linux's user namespaces, to mount a small disk",
)
def test_full_disk(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, at=["train", 1, 0, 0]).code == 143
    for name in ("seen-0", SAVED / "best.ckpt"):
        (folder / name).unlink()
    disk = tmp_path / "disk"
    disk.mkdir()
    (folder / "command.json").write_text("{}")
    command = " ".join([sys.executable, str(REPO / "train.py"), *flags("--ckpt_path", "last")])
    mount = f"mount -t tmpfs -o size=160k tmpfs {disk} && cp -r {folder}/. {disk} && cd {disk}"
    done = shell(
        f"unshare -rm bash -c '{mount} && {command}; code=$?; sha256sum {SAVED}/last.ckpt; exit $code'", tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "can't be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    digest = subprocess.run(["sha256sum", folder / SAVED / "last.ckpt"], capture_output=True, text=True).stdout
    assert done.stdout.split()[-2] == digest.split()[0]


def test_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="can't be written"):
        AtomicCheckpointIO().save_checkpoint(SMALLEST, tmp_path / "checkpoints" / "last.ckpt")


def test_read_only_folder() -> None:
    with read_only_folder() as folder:
        assert not list(folder.iterdir())
        with pytest.raises(RunError, match="Permission denied; nothing was saved before"):
            AtomicCheckpointIO().save_checkpoint(SMALLEST, folder / "last.ckpt")


def test_last_falls_back_to_the_newest_valid_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    logged = ("--trainer.logger", "true", "--log_dir", "runs")
    assert train(folder, *logged, at=["train", 1, 1, 0]).code == 143
    saved = folder / "runs" / "recipe" / "version_0" / "checkpoints"
    newer = folder / "runs" / "recipe" / "version_1" / "checkpoints"
    shutil.copytree(saved, newer)
    with (newer / "last.ckpt").open("r+b") as file:
        file.truncate(20_000)
    (newer / "best.ckpt").write_bytes(b"")
    answer = train(folder, *logged, "--ckpt_path", "last")
    assert answer.code == 0, answer.err
    warning = [line for line in answer.err.splitlines() if "warning" in line]
    assert len(warning) == 1 and "version_1" in warning[0] and "version_0/checkpoints/last.ckpt" in warning[0]
    assert torch.load(saved / "last.ckpt", weights_only=True)["global_step"] == 15


def test_no_valid_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    saved = folder / "runs" / "recipe" / "version_0" / "checkpoints"
    saved.mkdir(parents=True)
    (saved / "last.ckpt").write_bytes(b"")
    answer = train(folder, "--log_dir", "runs", "--ckpt_path", "last")
    assert answer.code == 2
    assert answer.err.strip().endswith("last.ckpt is empty")


def test_last_is_saved_after_every_epoch_not_only_the_best(tmp_path: Path) -> None:
    arguments = ["fit", "--model", "lenet", "--data_dir", str(DATA), "--val_size", "200", "--max_epochs", "2"]
    answer = run_forked(*arguments, "--lr", "1e-12", "--trainer.logger", "false", folder=tmp_path)
    assert answer.code == 0, answer.err
    saved = tmp_path / "logs" / "lenet" / "version_0" / "checkpoints"
    assert torch.load(saved / "last.ckpt", weights_only=True)["epoch"] == 1
    assert torch.load(saved / "best.ckpt", weights_only=True)["epoch"] == 0


def refuse_links() -> None:
    """As file systems do that have no hard links."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    os.link = refuse  # type: ignore[assignment]


@pytest.mark.parametrize("prepare", [None, refuse_links])
def test_epoch_that_is_best_and_last_is_written_once_where_files_can_have_two_names(
    prepare: Callable[[], None] | None, tmp_path: Path
) -> None:
    arguments = ["fit", "--model", "lenet", "--data_dir", str(DATA), "--val_size", "200", "--max_epochs", "1"]
    answer = run_forked(*arguments, "--trainer.logger", "false", folder=tmp_path, prepare=prepare)
    assert answer.code == 0, answer.err
    saved = tmp_path / "logs" / "lenet" / "version_0" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert (saved / "best.ckpt").samefile(saved / "last.ckpt") == (prepare is None)
    assert read_checkpoint(saved / "last.ckpt")["global_step"] == read_checkpoint(saved / "best.ckpt")["global_step"]


# ---- Nothing that a checkpoint or a record holds is executed or imported, wherever it is read.

# Imported, it leaves a file beside itself.
MODULE = """
from pathlib import Path
from torch import nn
Path(__file__).with_name("executed").touch()

class Net(nn.Module):
    pass
"""
NAMED = "names the class"
# Ways to make the parser import `planted` in the place of the network's class, and what refuses them.
NETWORKS: dict[str, Any] = {
    "class path": {"class_path": "planted.Net"},
    "plain name": "planted.Net",
    "YAML": '{"class_path": "planted\\x2eNet"}',
    "file of settings": "settings",
    "argument of a trusted class": {"class_path": "torch.nn.Sequential", "init_args": {"a": ["planted.Net"]}},
    "class that a trusted module imports": {"class_path": "torch.hub.Request"},
    "no text": {"class_path": 5},
}


class Payload:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a module in it that shows when it was imported."""
    (tmp_path / "planted.py").write_text(MODULE)
    (tmp_path / "settings").write_text("class_path: planted.Net\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    return tmp_path


def spoilt(trained: Run, **changes: Any) -> dict[str, Any]:
    """The checkpoint with settings of its own, both in its configuration and in its hyper-parameters."""
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    for name, value in changes.items():
        section = {"batch_size": "data", "callbacks": "trainer", "devices": "trainer"}.get(name, "model")
        config[section][name] = value
        key = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}.get(section)
        if key:
            content[key][name] = value
    return content | {"config": yaml.safe_dump(config)}


def check(folder: Path, error: str, expected: str) -> None:
    assert expected in error
    assert len(error.splitlines()) == 1
    assert not (folder / "executed").exists()


def exported(path: str) -> None:
    assert export.main([f"--ckpt_path={path}", "--format=torch_export"]) == 2


class LongBytes:
    """A few bytes that are read as gigabytes."""

    def __init__(self, called: Callable, *arguments: Any) -> None:
        self.call = called, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        LongBytes(bytearray, 10**9),
        LongBytes(torch.Tensor, 100_000, 50_000),
        LongBytes(torch.FloatTensor, 100_000, 50_000),
        LongBytes(torch.UntypedStorage, 10**10),
        LongBytes(codecs.encode, LongBytes(codecs.encode, b"x", "hex_codec"), "hex-codec"),
    ],
)
def test_few_bytes_do_not_become_many(content: Any, trained: Run, folder: Path) -> None:
    torch.save(torch.load(trained.best, weights_only=True) | {"callbacks": {"Own": content}}, "spoilt.ckpt")
    with pytest.raises(UserError, match="holds objects that a checkpoint of this project never holds"):
        read_checkpoint("spoilt.ckpt")


def test_a_tensor_holds_no_more_than_its_file(trained: Run, folder: Path) -> None:
    content = torch.load(trained.best, weights_only=True)
    rare = {"counts": torch.tensor([0, 1, 2], dtype=torch.uint16)}  # whose storage is named otherwise than a float's
    AtomicCheckpointIO().save_checkpoint(content | {"state_dict": content["state_dict"] | rare}, "own.ckpt")
    assert read_checkpoint("own.ckpt")["state_dict"]["counts"].tolist() == [0, 1, 2]
    empty = LongBytes(torch.UntypedStorage, 10**9)
    huge = LongBytes(torch._utils._rebuild_tensor_v3, empty, 0, (10**9,), (1,), False, OrderedDict(), torch.uint8)
    torch.save(content | {"state_dict": content["state_dict"] | rare | {"huge": huge}}, "spoilt.ckpt")
    with pytest.raises(UserError, match=r"larger than itself|never holds|is damaged"):
        read_checkpoint("spoilt.ckpt")


def test_bytes_of_ones_own_are_read_again(trained: Run, folder: Path) -> None:
    states = {"callbacks": {"Own": {"a": b"\xff", "b": bytearray(b"\0")}}}
    AtomicCheckpointIO().save_checkpoint(torch.load(trained.best, weights_only=True) | states, "own.ckpt")
    assert read_checkpoint("own.ckpt")["callbacks"]["Own"] == {"a": b"\xff", "b": b"\0"}


@pytest.mark.parametrize("operations", [b"R.", b")\x81.", b"K\x01K\x02s.", b"t.", b""])
def test_any_other_pickle_is_damaged(operations: bytes, folder: Path) -> None:
    with zipfile.ZipFile("spoilt.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + operations)
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"is damaged or is not a checkpoint|never holds"):
        read_checkpoint("spoilt.ckpt")


@pytest.mark.parametrize(
    "net",
    [
        {"class_path": "torch.nn.ConvTranspose2d", "init_args": dict.fromkeys(("in_channels", "out_channels"), 1)},
        {"class_path": "torch.nn.Upsample"},
    ],
)
def test_one_image_does_not_become_many_numbers(
    net: dict[str, Any], trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = {"Upsample": {"scale_factor": 1000}, "ConvTranspose2d": {"kernel_size": 1, "stride": 1000}}
    net["init_args"] = net.get("init_args", {}) | large[net["class_path"].rpartition(".")[2]]
    torch.save(spoilt(trained, net=net), "spoilt.ckpt")
    exported("spoilt.ckpt")
    check(folder, capsys.readouterr().err, "makes far too many numbers of one image")


TRANSFORMER = {"nhead": 2, "num_decoder_layers": 1, "activation": "relu", "batch_first": True}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("models.LeNet", {"num_classes": 10**6}),
        ("torch.nn.LazyLinear", {"out_features": 2**20}),
        ("torch.nn.Transformer", {"d_model": 64, "num_encoder_layers": 100, **TRANSFORMER}),
        ("torch.nn.Transformer", {"d_model": 2, "dim_feedforward": 1, "num_encoder_layers": 10_000, **TRANSFORMER}),
    ],
)
def test_a_network_holds_no_more_than_its_file(name: str, arguments: dict[str, Any], trained: Run) -> None:
    """Which may show the same numbers under many names; layers may be copied, or know their size later."""
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    config["model"]["net"] = {"class_path": name, "init_args": arguments}
    one = max(content["state_dict"].values(), key=torch.Tensor.numel).flatten()
    shown = {str(number): one[number % 2 :] for number in range(10_000)}
    rules = Trusted("a.ckpt", False, "add --trust_checkpoint", shown, lambda folder: None)
    with pytest.raises(UserError, match="a larger network than the one whose weights it holds; add --trust_checkpoint"):
        rules.to_use(config)


PART = """
from torch import nn
from torchvision.models import alexnet

class Part(nn.Sequential):
    def __init__(self):
        end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10)
        super().__init__(nn.Conv2d(1, 3, 1), alexnet().features[:5], *end)

class Whole(Part):
    def __init__(self):
        super().__init__()
        self.add_module("whole", alexnet())
"""


def test_a_network_made_of_part_of_a_larger_one_is_loaded(
    trained: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    (folder / "part_of_alexnet.py").write_text(PART)
    weights = importlib.import_module("models.part_of_alexnet").Part().state_dict()
    kept = {"state_dict": {f"net.{name}": weight for name, weight in weights.items()}}
    torch.save(spoilt(trained, net={"class_path": "models.part_of_alexnet.Part"}) | kept, "own.ckpt")
    loaded = LitClassifier.load_from_checkpoint("own.ckpt").net.state_dict()
    assert not differences(dict(loaded), dict(weights))
    torch.save(spoilt(trained, net={"class_path": "models.part_of_alexnet.Whole"}) | kept, "own.ckpt")
    with pytest.raises(UserError, match="a larger network"):
        LitClassifier.load_from_checkpoint("own.ckpt")


@pytest.mark.parametrize("kind", NETWORKS)
def test_classes_from_elsewhere_are_not_imported(
    kind: str, trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(spoilt(trained, net=NETWORKS[kind]), "spoilt.ckpt")
    exported("spoilt.ckpt")
    check(folder, capsys.readouterr().err, NAMED)
    with pytest.raises(UserError) as caught:
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_subcommands_import_and_unpickle_nothing(subcommand: str, trained: Run, folder: Path) -> None:
    for content, expected in (
        (spoilt(trained, net="planted.Net"), NAMED),
        ({"state_dict": {}, "config": Payload()}, "holds objects that a checkpoint of this project never holds"),
    ):
        torch.save(content, "spoilt.ckpt")
        answer = run_forked(subcommand, "--ckpt_path=spoilt.ckpt", f"--data_dir={DATA}", folder=folder)
        assert answer.code == 2
        check(folder, answer.err, expected)


def test_training_goes_on_without_a_callback_from_elsewhere(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, callbacks=[{"class_path": "planted.Net"}]), "spoilt.ckpt")
    answer = run_forked("fit", "--ckpt_path=spoilt.ckpt", f"--data_dir={DATA}", folder=folder)
    assert answer.code == 2
    check(folder, answer.err, NAMED)


@pytest.mark.parametrize("subcommand", ["fit", "test"])
def test_last_imports_and_unpickles_nothing(subcommand: str, trained: Run, folder: Path) -> None:
    path = folder / "logs" / "lenet" / "version_0" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    for content, expected in (
        (spoilt(trained, net={"class_path": "planted.Net"}), "the checkpoint was made with"),
        ({"state_dict": {}, "config": Payload()}, "holds objects"),
    ):
        torch.save(content, path)
        answer = run_forked(subcommand, "--model=lenet", "--ckpt_path=last", f"--data_dir={DATA}", folder=folder)
        assert answer.code == 2
        check(folder, answer.err, expected)


@pytest.mark.parametrize("load", [LitClassifier.load_from_checkpoint, FashionMNISTDataModule.load_from_checkpoint])
@pytest.mark.parametrize("arguments", [{}, {"weights_only": False}, {"trust_checkpoint": True}])
def test_python_unpickles_nothing(load: Callable, arguments: dict, folder: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Payload()}, "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        load("spoilt.ckpt", **arguments)
    check(folder, str(caught.value), "holds objects")


@pytest.mark.parametrize("load", [LitClassifier.load_from_checkpoint, FashionMNISTDataModule.load_from_checkpoint])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("https://localhost/best.ckpt", "is an address; download the checkpoint first"),
        ("s3://bucket/best.ckpt", "is an address"),
        ("s3:/bucket/best.ckpt", "is an address"),
        ("C:/runs/gone.ckpt", "does not exist"),  # on Windows a drive
        (sys.stdin, "give its path"),
        ("gone.ckpt", "does not exist"),
    ],
)
def test_python_takes_files_alone(load: Callable, path: Any, expected: str, folder: Path) -> None:
    with pytest.raises(UserError, match=expected):
        load(path)


def test_data_module_imports_nothing(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, batch_size={"class_path": "planted.Net"}), "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        FashionMNISTDataModule.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


@pytest.mark.parametrize("key", ["_instantiator", "_class_path"])
def test_lightnings_own_entries_import_nothing(key: str, trained: Run, folder: Path) -> None:
    content = torch.load(trained.best, weights_only=True)
    content["hyper_parameters"][key] = "planted.Net"
    torch.save(content, "spoilt.ckpt")
    with pytest.raises(UserError) as caught:
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    check(folder, str(caught.value), NAMED)


def test_settings_within_themselves_are_refused(trained: Run, folder: Path) -> None:
    content = torch.load(trained.best, weights_only=True)
    endless: dict = {}
    content["hyper_parameters"]["net"] = endless["net"] = endless
    torch.save(content, "spoilt.ckpt")
    with pytest.raises(UserError, match="within themselves"):
        LitClassifier.load_from_checkpoint("spoilt.ckpt")
    torch.save(content | {"config": "model: &a {net: *a}\ndata: {}\n"}, "spoilt.ckpt")
    exported("spoilt.ckpt")


def test_a_trusted_checkpoint_may_name_any_class(trained: Run, folder: Path) -> None:
    """And the trap works: what the tests above look for does appear."""
    torch.save(spoilt(trained, net={"class_path": "planted.Net"}), "spoilt.ckpt")
    with pytest.raises(RuntimeError, match="Unexpected key"):  # the weights are those of LeNet
        LitClassifier.load_from_checkpoint("spoilt.ckpt", trust_checkpoint=True)
    assert (folder / "executed").exists()


def test_records_are_read_as_plain_values(trained: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((trained.folder / "record.json").read_text())
    record["config"]["model"]["net"] = {"class_path": "planted.Net"}
    (folder / "record.json").write_text(json.dumps(record))
    assert compare.main(["record.json"]) == 0
    assert "lenet" in capsys.readouterr().out
    assert not (folder / "executed").exists()


# ---- What a run saves is of use to it, whatever callbacks stand beside the project's.

KEEPER = """
import numpy as np
from pathlib import Path
from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback

class Keeper(Callback):
    def state_dict(self):
        return {"count": PositiveInt(3), "rate": np.float64(0.5), "path": Path("a"), "pairs": [(PositiveInt(1), "b")]}

class Hoarder(Callback):
    def state_dict(self):
        return {"parts": [range(3)]}
"""


def test_plain_values_of_a_callback_are_saved_as_such(tmp_path: Path) -> None:
    (tmp_path / "keeper.py").write_text(KEEPER)
    one_epoch = ["--max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--patience=3"]
    arguments = ["fit", "--model=lenet", f"--data_dir={DATA}", "--val_size=200", "--accelerator=cpu", *one_epoch]
    answer = run_forked(*arguments, "--trainer.callbacks=keeper.Keeper", folder=tmp_path)
    assert answer.code == 0, answer.err
    saved = tmp_path / "logs/lenet/version_0/checkpoints/last.ckpt"
    states = torch.load(saved, weights_only=True)["callbacks"]
    assert states["Keeper"] == {"count": 3, "rate": 0.5, "path": "a", "pairs": [(1, "b")]}
    assert type(states["Keeper"]["count"]) is int
    answer = run_forked(*arguments, "--trainer.callbacks=keeper.Hoarder", folder=tmp_path)
    assert answer.code == 2
    assert len(answer.err.strip().splitlines()) == 1 and "the callback Hoarder" in answer.err
    assert not (tmp_path / "logs/lenet/version_1/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("name", ["{epoch}", "{epoch}-{val/accuracy:.4f}"])  # the second is that of a sub-folder
def test_a_callback_goes_on_with_the_checkpoints_that_it_kept(name: str, tmp_path: Path) -> None:
    keeping = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/accuracy"]
    keeping += [f"--trainer.callbacks.filename={name}", "--trainer.callbacks.save_top_k=3"]
    arguments = ["fit", "--model=lenet_classic", f"--data_dir={DATA}", "--val_size=200", "--accelerator=cpu", *keeping]
    for more in (["--max_epochs=2"], ["--max_epochs=6", "--ckpt_path=last"]):
        answer = run_forked(*arguments, *more, folder=tmp_path)
        assert answer.code == 0, answer.err
    saved = tmp_path / "logs/lenet_classic/version_0"
    kept = [path for path in saved.rglob("*.ckpt") if path.name not in ("best.ckpt", "last.ckpt")]
    assert len(kept) == 3, sorted(saved.rglob("*.ckpt"))


def test_a_file_names_no_checkpoint_of_another_folder_among_the_best() -> None:
    """Which would be removed when better ones come."""
    score = torch.tensor(0.5)

    def best(path: str, filename: str | None) -> list[str]:
        callback = ModelCheckpoint("runs", filename, monitor="val/accuracy")
        state = callback.state_dict() | {"best_k_models": {path: score}, "kth_best_model_path": path}
        return list(_checkpoints(state, callback, SimpleNamespace(ckpt_path="runs/last.ckpt"))["best_k_models"])

    for path, filename in (("runs/a.ckpt", None), ("runs/epoch=1-val/accuracy=0.5.ckpt", "{epoch}-{val/accuracy}")):
        assert best(path, filename) == [os.path.realpath(path)]
    for path in ("runs/lenet/version_0/best.ckpt", "a.ckpt", "runs/../a.ckpt", "runs/a.txt", "runs/b/../../a.ckpt"):
        assert best(path, None) == best(path, "{epoch}-{val/accuracy}") == [], path


def test_the_best_checkpoint_is_the_projects_own(tmp_path: Path) -> None:
    """Not that of a callback of the user's own, which keeps every second step; here the last weights are bad."""
    schedule = ["torch.optim.lr_scheduler.StepLR", "--model.scheduler.step_size=1", "--model.scheduler.gamma=400"]
    more = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/accuracy"]
    more += ["--trainer.callbacks.mode=max", "--trainer.callbacks.save_top_k=-1"]
    data = [f"--data_dir={DATA}", "--val_size=200", "--accelerator=cpu"]
    arguments = ["--model=lenet", *data, "--max_epochs=2", "--model.scheduler", *schedule, *more]
    answer = run_forked(*arguments, "--model.scheduler_interval=epoch", folder=tmp_path)
    assert answer.code == 0, answer.err
    saved = tmp_path / "logs/lenet/version_0/checkpoints"
    assert len(list(saved.glob("*.ckpt"))) == 4
    assert "logs/lenet/version_0/checkpoints/best.ckpt" in answer.out
    losses = []
    for name in ("best", "last"):
        test = run_forked("test", f"--ckpt_path={saved / name}.ckpt", "--trust_checkpoint", *data[:1], folder=tmp_path)
        losses.append(test.out.strip().rpartition("loss ")[2])
    assert losses[0] != losses[1]
    assert f"loss {losses[0]}" in answer.out


def test_a_finished_run_that_is_continued_keeps_its_record(tmp_path: Path) -> None:
    one_epoch = ["--max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    arguments = ["--model=lenet", f"--data_dir={DATA}", "--val_size=200", "--accelerator=cpu", *one_epoch]
    assert run_forked(*arguments, folder=tmp_path).code == 0
    file = tmp_path / "logs/lenet/version_0/record.json"
    before = json.loads(file.read_text())
    assert run_forked("fit", *arguments, "--ckpt_path=last", folder=tmp_path).code == 0
    assert json.loads(file.read_text()) == before
    file.write_text('{"recipe": ')
    answer = run_forked("fit", *arguments, "--ckpt_path=last", folder=tmp_path)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert "logs/lenet/version_0/record.json is damaged" in answer.err
    assert file.read_text() == '{"recipe": '


def test_a_checkpoint_of_a_plain_trainer_can_be_loaded(tmp_path: Path) -> None:
    numbers: Any = {"mean": np.float64(0.25), "std": torch.tensor(0.5), "batch_size": np.int64(100)}
    data = FashionMNISTDataModule(data_dir=DATA, val_size=200, image_size=28, **numbers)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_epochs=1,
        limit_train_batches=2,
        limit_val_batches=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    classifier = LitClassifier(LeNet(), label_smoothing=np.float32(0.125))
    trainer.fit(classifier, data)
    assert trainer.test(datamodule=data, ckpt_path="best", verbose=False)
    (path,) = tmp_path.glob("checkpoints/*.ckpt")
    loaded = LitClassifier.load_from_checkpoint(path, net=LeNet())
    assert loaded.hparams["label_smoothing"] == 0.125
    again = FashionMNISTDataModule.load_from_checkpoint(path)
    assert (again.data_dir, again.hparams["mean"], again.hparams["std"]) == (DATA, 0.25, 0.5)
    assert not differences(dict(classifier.state_dict()), dict(loaded.state_dict()))
    answer = run_forked("test", "--model=lenet", f"--ckpt_path={path}", f"--data_dir={DATA}", folder=tmp_path)
    assert answer.code == 0, answer.err


def test_settings_that_would_need_unpickling_are_left_out() -> None:
    kind = IntEnum("kind", ["one"])
    given = {"path": Path("a"), "number": np.int64(2), "texts": ["b"], "names": {"c": (1, None)}, "on": True}
    unreadable = {"member": kind.one, "members": [kind.one], "inner": {"d": object()}, "array": np.zeros(2)}
    kept = plain_settings(given | unreadable)
    assert kept == {**given, "path": "a"} and type(kept["number"]) is int


# ---- What an early commit wrote: a run of LeNet on images of 12x12, and its last.ckpt as it was after epoch 1 of 2.


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder of a run that commit db6bc2e made."""
    run = tmp_path / "logs" / "lenet" / "version_0"
    (run / "checkpoints").mkdir(parents=True)
    for path in (DATA / "db6bc2e").iterdir():
        shutil.copy(path, run / "checkpoints" if path.suffix == ".ckpt" else run)
    return run


def test_old_checkpoints_are_measured_and_continued_and_old_records_compared(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert compare.main([]) == 0
    assert ".6460" in capfd.readouterr().out
    best, machine = f"--ckpt_path={old / 'checkpoints' / 'best.ckpt'}", (f"--data_dir={DATA}", "--accelerator=cpu")
    measured = run_forked("test", best, *machine, folder=tmp_path)
    assert re.fullmatch(r"test on 500 images: accuracy 0.64\d\d, loss 0.94\d\d\n", measured.out), measured
    predicted = run_forked("predict", best, *machine, folder=tmp_path)
    assert (predicted.code, len((tmp_path / "outputs/predict_0/predictions.csv").read_text().splitlines())) == (
        0,
        501,
    ), predicted.err
    assert export.main([best, "--format=torch_export", machine[0]]) == 0
    recipe = ("--model=lenet", "--batch_size=64", "--image_size=12", "--val_size=100", "--max_epochs=2")
    last = f"--ckpt_path={old / 'checkpoints' / 'last.ckpt'}"
    before = json.loads((old / "record.json").read_text())
    continued = run_forked(*recipe, *machine, last, folder=tmp_path)
    assert continued.code == 0, continued.err
    record = json.loads((old / "record.json").read_text())
    for epoch, then in zip(record["epochs"], before["epochs"], strict=True):
        assert epoch["train/loss"] == pytest.approx(then["train/loss"], rel=1e-3)
    assert record["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-2)


# ---- What a file from elsewhere may do: nothing.

FUNCTIONS = ("torch.distributed.run.main", "torch.hub.load", "torch.hub.load_state_dict_from_url", "os.system")
COMMAND = {"class_path": FUNCTIONS[0], "init_args": {"args": ["--no-python", "mkdir", "ran"]}}
MAY_BE_NAMED = {
    "net": ["models.lenet.LeNet", "models.LeNet", "torch.nn.Sequential", "torchvision.models.resnet18"],
    "optimizer": ["torch.optim.Adam", "torch.optim.LBFGS", "torch.optim.adamw.AdamW", "optimizers.muon.Muon"],
    "scheduler": [
        "lit_modules.schedules.WarmupDecay",
        "torch.optim.lr_scheduler.OneCycleLR",
        "lightning.pytorch.cli.ReduceLROnPlateau",
    ],
}
MAY_NOT_BE_NAMED = {
    "net": [
        *FUNCTIONS,
        "torch.nn.functional.relu",
        "torch.optim.Adam",
        "torch.nn.Parameter",
        "torchvision.models.get_model",
        "torchvision.models.get_weight",
        "torchvision.models.segmentation.fcn_resnet50",
        "lit_modules.LitClassifier",
        "models.lenet",
        "torch.nn.modules.module.Callable",
    ],
    "optimizer": [*FUNCTIONS, "torch.nn.Linear", "torch.optim.lr_scheduler.StepLR", "torch.optim.optimizer.Iterable"],
    "scheduler": [*FUNCTIONS, "torch.optim.Adam", "lit_modules.schedules.math", "lightning.pytorch.cli.LightningCLI"],
}


@pytest.mark.parametrize("part", MAY_BE_NAMED)
def test_a_file_names_classes_by_what_they_are(part: str) -> None:
    for name in MAY_BE_NAMED[part]:
        assert find(part, name) is not None, name
    wrong: list[Any] = [*MAY_NOT_BE_NAMED[part], "", "torch", None, 5, "torch.nn.\u1d38inear", "planted.Net"]
    for other in wrong:
        assert find(part, other) is None, other


@pytest.mark.parametrize("name", ["net.init_args.num_classes", "net.class_path", "image_size+"])
@pytest.mark.parametrize("part", ["model", "data"])
def test_a_file_gives_no_names_that_the_parser_takes_apart(part: str, name: str, trained: Run) -> None:
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    nested = yaml.safe_load(content["config"])
    config[part][name] = 10**8
    nested["model"]["net"]["init_args"] = {"x": [{name: 1}]}
    for one in (config, nested):
        for trust in (False, True):
            rules = Trusted("a.ckpt", trust, "add --trust_checkpoint", content["state_dict"], lambda folder: None)
            for check in (rules.to_use, rules.to_train):
                if trust:  # a dictionary of the user's own network may have such names
                    check(one)
                    continue
                with pytest.raises(UserError, match="holds a setting called"):
                    check(one)


@pytest.mark.parametrize("name", ["logger", "plugins"])
def test_a_file_names_no_logger_and_no_plugin(name: str, trained: Run) -> None:
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    rules = Trusted("a.ckpt", False, "add --trust_checkpoint", content["state_dict"], lambda folder: None)
    config["trainer"][name] = False
    assert rules.to_train(config)["trainer"][name] is False
    config["trainer"][name] = "WandbLogger"
    with pytest.raises(UserError, match="names the class WandbLogger"):
        rules.to_train(config)


@pytest.mark.parametrize(
    ("part", "arguments", "expected"),
    [
        ("net", {"num_classes": 10**9}, "1000000000 of something"),
        ("net", {"num_classes": "1e9"}, "names the class"),
        ("net", {"num_classes": 10**6}, "a larger network than the one whose weights it holds"),
        ("net", {"image_size": 20_000}, "a larger network"),
        ("net", {"weights": "DEFAULT"}, "weights from the network"),
        ("net", {"pretrained": True}, "weights from the network"),
        ("net", {"activation": "os.system"}, "names the class os.system"),
        ("net", {"activation": [{"class_path": "torch.hub.load"}]}, "names the class torch.hub.load"),
        ("optimizer", {"lr": {"class_path": "torch.load"}}, "names the class torch.load"),
        ("scheduler", {"lr_lambda": "os.system"}, "names the class os.system"),
    ],
)
def test_arguments_of_what_a_file_names(part: str, arguments: dict, expected: str, trained: Run) -> None:
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    named = config["model"][part] or {"class_path": "torch.optim.lr_scheduler.LambdaLR"}
    config["model"][part] = named | {"init_args": named.get("init_args", {}) | arguments}
    rules = Trusted("a.ckpt", False, "add --trust_checkpoint", content["state_dict"], lambda folder: None)
    with pytest.raises(UserError, match=expected):
        rules.to_train(config)
    if part == "net":
        with pytest.raises(UserError, match=expected):
            rules.to_use(config)
    else:
        assert part not in rules.to_use(config)["model"]


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("data", "image_size", 10**6),
        ("data", "batch_size", 10**8),
        ("data", "batch_size", "0x7fffffff"),
        ("data", "crop_padding", 10**5),
        ("trainer", "devices", 5000),
        ("trainer", "devices", "0x400"),
        ("trainer", "strategy", "deepspeed"),
        ("trainer", "strategy", {"class_path": "lightning.pytorch.strategies.DDPStrategy"}),
        ("trainer", "logger", {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}),
        ("trainer", "callbacks", [{"class_path": "callbacks.prediction_writer.PredictionWriter"}]),
        ("trainer", "callbacks", "planted.Net"),
        ("trainer", "plugins", ["planted.Net"]),
        ("trainer", "max_time", "planted.Net"),
        ("trainer", "max_time", "1:2:3:planted.Net"),
        ("trainer", "precision", "planted.Net"),
    ],
)
def test_settings_to_go_on_training_with(section: str, name: str, value: Any, trained: Run) -> None:
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    config[section][name] = value
    rules = Trusted("a.ckpt", False, "add --trust_checkpoint", content["state_dict"], lambda folder: None)
    with pytest.raises(UserError):
        rules.to_train(config)
    if section == "trainer" and name != "precision":  # of which a test needs nothing
        assert rules.to_use(config)["trainer"].keys() == {"precision"}


@pytest.mark.parametrize(
    ("name", "value"), [("max_time", "00:00:01:00"), ("val_check_interval", "00:00:15:00"), ("devices", "0,")]
)
def test_times_and_a_device_by_its_number_are_taken_over(name: str, value: str, trained: Run) -> None:
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    config["trainer"][name] = value
    rules = Trusted("a.ckpt", False, "", content["state_dict"], lambda folder: None)
    assert rules.to_train(config)["trainer"][name] == value


def test_devices_given_count_in_place_of_those_of_a_file(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, devices=[4999]), "spoilt.ckpt")
    command = ("fit", "--ckpt_path=spoilt.ckpt", f"--data_dir={DATA}", "--val_size=297", "--accelerator=cpu")
    answer = run_forked(*command, folder=folder)
    assert answer.code == 2
    check(folder, answer.err, "asks for the devices [4999], which this machine does not have; give --devices")
    answer = run_forked(*command, "--devices=1", folder=folder)
    assert (answer.code, answer.err) == (0, "")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "64-true", "bf16-mixed", "32", 16, None])
def test_precision_of_a_file(precision: str | int | None, trained: Run) -> None:
    """What the recipes and --precision leave in a checkpoint; a number as text is none of them."""
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"])
    config["trainer"]["precision"] = precision
    rules = Trusted("a.ckpt", False, "", content["state_dict"], lambda folder: None)
    if precision == "32":
        with pytest.raises(UserError):
            rules.to_use(config)
    else:
        assert rules.to_use(config)["trainer"] == {"precision": precision}
        assert rules.to_train(config)["trainer"]["precision"] == precision


def test_folders_and_processes_of_a_file(trained: Run, folder: Path) -> None:
    """Worker processes only as many as there are cores; folders only those that hold a data set, for reading."""
    content = torch.load(trained.best, weights_only=True)
    config = yaml.safe_load(content["config"]) | {"log_dir": "elsewhere"}
    config["data"] |= {"num_workers": 5000, "data_dir": str(folder)}
    config["trainer"]["default_root_dir"] = str(folder)
    rules = Trusted("a.ckpt", False, "", content["state_dict"], whole_below)
    wanted = rules.to_train(config)
    assert wanted["data"]["num_workers"] <= (os.cpu_count() or 1)
    assert "data_dir" not in wanted["data"] and "default_root_dir" not in wanted["trainer"]
    assert rules.to_use(config)["data"]["num_workers"] == 0
    config["data"]["data_dir"] = str(DATA)
    assert rules.to_use(config)["data"]["data_dir"] == str(DATA)
    asked: list[Path] = []
    for away in ("//host/share", "\\\\host\\share", "/\\host/share", "\\/host\\share"):  # as Windows reads them
        config["data"]["data_dir"] = away
        rules = Trusted("a.ckpt", False, "", content["state_dict"], lambda folder: asked.append(folder))
        assert "data_dir" not in rules.to_use(config)["data"]
    assert not asked
    rules = Trusted("a.ckpt", False, "", content["state_dict"], whole_below)
    (folder / "train-images-idx3-ubyte").write_bytes(b"another data set")
    config["data"]["data_dir"] = str(folder)
    assert "data_dir" not in rules.to_use(config)["data"]


LAUGHS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    "text",
    [
        f"{LAUGHS}model: {{net: *j}}\ndata: {{}}\n",
        "model: {net: " + "[" * 5000 + "]" * 5000 + "}\ndata: {}\n",
        "model: {}\ndata: {x: !!python/object/apply:os.system [id]}\n",
        "model: {}\ndata: {x: 0x" + "f" * 90 + "}\n",
        "model: {}\ndata: {x: 2020-01-01}\n",
        "model: {}\ndata: {}\nx: " + "y" * 10**6,
        "model: {}\ndata: {}\nx: " + "1:" * 10**5 + "1",
        "model: {}\ndata: {}\nx: " + "1:" * 400 + "1.0",
        5,
    ],
)
def test_yaml_of_a_checkpoint(text: Any) -> None:
    with pytest.raises(UserError):
        read_settings(text, "a.ckpt")


def test_the_settings_of_a_checkpoint_may_name_many_classes(tmp_path: Path) -> None:
    names = [f"some class, known by a rather long name: {number:05}" for number in range(20_000)]
    config = {"model": {}, "data": {"class_names": names}}
    checkpoint = SMALLEST | {"config": yaml.safe_dump(config), "datamodule_hyper_parameters": config["data"]}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    assert read_settings(read_checkpoint(tmp_path / "a.ckpt").get("config"), "a.ckpt") == config


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("best/lenet", "best/lenet"),
        ("/etc/passwd", "etc/passwd"),
        ("../../../escaped", "escaped"),
        ("C:\\a\\..\\b", "C_/a/b"),
        ("\x1b[31m", "__31m"),
        ("<b>", "_b_"),
        ("", "unnamed"),
        ("..", "unnamed"),
        (["a"], "unnamed"),
        (None, "unnamed"),
    ],
)
def test_name_of_the_recipe_in_a_checkpoint(stored: Any, expected: str) -> None:
    assert recipe_name({"recipe": stored}) == expected


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**9),
        torch.zeros(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        2**70,
        "x" * 3_000_000,
        [1, 2, 3, {4}],
        [[] for _ in range(300_000)],
    ],
)
def test_values_that_no_checkpoint_of_ours_holds(value: Any, trained: Run, tmp_path: Path) -> None:
    torch.save(torch.load(trained.best, weights_only=True) | {"more": value}, tmp_path / "a.ckpt")
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_packed_archive_is_refused(trained: Run, tmp_path: Path) -> None:
    """A few bytes of it could become as much as one likes."""
    with zipfile.ZipFile(trained.best) as source, zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as to:
        for entry in source.infolist():
            to.writestr(entry.filename, source.read(entry))
    with pytest.raises(UserError, match="damaged or is not a checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_an_optimizer_from_elsewhere_is_only_missed_in_training(trained: Run, folder: Path) -> None:
    torch.save(spoilt(trained, optimizer=COMMAND), "spoilt.ckpt")
    loaded = LitClassifier.load_from_checkpoint("spoilt.ckpt")
    assert loaded.probabilities(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    with pytest.raises(UserError, match="trust_checkpoint=True"):
        loaded.configure_optimizers()
    assert not (folder / "ran").exists()


def classes_of(module: Any, base: type) -> list[type]:
    found = (getattr(module, name) for name in dir(module))
    return [one for one in found if isinstance(one, type) and issubclass(one, base) and one is not base]


SCHEDULES: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda step: 0.9**step},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 10},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
    "ReduceLROnPlateau": {"patience": 1, "cooldown": 1},
    "PolynomialLR": {"total_iters": 20},
    "LinearLR": {"total_iters": 20},
}
MADE_OF_OTHERS = ("ChainedScheduler", "SequentialLR", "LRScheduler", "_LRScheduler")


@pytest.mark.parametrize(
    "name",
    [one.__name__ for one in classes_of(lr_scheduler, lr_scheduler.LRScheduler) if one.__name__ not in MADE_OF_OTHERS],
)
def test_every_schedule_of_torch_goes_on_where_it_was(name: str) -> None:
    """Only how far it has come is taken from a file, which must be all that changes."""

    def made() -> Any:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return getattr(lr_scheduler, name)(optimizer, **SCHEDULES.get(name, {}))

    def rates(scheduler: Any, steps: int) -> list[float]:
        found = []
        for step in range(steps):
            scheduler.optimizer.step()
            scheduler.step(*([float(step % 3)] if name == "ReduceLROnPlateau" else []))
            found.append(scheduler.optimizer.param_groups[0]["lr"])
        return found

    before = made()
    rates(before, 5)
    after = made()
    after.optimizer.load_state_dict(before.optimizer.state_dict())
    after.load_state_dict(_schedule(before.state_dict(), after, 5))
    assert after.last_epoch == before.last_epoch
    assert rates(after, 8) == rates(before, 8)


OPTIMIZERS = ["Adam", "AdamW", "SGD", "Adagrad", "Adafactor", "NAdam", "RMSprop", "Rprop", "LBFGS", "our Muon"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # LBFGS of torch 2.8
def test_state_of_an_optimizer_is_taken_over_or_refused(name: str) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))

        def optimizer(self, parameters: Any) -> Any:
            more = {"momentum": 0.9} if name == "SGD" else {}
            return getattr(torch.optim, name, Muon)(parameters, lr=0.01, **more)

    module = Module()
    optimizer = module.optimizer(module.parameters())

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = module.layers(torch.ones(1, 2, 4, 4)).square().sum()
        found.backward()
        return found

    for _ in range(2):
        optimizer.step(loss)
    state = optimizer.state_dict()
    kept = _optimizer(copy.deepcopy(state), module.optimizer(module.parameters()), module)
    assert not differences({"state": state["state"]}, {"state": kept["state"]})
    for number, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                for other in (torch.full((7,), 1e30), "text", torch.zeros(0)):
                    wrong = copy.deepcopy(state)
                    wrong["state"][number][key] = other
                    with pytest.raises(_MisfitError):
                        _optimizer(wrong, module.optimizer(module.parameters()), module)
    if name == "Adam":  # one number that is shown as many: a fused optimiser would read past its end
        wrong = copy.deepcopy(state)
        wrong["state"][0]["exp_avg"] = torch.zeros(1).expand(3, 2, 3, 3)
        kept = _optimizer(wrong, module.optimizer(module.parameters()), module)
        assert kept["state"][0]["exp_avg"].stride() == next(module.parameters()).stride()


class Remembering(torch.optim.Optimizer):
    """An optimiser of the user's own, which keeps the last gradients of each weight."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = {"last": torch.ones(7, *weight.shape), "note": "full"}


class Adapted(torch.optim.Adam):
    """Another, whose fused kernel looks at no shapes either."""


def test_only_its_author_knows_what_an_optimizer_of_the_users_own_keeps() -> None:
    for kind, wrong in ((Remembering, None), (Adapted, torch.ones(2))):
        weights = [torch.nn.Parameter(torch.ones(2, 3))]
        weights[0].grad = torch.ones(2, 3)
        optimizer = kind(weights)
        optimizer.step()
        state, module = optimizer.state_dict(), SimpleNamespace(optimizer=kind)
        assert not differences(state["state"], _optimizer(state, kind(weights), module)["state"])
        if wrong is not None:
            state["state"][0]["exp_avg"] = wrong
            with pytest.raises(_MisfitError):
                _optimizer(state, kind(weights), module)


# ---- The same by chance: one place of a good checkpoint holds something else.

TEXTS = (
    "planted.Net",
    "os.system",
    "torch.distributed.run.main",
    "torch.hub.load",
    "models.lenet.LeNet",
    "/etc/passwd",
    "../../victim",
    "local://../../victim",
    "s3://bucket/x",
    "\x1b]0;title\x07\x1b[31m",
    "a\nb\r\u2028c",
    "1e999",
    "0x7fffffffffff",
    "settings",
    "",
    "x" * 5000,
)
NUMBERS = (0, -1, 1, 2**31, 2**63 - 1, 2**64, 10**9, 10**30, 1e308, -1e308, float("inf"), float("nan"), True)
ODD: list[Any] = [
    None,
    [],
    {},
    COMMAND,
    [COMMAND],
    {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": "a/b", "model": "c"}},
    {"class_path": "torchvision.models.resnet18", "init_args": {"weights": "DEFAULT"}},
    {"class_path": "torch.nn.Module"},
    {"class_path": "models.lenet.LeNet", "init_args": {"num_classes": 10**9}},
    [[[[[[[[1]]]]]]]],
    list(range(1000)),
    (1, 2),
    torch.zeros(0),
    torch.full((3,), 1e30),
    torch.tensor(float("nan")),
    torch.zeros(2, 3, dtype=torch.int64),
    torch.zeros(1).expand(1000, 1000),
]
VALUES = st.one_of(st.sampled_from(TEXTS), st.sampled_from(NUMBERS), st.sampled_from(ODD), st.text(max_size=8))
KINDS = st.sampled_from(["replace", "replace", "replace", "delete", "rename", "add"])


def all_places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to each entry of nested mappings and lists."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from all_places(value, (*path, key))


def mutated(content: Any, where: float, kind: str, value: Any) -> None:
    """Do one thing to the entry of that share of all, in place; first the section is chosen, then the place in it."""
    sections = sorted(content)
    section = sections[int(where * len(sections))]
    places = [(section, *place) for place in all_places(content[section], ())] or [(section,)]
    *parents, key = places[int(where * len(sections) % 1 * len(places))]
    at = content
    for parent in parents:
        at = at[parent]
    if kind == "replace" or isinstance(at, list):
        at[key] = value
    elif kind == "delete":
        del at[key]
    elif kind == "rename":
        at[value if isinstance(value, str) else "other"] = at.pop(key)
    else:
        at["more"] = value


class Content(dict[str, Any]):
    """That of a checkpoint; Hypothesis prints it for each example."""

    def __repr__(self) -> str:
        return "the checkpoint"


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint with all that one can hold: averaged weights, a schedule, a best epoch; its configuration parsed."""
    flags = ["fit", "--model=lenet", f"--data_dir={DATA}", "--val_size=200", "--max_epochs=1", "--accelerator=cpu"]
    flags += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--log_dir=logs"]
    flags += ["--trainer.callbacks=callbacks.ema.EMA", "--model.scheduler=lit_modules.schedules.WarmupDecay"]
    folder = tmp_path_factory.mktemp("short")
    answer = run_forked(*flags, "--model.scheduler_interval=step", folder=folder)
    assert answer.code == 0, answer.err
    content = torch.load(folder / "logs/lenet/version_0/checkpoints/last.ckpt", weights_only=True)
    config = yaml.safe_load(content["config"])
    config["trainer"]["max_epochs"] = 2
    return Content(content | {"config": config})


def as_yaml(config: Any) -> Any:
    try:
        return yaml.safe_dump(config)
    except yaml.YAMLError:  # of a tensor
        return config


def used_everywhere(content: Any, folder: Path) -> None:
    """Whatever it holds: no traceback, no process, no connection, no file written or removed outside the run."""
    (folder / "victim").mkdir(parents=True)
    (folder / "victim" / "file").write_text("precious")
    (folder / "start").mkdir()
    (folder / "start" / "planted.py").write_text(MODULE)
    (folder / "start" / "settings").write_text("class_path: planted.Net\n")
    torch.save(content, folder / "start" / "spoilt.ckpt")
    answer = run_forked(folder=folder / "start", prepare=partial(use_everywhere, folder / "start"))
    said = answer.out + answer.err
    assert answer.code == 0, said
    for word in ("Traceback", "TRACEBACK", "AUDIT", "LINES", "CODE", "\x1b"):
        assert word not in said, said
    assert (folder / "victim" / "file").read_text() == "precious"
    assert {path.name for path in (folder / "start").iterdir()} <= {"planted.py", "settings", "spoilt.ckpt", "logs"}


def test_a_sound_checkpoint_is_used_without_a_word(short_run: dict[str, Any], tmp_path: Path) -> None:
    used_everywhere(short_run | {"config": as_yaml(short_run["config"])}, tmp_path / "case")
    assert len(list(tmp_path.glob("case/start/logs/lenet/version_0/checkpoints/*.ckpt"))) == 2


@examples(40)
@given(st.floats(0, 1, exclude_max=True), KINDS, VALUES)
def test_whatever_a_checkpoint_holds(
    short_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, where: float, kind: str, value: Any
) -> None:
    content = copy.deepcopy(short_run)
    mutated(content, where, kind, value)
    if "config" in content:
        content["config"] = as_yaml(content["config"])
    folder = tmp_path_factory.mktemp("spoilt")
    try:
        used_everywhere(content, folder / "case")
    finally:
        shutil.rmtree(folder)
