"""What several test files share: processes that run train.py, and one trained run."""

import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; idle OpenMP threads spin

import pytest
from commands import DATA, Answer, run, start_server


class Run(NamedTuple):
    """A finished `python train.py --model lenet`: where it was started, its folder, and what it printed."""

    start: Path
    folder: Path
    answer: Answer

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="session", autouse=True)
def _server() -> None:
    start_server()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs of LeNet on the sample; 297 validation images, so that no batch size divides them."""
    start = tmp_path_factory.mktemp("trained")
    flags = "--model lenet --val_size 297 --max_epochs 3 --batch_size 32 --accelerator cpu --devices 1"
    answer = run(*flags.split(), f"--data_dir={DATA}", folder=start)
    assert answer.code == 0, answer.err
    return Run(start, start / "logs" / "lenet" / "version_0", answer)
