"""What the Trainer costs: LeNet's epochs with everything a user has by default against a bare loop.

Both do the same optimiser steps on the same batches, and measure the same validation images after each epoch; ours also
draws its bar, logs, keeps metrics and writes checkpoints. On the CPU ours keeps freed memory, and a second bare loop
does too: the difference from that one is the Trainer's own cost.

Command: python -m benchmarks.trainer_overhead --data_dir DIR
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.harness import side_by_side
from benchmarks.harness.our_turns import EPOCHS, EpochTurns, command, float32
from benchmarks.harness.side_by_side import Contestant, Turns, contest, median, print_table, ratios, spread
from datamodules.batches import TrainBatches
from datamodules.files.finding import load, prepare
from errors import run_program
from launch.memory import keep_freed_memory
from lit_modules.schedules import WarmupDecay
from models import LeNet

BARE, KEPT = "bare loop", "bare loop, memory kept"
TARGETS = {256: 1.05, 64: 1.15}  # goal: at most this many times the bare loop's time


def bare_loop(data_dir: Path, batch_size: int, device: str) -> None:
    """LeNet's recipe as a loop of plain PyTorch, as fast as one would write it; metrics stay on the device."""
    images, labels = load(prepare(data_dir), "train")
    val_size = len(labels) // 12
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = (
        (images[part][:, None].to(device), labels[part].to(device)) for part in (order[val_size:], order[:val_size])
    )
    net = LeNet().to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.005, weight_decay=0.05, fused=True)
    epochs = iter(range(EPOCHS))
    batches = TrainBatches(len(train[1]), batch_size, position=lambda: (next(epochs), 0))
    scheduler = WarmupDecay(optimizer, EPOCHS * len(batches), shape="linear")
    torch.backends.cudnn.benchmark = True  # as the Trainer does on a GPU
    precision = torch.amp.autocast("cuda", torch.bfloat16, enabled=device == "cuda")
    turns = Turns(device)
    turns.wait()
    while True:
        net.train()
        losses, hits = [], []
        for indices in batches:
            indices = indices.to(device)
            inputs, targets = train[0][indices].float().div_(255), train[1][indices]
            with precision:
                logits = net(inputs)
                loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
            hits.append((logits.detach().argmax(1) == targets).sum())
        net.eval()
        with torch.inference_mode(), precision:
            for inputs, targets in zip(val[0].split(batch_size), val[1].split(batch_size), strict=True):
                logits = net(inputs.float().div_(255))
                losses.append(F.cross_entropy(logits, targets))
                hits.append((logits.argmax(1) == targets).sum())
        torch.stack(losses).mean().item(), torch.stack(hits).sum().item()
        turns.step(len(train[1]))


def main() -> None:
    """Run the contest for each batch size."""
    parser = side_by_side.Parser(__doc__, budget=120)
    parser.add_argument("--batch_size", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--bare_loop", choices=("plain", "kept"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare_loop:
        if options.bare_loop == "kept":
            keep_freed_memory()
        bare_loop(options.data_dir, options.batch_size[0], options.device)
        return
    results, rows = [], []
    images, _ = load(prepare(Path(options.data_dir)), "train")
    for batch_size in options.batch_size:
        settings = ["--model", "lenet", "--val_size", str(len(images) // 12), "--batch_size", str(batch_size)]
        ours = command(EpochTurns, options, *settings, *float32(options.device))
        bare = ["-m", "benchmarks.trainer_overhead", *options.shared, "--batch_size", str(batch_size), "--bare_loop"]
        contestants = {
            BARE: partial(Contestant, [*bare, "plain"]),
            KEPT: partial(Contestant, [*bare, "kept"]),
            "ours, bar on a terminal": partial(Contestant, ours, terminal=True),
            "ours, lines in a file": partial(Contestant, ours),
        }
        if options.device != "cpu":
            del contestants[KEPT]
        turns, _ = contest(contestants, options.seconds / len(options.batch_size), turn=0.1, least_rounds=3)
        for name, reports in turns.items():
            times = ratios(turns[BARE], reports)  # of rates: how many times the bare loop's time ours takes
            over_kept = ratios(turns[KEPT], reports) if KEPT in turns else None
            seconds = (len(images) - len(images) // 12) / median(reports)
            entry = {"batch_size": batch_size, "contestant": name, "rounds": len(reports), "turns": reports}
            entry |= {"images_per_second": median(reports), "target": TARGETS.get(batch_size)}
            entry |= {"time_over_bare_loop": times, "time_over_bare_loop_with_kept_memory": over_kept}
            results.append(entry)
            speeds = (f"{median(reports):,.0f}", f"{seconds:.2f}", spread(times, 3))
            rows.append((batch_size, name, *speeds, f"{over_kept['median']:.3f}" if over_kept else ""))
    print_table("batch | contestant | images/s | s an epoch | time / bare loop | / with kept memory", rows)
    side_by_side.write_record("trainer_overhead", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.trainer_overhead", main))
