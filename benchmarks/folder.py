"""Speed of training on a folder of pictures, against Fashion-MNIST at the same size, and torchvision's ImageFolder.

The network is that of fast/1min, made for colours, in float32; all three mirror half of the images. train.py has
decoded the folder before the first turn; ImageFolder, in a plain loop with as many workers as there are cores, does it
in every epoch again.

Command: python -m benchmarks.folder --folder path/to/photos --data_dir DIR
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.harness import side_by_side
from benchmarks.harness.our_turns import StepTurns, command
from benchmarks.harness.side_by_side import Contestant, Turns, contest, median, print_table, ratios, spread
from benchmarks.peers.plain_loops import WORKERS, endless
from cli.recipes import read_recipe
from errors import run_program
from models import VGG

RECIPE = "fast/1min"
LEAST = 0.95  # wanted: of the images/s on Fashion-MNIST


def image_folder(options: argparse.Namespace) -> None:
    """A plain loop over torchvision's ImageFolder, one PIL picture at a time in worker processes."""
    size, cuda = options.size, options.device == "cuda"
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomHorizontalFlip()]
    part = options.folder / "train"
    data = ImageFolder(part if part.is_dir() else options.folder, transforms.Compose([*steps, transforms.ToTensor()]))
    loader = DataLoader(
        data, options.batch_size, shuffle=True, num_workers=WORKERS, pin_memory=cuda, persistent_workers=True
    )
    settings = read_recipe(RECIPE)["model"]["net"]["init_args"]
    net = VGG(**settings | {"in_channels": 3, "image_size": size, "num_classes": len(data.classes)}).to(options.device)
    optimizer = torch.optim.AdamW(net.parameters())
    turns = Turns(options.device)
    turns.wait()
    for batch in endless(loader):
        images, labels = (values.to(options.device, non_blocking=True) for values in batch)
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        turns.step(len(labels))


def main() -> None:
    """Run the contest."""
    parser = side_by_side.Parser(__doc__, budget=120)
    parser.add_argument("--folder", type=Path, required=True, help="with a sub-folder of pictures for each class")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--turn", type=float, default=4.0, help="seconds per turn (default: %(default)g)")
    parser.add_argument("--image_folder", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if options.image_folder:
        image_folder(options)
        return
    size: list[Any] = ["--batch_size", str(options.batch_size)]
    peer = ["-m", "benchmarks.folder", *options.shared, *size, "--size", str(options.size), "--image_folder"]
    flags = [*size, "--model", RECIPE, "--image_size", str(options.size), "--precision", "32-true", "--val_size", "0"]
    with tempfile.TemporaryDirectory() as made:
        train = partial(command, StepTurns, options, *flags)
        commands = {
            "folder": train("--data", str(options.folder), "--data_dir", made),
            "Fashion-MNIST": train("--data.channels", "3", "--model.net.in_channels", "3"),
            "ImageFolder": [*peer, "--folder", str(options.folder)],
        }
        contestants = {name: partial(Contestant, arguments) for name, arguments in commands.items()}
        turns, _ = contest(contestants, options.seconds, options.turn)
    result: dict[str, Any] = {"image_size": options.size, "turns": turns, "least_over_fashion_mnist": LEAST}
    rows = [("the folder", f"{median(turns['folder']):,.0f}", "", len(turns["folder"]))]
    for name in ("Fashion-MNIST", "ImageFolder"):
        result[f"folder_over_{name}"] = times = ratios(turns["folder"], turns[name])
        rows.append((name, f"{median(turns[name]):,.0f}", spread(times), len(turns[name])))
    print_table("trained on | images/s | the folder is so many times as fast | rounds", rows)
    side_by_side.write_record("folder", options, result)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.folder", main))
