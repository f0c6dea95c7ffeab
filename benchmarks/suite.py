"""Every benchmark on this machine, one after the other, then the trainings of the READMEs' tables in the time left.

One command for a machine that is available for a while, such as a rented GPU. With less than the usual time each
benchmark gets its share; one that fails is named at the end. With `--results` the rest of the time goes into the
trainings of `benchmarks.results`, which continue where they stopped when the command is given again.

Command: python -m benchmarks.suite --accelerator gpu --results --seconds 28800
"""

import subprocess
import sys
import time

from benchmarks.harness import side_by_side
from benchmarks.harness.side_by_side import PROJECT, print_table
from errors import run_program

# Budget of each in seconds, the most important first.
SECONDS = {
    "throughput": 600,
    "step_profile": 150,
    "speedrun": 270,
    "trainer_overhead": 120,
    "memory": 120,
    "precision": 300,
    "data_path": 60,
    "freed_memory": 180,
    "startup": 75,
    "scaling": 75,
    "tensorboard_cost": 160,
}
ONLY_CPU = ("freed_memory",)


def main() -> int:
    """Run them; returns 1 if one failed."""
    parser = side_by_side.Parser(__doc__, budget=sum(SECONDS.values()))
    parser.add_argument("--only", nargs="+", default=list(SECONDS), choices=SECONDS, metavar="NAME")
    parser.add_argument("--results", action="store_true", help="then train what benchmarks.results does")
    options = parser.parse_args()
    begun = time.monotonic()
    names = [name for name in options.only if options.accelerator == "cpu" or name not in ONLY_CPU]
    if not names:
        parser.error(f"{', '.join(options.only)} is measured on the CPU alone")
    pace = min(1.0, options.seconds / sum(SECONDS[name] for name in names))
    shared = [*options.shared, "--out", str(options.out.resolve())]
    rows = [_run(name, [*shared, "--seconds", f"{pace * SECONDS[name]:.0f}"]) for name in names]
    left = options.seconds - (time.monotonic() - begun)
    if options.results and left > 0:
        rows.append(_run("results", [*shared, "--hours", f"{left / 3600:.4f}"]))
    print()
    print_table("benchmark | exit code | seconds", rows)
    return int(any(code for _, code, _ in rows))


def _run(name: str, arguments: list[str]) -> tuple[str, int, str]:
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=PROJECT).returncode
    return name, code, f"{time.monotonic() - start:.0f}"


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.suite", main))
