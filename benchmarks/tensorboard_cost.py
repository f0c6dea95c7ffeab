"""What TensorBoard's pictures cost: LeNet's epochs on the full data, with them and without.

"With" draws after every epoch; a run of more than ten epochs draws less often, and pays less. "Without" omits all
that `TensorBoardPictures`, `MistakesExplained` and `Confusion` do. What is drawn once per run is timed separately.

Command: python -m benchmarks.tensorboard_cost --data_dir DIR
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import side_by_side
from benchmarks.harness.our_turns import EPOCHS, EpochTurns, command
from benchmarks.harness.side_by_side import Contestant, contest, median, print_table, ratios, spread
from callbacks.tensorboard import drawing
from datamodules import CLASS_NAMES
from datamodules.files.finding import load, prepare
from errors import run_program
from inspection.graph import network_graph
from models import LeNet

TARGET = 1.03  # goal: at most this many times the epoch without
BATCH_SIZE = 256


def with_pictures(arguments: list[str]) -> int:
    """train.py, drawing after every epoch, however long the run."""
    import train
    from callbacks.tensorboard import pictures as tensorboard_pictures

    tensorboard_pictures.TIMES = EPOCHS
    return train.main(arguments)


def without_pictures(arguments: list[str]) -> int:
    """train.py without the callbacks that draw."""
    import train
    from callbacks.confusion import Confusion
    from callbacks.tensorboard.mistakes import MistakesExplained
    from callbacks.tensorboard.pictures import TensorBoardPictures
    from launch import classifier_cli, trainer

    drawing = (Confusion, MistakesExplained, TensorBoardPictures)

    class Bare(trainer.RunCallbacks):
        def _of_fit(self, *args: Any) -> list[Any]:
            return [callback for callback in super()._of_fit(*args) if not isinstance(callback, drawing)]

    classifier_cli.RunCallbacks = Bare  # type: ignore[misc]
    return train.main(arguments)


def once_seconds(data_dir: Path) -> float:
    """Seconds for what is drawn once per run."""
    images, labels = load(prepare(data_dir), "train")
    net = LeNet()
    network_graph(net, (1, 28, 28))  # as in a run, where the table of the stages has already loaded what this needs
    start = time.perf_counter()
    network_graph(net, (1, 28, 28))
    names = [CLASS_NAMES[label] for label in labels[:16].tolist()]
    drawing.inputs(images[:16, None] / torch.tensor(255.0), names)
    return time.perf_counter() - start


def main() -> int:
    """Run the contest."""
    if sys.argv[1:2] == ["--without"]:
        return without_pictures(sys.argv[2:])
    if sys.argv[1:2] == ["--with"]:
        return with_pictures(sys.argv[2:])
    options = side_by_side.Parser(__doc__, budget=160).parse_args()
    images, _ = load(prepare(Path(options.data_dir)), "train")
    settings = ["--model", "lenet", "--batch_size", str(BATCH_SIZE), "--val_size", str(len(images) // 12)]
    ours = command(EpochTurns, options, *settings)[2:]
    both = {
        name: partial(Contestant, ["-m", "benchmarks.tensorboard_cost", f"--{name}", *ours])
        for name in ("without", "with")
    }
    turns, _ = contest(both, options.seconds, turn=0.1, least_rounds=5)
    times = ratios(turns["without"], turns["with"])  # of rates: how many times the time it takes with pictures
    count = len(images) - len(images) // 12
    seconds = {name: count / median(reports) for name, reports in turns.items()}
    once = once_seconds(Path(options.data_dir))
    rows = [("without", f"{seconds['without']:.3f}", "", "")]
    rows.append(("with", f"{seconds['with']:.3f}", spread(times, 3), f"{TARGET:.2f}"))
    print_table("pictures | s an epoch | ratio (range) | target", rows)
    print(f"Once per run: {once:.3f} s, {once / seconds['without']:.1%} of an epoch")
    result = {"seconds": seconds, "ratio": times, "target": TARGET, "once_seconds": once, "turns": turns}
    side_by_side.write_record("tensorboard_cost", options, result)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.tensorboard_cost", main))
