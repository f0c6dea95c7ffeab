"""Every benchmark on this machine, one after the other, then the trainings of the READMEs' tables in the time left.

One command for a machine that is available for a while, such as a rented GPU. With less than the usual time each
benchmark gets its share; one that fails is named at the end. With `--results` the benchmarks get about half of the
time, those for which too little is left are not started, and the rest goes into the trainings of `benchmarks.results`.
Given again within a day, that command continues: trainings where they stopped, benchmarks with those that have no
record yet.

Command: python -m benchmarks.suite --accelerator gpu --results --seconds 28800
"""

import json
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from typing import Any

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
LEAST = 0.4  # of its usual time: with less a record lacks networks or seeds, and the next call has more for it


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
    shared = [*options.shared, "--out", str(options.out.resolve())]
    rows: list[tuple[str, int | str, str]] = []
    end = begun + (options.seconds / 2 if options.results else options.seconds)
    for number, name in enumerate(names):
        left = end - time.monotonic()
        usual = SECONDS[name] if options.results else sum(SECONDS[other] for other in names[number:])
        share = max(0.0, min(1.0, left / usual))
        recorded = options.results and _has_record(name, options)
        if recorded or (options.results and share < LEAST):
            rows.append((name, "", "has a record" if recorded else "no time left"))
        else:
            # Each loop has at least five turns, of 2 s where there is time.
            turn = ["--turn", f"{max(0.3, 2 * share):.1f}"] if name == "throughput" else []
            rows.append(_run(name, [*shared, "--seconds", f"{share * SECONDS[name]:.0f}", *turn]))
    left = begun + options.seconds - time.monotonic()
    if options.results and left >= 1:
        rows.append(_run("results", [*shared, "--hours", f"{left / 3600:.4f}"]))
    elif options.results:
        rows.append(("results", "", "no time left"))
    print()
    print_table("benchmark | exit code | seconds", rows)
    return int(any(code for _, code, _ in rows))


def _has_record(name: str, options: Any) -> bool:
    """Whether this machine has made its record within the last day."""
    path = side_by_side.record_path(name, options)
    if not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    recent = datetime.now(timezone.utc) - datetime.fromisoformat(record["date"]) < timedelta(days=1)
    return recent and side_by_side.same_machine(record["machine"], options.place)


def _run(name: str, arguments: list[str]) -> tuple[str, int, str]:
    print(f"\n== {name}", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", f"benchmarks.{name}", *arguments], cwd=PROJECT)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # which the process has got too: a training saves a checkpoint
        process.wait()
        raise
    return name, code, f"{time.monotonic() - start:.0f}"


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.suite", main))
