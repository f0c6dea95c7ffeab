"""Peak memory of training, calculated for each network and batch size, with and without activation checkpointing.

A training step is run on tensors without data, and every storage that its operations allocate is counted; the README
beside this file says what is not. With `--accelerator gpu` (or `--measure`) train.py trains a few batches of each, and
its own peak stands beside it; on the CPU that is the peak of the process, with Python and the libraries.

Command: python -m benchmarks.memory
"""

import argparse
import sys
import time
import weakref
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import print_table, trained
from benchmarks.peers.plain_loops import ours
from errors import run_program
from lit_modules.execution.activation_checkpointing import apply_activation_checkpointing

NETWORKS = ("lenet", "alexnet", "vgg11", "vgg19", "nin", "googlenet")
BATCH_SIZES = (64, 256)
PRECISIONS = ("32", "bf16-mixed")
BATCHES = 3  # trained to measure the peak
LIMIT = 24e9  # goal: bytes of the GPU memory that VGG-19 at 224, batch 256, must fit into


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate while it is on.

    Attributes:
        now: Bytes of those that are still alive.
        peak: The highest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note what it has allocated."""
        self._note((args, kwargs), counted=False)  # from before, and perhaps returned as a view
        output = func(*args, **(kwargs or {}))
        self._note(output, counted=True)
        return output

    def _note(self, values: Any, counted: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, torch.Tensor) or value.untyped_storage()._cdata in self._known:
                continue
            storage = value.untyped_storage()
            size = storage.nbytes() if counted else 0
            self._known.add(storage._cdata)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage._cdata, size)

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@cache
def training_bytes(model: str, batch_size: int, precision: str = "32", checkpointing: bool = False) -> int:
    """Peak memory of one training step, calculated.

    Args:
        model: Recipe, which also says the size of the images.
        batch_size: Images a step.
        precision: "32", or "bf16-mixed" for autocast to bfloat16.
        checkpointing: With activation checkpointing.
    """
    with FakeTensorMode(), LiveBytes() as live:
        net, recipe = ours(model)
        if checkpointing:
            apply_activation_checkpointing(net)
        size = recipe["data"]["image_size"]
        images, labels = torch.empty(batch_size, 1, size, size), torch.zeros(batch_size, dtype=torch.long)
        moments = [torch.empty_like(parameter) for parameter in net.parameters() for _ in range(2)]
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter)  # of the previous step
        live.peak = live.now
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            loss = F.cross_entropy(net(images), labels)
        net.zero_grad()  # as the Trainer does: after the forward pass
        loss.backward()
        del moments
    return live.peak


def measured_bytes(model: str, batch_size: int, precision: str, checkpointing: bool, options: Any) -> int | str:
    """Peak memory of train.py over a few batches; in words if memory runs out."""
    arguments = ["fit", "--model", model, "--batch_size", str(batch_size), "--precision", precision, *options.single]
    arguments += ["--max_epochs", "1", "--val_size", "0", f"--trainer.limit_train_batches={BATCHES}"]
    arguments += ["--trainer.enable_checkpointing=false"]
    arguments += [f"--model.checkpoint_activations={str(checkpointing).lower()}"]
    try:
        return trained(arguments)["peak_memory_bytes"]
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return "out of memory"


def main() -> None:
    """Calculate, and measure where asked for."""
    parser = side_by_side.Parser(__doc__, budget=600)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="recipes (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, help="train a few batches of each (default: on a GPU)"
    )
    options = parser.parse_args()
    measure = options.accelerator == "gpu" if options.measure is None else options.measure
    begun = time.monotonic()
    results, rows = [], []
    for model, precision, batch_size in product(options.networks, options.precision, options.batch_size):
        entries: dict[str, dict[str, Any]] = {}
        for name, checkpointing in (("plain", False), ("checkpointed", True)):
            setting = (model, batch_size, precision, checkpointing)
            entries[name] = {"calculated_bytes": training_bytes(*setting)}
            if measure and time.monotonic() - begun < options.seconds:
                entries[name]["measured_bytes"] = measured_bytes(*setting, options)
        results.append({"network": model, "precision": precision, "batch_size": batch_size, **entries})
        fits = [entry["calculated_bytes"] <= LIMIT for entry in entries.values()]
        verdict = "yes" if all(fits) else "checkpointed" if any(fits) else "no"
        rows.append((model, precision, batch_size, *map(_cell, entries.values()), verdict))
    print_table("network | precision | batch | GiB | GiB, checkpointed | fits 24 GB", rows)
    print(f"\nGiB calculated{' (measured)' if measure else ''}; 24 GB by calculation, without workspaces.")
    side_by_side.write_record("memory", options, results)


def _cell(entry: dict[str, Any]) -> str:
    text = f"{entry['calculated_bytes'] / 2**30:.2f}"
    if "measured_bytes" not in entry:
        return text
    measured = entry["measured_bytes"]
    return f"{text} ({measured if isinstance(measured, str) else f'{measured / 2**30:.2f}'})"


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.memory", main))
