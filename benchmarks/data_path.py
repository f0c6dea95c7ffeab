"""Speed of the data path alone, from the files' bytes to augmented and resized batches, against PIL with workers.

Ours is the real data module; the other side is torchvision as usual, one PIL image at a time, in as many workers as
there are cores. On a GPU the share of AlexNet's step that the data path takes is measured too.

Command: python -m benchmarks.data_path --data_dir DIR
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.harness import side_by_side
from benchmarks.harness.our_turns import StepTurns, command
from benchmarks.harness.side_by_side import Contestant, Turns, contest, median, print_table, ratios, spread
from benchmarks.peers.plain_loops import WORKERS, PictureDataset, endless
from datamodules import FashionMNISTDataModule
from errors import run_program

SIZES = (28, 96, 224)
PADDING = 2
TARGETS = {28: 20}  # goal: how many times the images/s of PIL with workers
ALEXNET_SHARE = 0.05  # goal: of AlexNet's step, on a GPU


def ours(options: argparse.Namespace) -> None:
    """The data module as the Trainer uses it in training."""
    augmentation: dict[str, Any] = {"crop_padding": PADDING, "horizontal_flip": True}
    data = FashionMNISTDataModule(options.data_dir, options.batch_size, options.size[0], val_size=0, **augmentation)
    data.trainer = pl.Trainer(
        accelerator=options.accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    data.trainer.training = True
    data.prepare_data()
    data.setup("fit")
    turns = Turns(options.device)
    turns.wait()
    for batch in endless(data.train_dataloader()):
        moved = data.transfer_batch_to_device(batch, torch.device(options.device), 0)
        images, _ = data.on_after_batch_transfer(moved, 0)
        turns.step(len(images))


def pictures(options: argparse.Namespace) -> None:
    """One PIL image at a time, in worker processes."""
    steps = [transforms.RandomCrop(28, padding=PADDING), transforms.RandomHorizontalFlip()]
    steps += [transforms.Resize(options.size[0])] if options.size[0] != 28 else []
    data = PictureDataset(Path(options.data_dir), transforms.Compose([*steps, transforms.ToTensor()]))
    cuda = options.device == "cuda"
    loader = DataLoader(data, options.batch_size, shuffle=True, num_workers=WORKERS, pin_memory=cuda)
    turns = Turns(options.device)
    turns.wait()
    for batch in endless(loader):
        images, _ = (values.to(options.device, non_blocking=True) for values in batch)
        turns.step(len(images))


SIDES = {"ours": ours, "PIL": pictures}


def main() -> None:
    """Run one contest for each image size."""
    parser = side_by_side.Parser(__doc__, budget=60)
    parser.add_argument("--size", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--turn", type=float, default=2.0, help="seconds per turn (default: %(default)g)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        SIDES[options.side](options)
        return
    results, rows = [], []
    for size in options.size:
        batch = ["--batch_size", str(options.batch_size)]
        shared = ["-m", "benchmarks.data_path", *options.shared, *batch, "--size", str(size)]
        contestants = {side: partial(Contestant, [*shared, "--side", side]) for side in SIDES}
        if options.accelerator == "gpu" and size == 224:
            training = command(StepTurns, options, "--model", "alexnet", "--val_size", "0", *batch)
            contestants["AlexNet's training"] = partial(Contestant, training)
        turns, _ = contest(contestants, options.seconds / len(options.size), options.turn)
        times = ratios(turns["ours"], turns["PIL"])
        result = {"image_size": size, "turns": turns, "ours_over_pil": times, "target_ratio": TARGETS.get(size)}
        if "AlexNet's training" in turns:
            share = median(turns["AlexNet's training"]) / median(turns["ours"])
            result |= {"share_of_alexnet_step": share, "target_share_of_alexnet_step": ALEXNET_SHARE}
            print(f"The data path takes {share:.1%} of AlexNet's step.")
        results.append(result)
        rates = (f"{median(turns[side]):,.0f}" for side in ("ours", "PIL"))
        rows.append((size, *rates, spread(times, 1), len(turns["ours"])))
    print_table(f"image size | ours, images/s | PIL, {WORKERS} workers, images/s | ratio | rounds", rows)
    side_by_side.write_record("data_path", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.data_path", main))
