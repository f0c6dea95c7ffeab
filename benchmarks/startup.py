"""How soon the command answers: help, plain mistakes, and LeNet's first optimiser step.

The yardstick for the last is `python -c "import lightning.pytorch.cli"`, without which LightningCLI can't start.

Command: python -m benchmarks.startup --data_dir DIR
"""

import os
import subprocess
import sys
import time
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import PROJECT, print_table, python_path
from errors import run_program

IMPORT = "import lightning.pytorch.cli"
ANSWER_LIMIT = 0.5  # goal: seconds for help and mistakes
FIRST_STEP_LIMIT = (1.25, 1.0)  # goal: at most this many times the import, plus seconds


class EndAfterFirstStep(Callback):
    """Ends the process after the first optimiser step."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the process: the step is done."""
        os._exit(0)


def main() -> None:
    """Run the commands in turn, repeatedly."""
    parser = side_by_side.Parser(__doc__, budget=75)
    options = parser.parse_args()
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        train = [str(PROJECT / "train.py")]
        step = ["fit", "--model", "lenet", *options.single, "--log_dir", folder, "--val_size", "100"]
        step += ["--trainer.callbacks+=benchmarks.startup.EndAfterFirstStep"]
        commands = {
            "train.py --help": ([*train, "--help"], 0),
            "train.py --model alexnett": ([*train, "--model", "alexnett"], 2),
            "train.py --model lenet --lr fast": ([*train, "--model", "lenet", "--lr", "fast"], 2),
            "import lightning.pytorch.cli": (["-c", IMPORT], 0),
            "train.py --model lenet, to the first optimiser step": ([*train, *step], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        begun, warm = time.monotonic(), False
        while not warm or not all(seconds.values()) or time.monotonic() - begun < options.seconds:
            for name, (command, code) in commands.items():
                start = time.perf_counter()
                environment = os.environ | {"PYTHONPATH": python_path()}
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
                if done.returncode != code:
                    raise RuntimeError(f"{name} ended with {done.returncode}, not {code}: {done.stderr[-2000:]}")
                if warm:  # the first round fills the file cache
                    seconds[name].append(time.perf_counter() - start)
            warm = True
    names = list(commands)
    factor, extra = FIRST_STEP_LIMIT
    limits = dict.fromkeys(names[:3], ANSWER_LIMIT) | {names[4]: factor * median(seconds[names[3]]) + extra}
    rows = []
    for name, values in seconds.items():
        limit = f"{limits[name]:.2f}" if name in limits else ""
        around = f"{min(values):.2f} to {max(values):.2f}"
        rows.append((name, f"{median(values):.2f}", around, limit, len(values)))
    print_table("command | seconds | range | target | rounds", rows)
    results = {name: {"seconds": values, "target": limits.get(name)} for name, values in seconds.items()}
    side_by_side.write_record("startup", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.startup", main))
