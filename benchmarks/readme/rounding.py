"""Numbers as the READMEs write them, rounded away from what would flatter us."""

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction

from runs.reading import Run

Number = int | float | Fraction


def down(value: Number, digits: int = 0) -> str:
    """Rounded down to this many decimals: for numbers that are better when larger."""
    return _written(math.floor(_exact(value) * 10**digits), digits)


def up(value: Number, digits: int = 0) -> str:
    """Rounded up: for numbers that are better when smaller."""
    return _written(math.ceil(_exact(value) * 10**digits), digits)


def span(values: Sequence[str], to: str = " to ") -> str:
    """The single value, or the first and the last of several."""
    return values[0] if len(set(values)) == 1 else f"{values[0]}{to}{values[-1]}"


def share(value: str) -> str:
    """An accuracy without the zero before the point: .9099."""
    return value.removeprefix("0")


def duration(seconds: float) -> str:
    """Rounded up: 0.1 s, 17 s, 12 min, 3.4 h."""
    for size, unit, digits in ((1, "s", 1 if seconds < 10 else 0), (60, "min", 0)):
        if seconds <= 99 * size:
            return f"{up(seconds / size, digits)} {unit}"
    return f"{up(seconds / 3600, 1)} h"


def accuracies(runs: Sequence[Run], key: str = "accuracy") -> list[Fraction]:
    """Each run's share of correctly classified test images, exact although the record holds 32-bit numbers."""
    tests = [run.record["test"] for run in runs]
    return [counted(test[key], test["images"]) for test in tests if key in test]


def counted(value: float, images: int) -> Fraction:
    """A share of so many images, exact."""
    return Fraction(round(value * images), images)


def mean_and_range(values: Sequence[Fraction], to: str = " to ") -> str:
    """Mean ± standard deviation (n - 1) and, in brackets, the range; of a single value, itself."""
    if len(values) < 2:
        return "".join(share(down(value, 4)) for value in values)
    least, greatest = (share(down(value, 4)) for value in (min(values), max(values)))
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{share(down(mean, 4))} ± {share(up(deviation, 4))} ({least}{to}{greatest})"


def _exact(value: Number) -> Fraction:
    return value if isinstance(value, Fraction) else Fraction(str(value))  # the decimals as written, not the bits


def _written(scaled: int, digits: int) -> str:
    whole, rest = divmod(scaled, 10**digits)
    return f"{whole:,}.{rest:0{digits}}" if digits else f"{whole:,}"
