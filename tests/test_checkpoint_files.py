"""Checkpoints survive kills, full disks and damage."""

import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from commands import DATA, ENVIRONMENT, REPO, run_forked
from stoppable import checkpoint, flags, train, write

from checkpoints.reading import read_checkpoint
from checkpoints.writing import AtomicCheckpointIO
from errors import RunError


def keep_writing(path: Path) -> None:
    """Save ever new checkpoints of 8 MB, and note each that is done, until killed."""
    for step in itertools.count():
        state = {"state_dict": {"weights": torch.full((2_000_000,), float(step))}, "step": step}
        AtomicCheckpointIO().save_checkpoint(state, path)
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
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        writer.kill()
        writer.join()
        content = read_checkpoint(path)
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
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", living.name]
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    finally:
        os.umask(before)
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_checkpoint_does_not_pass_through_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    monkeypatch.setattr("tempfile.tempdir", None)
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert read_checkpoint(tmp_path / "last.ckpt") == {"state_dict": {}}


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
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "command.json").write_text("{}")
    command = [sys.executable, str(REPO / "train.py"), *flags("--ckpt_path", "checkpoints/last.ckpt")]
    (folder / "seen-0").unlink()
    done = shell(f"ulimit -f 40; {' '.join(command)}", folder)  # files of 40 KiB at most
    assert done.returncode == 1, done.stderr
    assert "can't be written: File too large; the checkpoint saved before it is untouched" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.skipif(
    sys.platform != "linux" or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0,
    reason="needs Linux's user namespaces, to mount a small disk",
)
def test_full_disk(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, "--max_epochs", "1", at=None).code == 0
    for name in ("seen-0", "checkpoints/best.ckpt"):
        (folder / name).unlink()
    disk = tmp_path / "disk"
    disk.mkdir()
    (folder / "command.json").write_text("{}")
    command = " ".join([sys.executable, str(REPO / "train.py"), *flags()])
    mount = f"mount -t tmpfs -o size=160k tmpfs {disk} && cp -r {folder}/. {disk} && cd {disk}"
    done = shell(
        f"unshare -rm bash -c '{mount} && {command}; code=$?; sha256sum checkpoints/last.ckpt; exit $code'", tmp_path
    )
    assert done.returncode == 1, done.stderr
    assert "can't be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    digest = subprocess.run(["sha256sum", folder / "checkpoints" / "last.ckpt"], capture_output=True, text=True).stdout
    assert done.stdout.split()[-2] == digest.split()[0]


def test_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="can't be written"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "checkpoints" / "last.ckpt")


def test_read_only_folder() -> None:
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own, which nobody else may enter
        Path(folder).chmod(0o555)
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            assert not list(Path(folder).iterdir())
            with pytest.raises(RunError, match="Permission denied; nothing was saved before"):
                AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, Path(folder) / "last.ckpt")
        finally:
            os.seteuid(user)


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
    assert checkpoint(tmp_path, "last")["epoch"] == 1
    assert checkpoint(tmp_path, "best")["epoch"] == 0
