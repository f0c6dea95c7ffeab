"""Signals end a run in good order; a process that dies takes the others with it."""

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from commands import DATA, run_forked
from stoppable import checkpoint, finish, start, train, write

MINUTE = 60.0
CONTINUE = re.compile(r"Continue with: python train\.py (.*)")


@pytest.mark.parametrize(
    ("signum", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGUSR1, 143, "SIGUSR1")],
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
    # The command as it stands; without a logger there is no run's folder in which "last" could be looked for.
    command = [token if token != "last" else "checkpoints/last.ckpt" for token in shlex.split(match[1])]
    assert command[-2] == "--ckpt_path"
    answer = run_forked(*command, folder=folder)
    assert answer.code == 0, answer.err
    assert checkpoint(folder)["global_step"] == 15


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
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_testing_ends_at_once(signum: signal.Signals, code: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert train(folder, "--max_epochs", "1").code == 0
    (folder / "command.json").write_text(f'{{"at": ["test", 0, 1, 0], "signals": [{int(signum)}]}}')
    arguments = ["test", "--model", "recipe.yaml", "--data_dir", str(DATA), "--max_epochs", "1"]
    answer = run_forked(*arguments, "--ckpt_path", "checkpoints/last.ckpt", folder=folder)
    assert answer.code == code, answer
    assert answer.err.strip().splitlines()[-1].startswith("Stopped by")
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(("devices", "signum", "code"), [(1, signal.SIGTERM, 143), (2, signal.SIGINT, 130)])
def test_signal_to_the_whole_group_with_workers(
    devices: int, signum: signal.Signals, code: int, tmp_path: Path
) -> None:
    """As a terminal sends Ctrl-C: to the processes and to the loaders' workers alike."""
    folder = write(tmp_path / "run", num_workers=2)
    process = start(folder, "--devices", str(devices), "--batch_size", str(250 // devices))
    os.killpg(process.pid, signum)
    began = time.monotonic()
    answer = finish(process, timeout=MINUTE)
    assert answer.code == code, answer.err
    assert time.monotonic() - began < 30
    assert "Traceback" not in answer.err
    assert answer.err.count("Stopped by") == 1
    assert checkpoint(folder)["global_step"] > 5


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_process_ends_the_others(victim: int, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", batch_size=125)
    process = start(folder, "--devices", "2")
    other = int(_children(process.pid)[0])
    began = time.monotonic()
    os.kill(other if victim else process.pid, signal.SIGKILL)
    answer = finish(process, timeout=MINUTE)  # reads until the last process has closed its output
    assert time.monotonic() - began < MINUTE
    assert answer.code == (1 if victim else -signal.SIGKILL)
    lines = [line for line in answer.err.splitlines() if "error" in line]
    assert len(lines) == 1, answer.err
    assert f"process {victim} {'was killed by SIGKILL' if victim else 'is gone'}" in lines[0]
    assert "Traceback" not in answer.err
    assert not Path(f"/proc/{other}").exists() or Path(f"/proc/{other}/stat").read_text().split()[2] == "Z"
    assert checkpoint(folder)["global_step"] == 5


def test_slurm_job_is_saved_and_requeued(tmp_path: Path) -> None:
    """With a stand-in for `scontrol`, which is not on this machine; Lightning's SLURM environment is the real one."""
    folder = write(tmp_path / "run")
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "train"}
    job |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    process = start(folder, environment={**job, "PATH": f"{scontrol.parent}:{os.environ['PATH']}"})
    os.kill(process.pid, signal.SIGUSR1)
    answer = finish(process, timeout=MINUTE)
    assert answer.code == 143, answer.err
    assert "requeued" in answer.err and "Traceback" not in answer.err
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "17"]
    assert checkpoint(folder)["global_step"] > 5
    assert (folder / "hpc_ckpt_1.ckpt").is_file()  # from which Lightning continues the job by itself


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
