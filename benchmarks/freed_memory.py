"""What keeping freed memory gains on the CPU (memory.py): train.py's speed with and without it, taking turns.

PyTorch allocates and frees every tensor of a step. glibc returns those of more than 32 MiB to the kernel at once, which
clears each page before handing it out again; pages that are kept are used as they are. The results are the same.
Networks without such tensors show only noise.

Command: python -m benchmarks.freed_memory --data_dir DIR
"""

import sys
from functools import partial

from benchmarks.harness.our_turns import StepTurns, command
from benchmarks.harness.side_by_side import (
    Contestant,
    Parser,
    contest,
    median,
    print_table,
    ratios,
    spread,
    write_record,
)
from errors import run_program
from launch.memory import keep_freed_memory

RECIPES = ("lenet", "fast/1min", "vgg11_small", "alexnet", "nin", "googlenet")
KEPT, RETURNED = "kept", "returned"


def main() -> None:
    """Run one contest for each recipe."""
    parser = Parser(__doc__, budget=180, flags=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--turn", type=float, default=1.5, help="seconds per turn, at least (default: %(default)g)")
    options = parser.parse_args()
    if options.accelerator != "cpu" or not keep_freed_memory():
        parser.error("only on the CPU, with glibc")
    results, rows = [], []
    for recipe in options.recipes:
        ours = partial(command, StepTurns, options, "--model", recipe, "--val_size", "0")
        contestants = {name: partial(Contestant, ours(keep_freed_memory=name == KEPT)) for name in (KEPT, RETURNED)}
        turns, _ = contest(contestants, options.seconds / len(options.recipes), options.turn)
        times = ratios(turns[KEPT], turns[RETURNED])
        memory = {name: max(report["peak_memory_bytes"] for report in turns[name]) for name in contestants}
        speed = {name: median(turns[name]) for name in contestants}
        result = {"recipe": recipe, "times_as_fast": times, "peak_memory_bytes": memory, "turns": turns}
        results.append(result | {"images_per_second": speed})
        speeds = [f"{value:,.0f}" for value in speed.values()]
        sizes = [f"{value / 2**30:.2f}" for value in memory.values()]
        rows.append((recipe, *speeds, spread(times), *sizes, len(turns[KEPT])))
    print_table("recipe | images/s, kept | returned | x times as fast | peak GiB, kept | returned | rounds", rows)
    write_record("freed_memory", options, results)


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.freed_memory", main))
