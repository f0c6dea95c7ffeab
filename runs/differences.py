"""Whether the difference between two groups of runs is more than chance; the runs are paired on the same test images.

Imports nothing heavy.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from runs.groups import Group

LEVEL = 0.05  # a difference counts as real if chance alone makes one as large less often than this
POINTS = 0.002  # we say how many seeds would show a difference of this size
POWER = 0.8  # and find it this often


@dataclass
class Difference:
    """The first group's mean test accuracy minus the second's.

    Attributes:
        first: The more accurate group.
        second: The other one.
        size: The difference, 0 to 1.
        p: Probability of a difference at least this large by chance.
        paired: Whether the records tell which test images were right, so that the runs could be paired on them.
        seeds: How many seeds of each would show a difference of `POINTS`; None if no number would, or if unknown.
    """

    first: Group
    second: Group
    size: float
    p: float
    paired: bool
    seeds: int | None

    @property
    def single(self) -> bool:
        """Whether each group is one run: then the two networks are compared, not their recipes."""
        return len(self.first.runs) == len(self.second.runs) == 1

    @property
    def scatters(self) -> bool:
        """Whether the runs show how far seeds lie apart: several of each group, which are not all equally good."""
        deviations = [self.first.deviation, self.second.deviation]
        return None not in deviations and any(deviations)

    def __str__(self) -> str:
        verdict = "more than chance" if self.p < LEVEL else "may be chance"
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.4f}" if self.p < 0.01 else f"p = {self.p:.2f}"
        unpaired = "" if self.paired else ", unpaired"
        return f"{self.first.name} over {self.second.name}: {100 * self.size:.2f} points, {verdict} ({p}{unpaired})"


def differences(groups: Sequence[Group], best_first: bool = True) -> list[Difference]:
    """Compare the first group with each other group that was tested on the same number of images.

    The more groups there are, the sooner one is ahead by luck: the probabilities are corrected for that (S. Holm, "A
    Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6(2), 1979).

    Any of k groups might have come out best, so that any of the k (k - 1) / 2 pairs might be compared; those with the
    best are k - 1, and Holm's factors become k / 2 times as large. All k together are wrong as rarely as promised: of
    s groups that are equal to the best, the first to be told from it has s - 1 left, a factor of (s - 1) k / 2 or more,
    and there are s (s - 1) / 2 pairs of them. So equals of one kind are told apart with a chance of s / k of `LEVEL`,
    and all kinds together with `LEVEL`.

    Args:
        groups: At least one.
        best_first: Whether the first is there because it came out best, and not chosen beforehand.
    """
    first, *others = groups
    comparable = [other for other in others if _images(other) == _images(first) is not None]
    chosen_from = len(groups) / 2 if best_first else 1.0
    found = [difference(first, other, len(comparable) * chosen_from) for other in comparable]
    least = 0.0
    for rank, one in enumerate(sorted(found, key=lambda one: one.p)):
        least = one.p = max(least, min(1.0, one.p * (len(found) - rank) * chosen_from))
    return found


def difference(first: Group, second: Group, comparisons: float = 1) -> Difference:
    """Compare two groups that were tested on the same images; `seeds` allows for this many comparisons.

    Two single runs are compared by McNemar's exact test. Several seeds are compared by a t-test in which both the seeds
    and the images are a random draw: the variance of the difference is that between seeds, plus what the choice of
    images adds to it; it is no less than what images alone would make of networks that differ on so many of them.
    """
    images = first.runs[0].tested
    tables = [[run.right for run in group.runs] for group in (first, second)]
    rights = [[right for right in table if right and len(right) == images] for table in tables]
    paired = [len(table) for table in rights] == [len(first.runs), len(second.runs)]
    size = first.accuracy - second.accuracy
    if paired and len(first.runs) == len(second.runs) == 1:
        return Difference(first, second, size, mcnemar(rights[0][0], rights[1][0]), paired, None)
    if paired:
        image_variance, least = _image_variance(rights[0], rights[1])
    else:
        image_variance = least = sum(group.accuracy * (1 - group.accuracy) / images for group in (first, second))
    spread, between_seeds, own_degrees = _seed_variance(first, second)
    variance = max(image_variance + between_seeds, least)  # few seeds are as good as each other by chance
    if not variance:
        return Difference(first, second, size, 0.0 if size else 1.0, paired, None)
    p = two_sided(size / math.sqrt(variance), _degrees(own_degrees, between_seeds, variance))
    seeds = seeds_needed(spread, image_variance, comparisons) if spread and paired else None
    return Difference(first, second, size, p, paired, seeds)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Probability that chance alone splits the images that only one of two networks got right this unevenly.

    Q. McNemar, "Note on the Sampling Error of the Difference between Correlated Proportions or Percentages",
    Psychometrika 12, 1947; exact, from the binomial distribution.
    """
    only_first = sum(one and not other for one, other in zip(first, second, strict=True))
    only_second = sum(other and not one for one, other in zip(first, second, strict=True))
    count, fewer = only_first + only_second, min(only_first, only_second)
    if only_first == only_second:
        return 1.0
    tail = sum(math.comb(count, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**count)


def two_sided(t: float, degrees: float) -> float:
    """Probability of a value at least as far from 0 as t under Student's t distribution."""
    if degrees > 1000:
        return 2 * statistics.NormalDist().cdf(-abs(t))
    # With t = sqrt(degrees) tan(a), the density becomes cos(a) ** (degrees - 1) up to a factor.
    begin, parts = math.atan(abs(t) / math.sqrt(degrees)), 500

    def area(start: float) -> float:
        width = (math.pi / 2 - start) / parts
        return width * sum(math.cos(start + (part + 0.5) * width) ** (degrees - 1) for part in range(parts))

    return area(begin) / area(0.0)


def critical(p: float, degrees: float) -> float:
    """The inverse of `two_sided`: the t that has this probability."""
    if degrees > 1000:
        return statistics.NormalDist().inv_cdf(1 - p / 2)
    low, high = 0.0, math.pi / 2  # of the same angle
    for _ in range(40):
        middle = (low + high) / 2
        less = two_sided(math.sqrt(degrees) * math.tan(middle), degrees) > p
        low, high = (middle, high) if less else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def seeds_needed(spread: float, image_variance: float, comparisons: float = 1) -> int | None:
    """How many seeds of each group show a difference of `POINTS`; None if the images leave it too uncertain.

    Args:
        spread: Variance of the accuracy between seeds.
        image_variance: Variance of the difference due to the choice of test images, whatever the number of seeds.
        comparisons: Number of comparisons that the probabilities are corrected for.
    """

    def most_variance(degrees: float) -> float:
        errors = critical(LEVEL / comparisons, degrees) + critical(2 * (1 - POWER), degrees)
        return (POINTS / errors) ** 2

    left = most_variance(math.inf) - image_variance
    if left <= 0:
        return None
    seeds = max(2, math.ceil(2 * spread / left))  # enough if the spread were known
    while (between := 2 * spread / seeds) + image_variance > most_variance(
        _degrees(2 * (seeds - 1), between, between + image_variance)
    ):
        seeds += 1
    return seeds


def _degrees(own: float, between_seeds: float, variance: float) -> float:
    """Satterthwaite's degrees of freedom: only the part between seeds was estimated from a few numbers."""
    return own * (variance / between_seeds) ** 2 if between_seeds else math.inf


def _images(group: Group) -> int | None:
    """The number of images on which all runs of a group were tested; None if they differ."""
    counts = {run.tested for run in group.runs}
    return counts.pop() if len(counts) == 1 else None


def _seed_variance(*groups: Group) -> tuple[float, float, float]:
    """Variance of the accuracy between seeds.

    Seeds of one recipe may lie much closer together than those of another, so each group has its own; a single run is
    taken to vary as the others' do (B. L. Welch, "The Generalization of 'Student's' Problem when Several Different
    Population Variances are Involved", Biometrika 34, 1947).

    Returns:
        That of a run, the mean of the groups'; that of the difference of the groups' means; its degrees of freedom.
    """
    known = [group for group in groups if len(group.runs) > 1]
    own = [statistics.variance([run.accuracy for run in group.runs]) for group in known]
    if not any(own):
        return 0.0, 0.0, math.inf
    spread = statistics.fmean(own)
    singles = sum(len(group.runs) == 1 for group in groups)
    parts = [
        (variance * (1 / len(group.runs) + singles), len(group.runs) - 1)
        for group, variance in zip(known, own, strict=True)
    ]
    between = sum(part for part, _ in parts)
    return spread, between, between**2 / sum(part**2 / freedom for part, freedom in parts)


def _image_variance(first: Sequence[Sequence[bool]], second: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Variance of the difference of the mean accuracies due to the choice of images, without and with their noise."""
    shares = []
    noise = 0.0
    for rights in (first, second):
        seeds = len(rights)
        share = [sum(column) / seeds for column in zip(*rights, strict=True)]
        shares.append(share)
        if seeds > 1:  # how far the seeds disagree about an image: in their mean, divided by their number
            noise += statistics.fmean(one * (1 - one) for one in share) / (seeds - 1)
    whole = statistics.pvariance([one - other for one, other in zip(*shares, strict=True)])
    return max(0.0, whole - noise) / len(shares[0]), whole / len(shares[0])
