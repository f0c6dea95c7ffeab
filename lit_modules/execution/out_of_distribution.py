"""How unlike the images it was trained on an image is, judged by its logits alone.

Two scores are added: the energy, -logsumexp of the logits (Liu et al. 2020, arXiv:2010.03759), which is high for noise;
and the distance from the nearest class, a Gaussian in the space of the logits (after Lee et al. 2018, arXiv:1807.03888,
with a covariance for each class), which is high for things with a shape of their own, such as digits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

KEPT = 0.95  # share of the validation images that are taken for what they are
MOST_CLASSES = 64  # with more, or with few images, the energy is used alone
FOLDS = 5
IMAGES = 20  # of each class, on average, that the Gaussians need; and altogether at least
SHAPES = {"means": "kc", "whitening": "kcc", "log_volumes": "k", "centres": "s", "scales": "s"}


class OutOfDistribution(NamedTuple):
    """A score of 1 and more is that of an image stranger than 95 % of the validation images.

    Attributes:
        means: Of the logits of images (K, C) that are taken for each of K classes; K = 0 uses the energy alone.
        whitening: Turns (K, C, C) the distance from such a mean into one with unit covariance.
        log_volumes: Logarithms (K,) of the covariances' determinants.
        centres: Median (2,) of distance and energy.
        scales: What to divide (2,) their distances from it by, before they are added.
    """

    means: Tensor
    whitening: Tensor
    log_volumes: Tensor
    centres: Tensor
    scales: Tensor

    def score(self, logits: Tensor) -> Tensor:
        """Logits (N, C) to scores (N,)."""
        return ((_parts(logits, self) - self.centres.to(logits)) / self.scales.to(logits)).sum(dim=1)

    @classmethod
    def fit(cls, logits: Tensor) -> "OutOfDistribution | None":
        """From the logits (N, C) of validation images; None if they are too few, or not finite."""
        images, classes = logits.shape
        if images < IMAGES or not logits.isfinite().all():
            return None
        logits = logits.cpu().double()
        fitted = cls._gaussians(logits if classes <= MOST_CLASSES and images >= IMAGES * classes else logits[:0])
        # Images lie nearer to Gaussians that were fitted to them than new ones do, much nearer where they are few.
        places = logits[:, 0].argsort().argsort() % FOLDS  # the same in whatever order several processes bring them
        parts = _parts(logits, fitted)
        for fold in range(FOLDS if len(fitted.means) else 0):
            parts[places == fold] = _parts(logits[places == fold], cls._gaussians(logits[places != fold]))
        centres = parts.median(dim=0).values
        scales = (parts.quantile(KEPT, dim=0) - centres).clamp(min=1e-6)
        scales = scales * ((parts - centres) / scales).sum(dim=1).quantile(KEPT).clamp(min=1e-6)
        return cls(*(part.float() for part in (*fitted[:3], centres, scales)))

    @classmethod
    def _gaussians(cls, logits: Tensor) -> "OutOfDistribution":
        """The Gaussian of each class that is guessed, not yet with centres and scales; none without logits (N, C)."""
        classes, guesses = logits.shape[1], logits.argmax(dim=1)
        means, covariances = [logits.new_zeros(0, classes)], [logits.new_zeros(0, classes, classes)]
        for guess in guesses.unique():
            chosen = logits[guesses == guess]
            means.append(chosen.mean(dim=0, keepdim=True))
            covariance = (chosen - means[-1]).T @ (chosen - means[-1]) / len(chosen)
            wider = (0.1 * covariance.diagonal().mean() + 1e-6) * torch.eye(classes).to(logits)
            covariances.append((covariance + wider)[None])
        covariance = torch.cat(covariances)
        whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
        return cls(torch.cat(means), whitening, torch.logdet(covariance), logits.new_zeros(2), logits.new_ones(2))

    @classmethod
    def stored(cls, checkpoint: Mapping[str, Any], classes: int) -> "OutOfDistribution | None":
        """What a checkpoint for this many classes holds; None if that makes no sense."""
        value = checkpoint.get("out_of_distribution")
        parts: list[Any] = [value.get(name) for name in cls._fields] if isinstance(value, Mapping) else [None]
        if not all(isinstance(part, Tensor) and part.dtype == torch.float32 for part in parts):
            return None
        sizes = {"k": len(parts[0]) if parts[0].dim() else -1, "c": classes, "s": 2}
        right = all(
            part.shape == tuple(sizes[axis] for axis in SHAPES[name]) for name, part in zip(SHAPES, parts, strict=True)
        )
        known = right and sizes["k"] <= min(classes, MOST_CLASSES) and all(part.isfinite().all() for part in parts)
        return cls(*(part.clone() for part in parts)) if known and bool((parts[-1] > 0).all()) else None


def _parts(logits: Tensor, fitted: OutOfDistribution) -> Tensor:
    """Distance and energy (N, 2)."""
    energy = -logits.logsumexp(dim=1)
    if not len(fitted.means):
        return torch.stack([torch.zeros_like(energy), energy], dim=1)
    gaussians = zip(fitted.means.to(logits), fitted.whitening.to(logits), strict=True)  # at once they'd fill the memory
    squares = torch.stack([((logits - mean) @ factor).square().sum(dim=1) for mean, factor in gaussians], dim=1)
    return torch.stack([(squares + fitted.log_volumes.to(logits)).amin(dim=1), energy], dim=1)
