"""The trained networks of `demo.py`'s page: what each makes of a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoints.reading import listed
from datamodules import CLASS_NAMES, FashionMNISTDataModule, PicturesDataModule
from errors import UserError
from inspection.layer_cam import layer_cam
from inspection.stages import stage_outputs
from lit_modules import LitClassifier
from pictures.feature_maps import feature_maps
from pictures.heat_map import heat_map
from pictures.predict import as_batch
from weights.trained import load_trained

CHINESE = ("T恤", "裤子", "套头衫", "连衣裙", "外套", "凉鞋", "衬衫", "运动鞋", "包", "短靴")


class Seen(NamedTuple):
    """A picture, of mode RGB or RGBA, and what of it looks like Fashion-MNIST, (28, 28) uint8, if anything does."""

    picture: Image.Image
    garment: np.ndarray | None


class Answer(NamedTuple):
    """Calibrated probabilities of all classes; how strange the picture is, in words; and the likeliest one's heat map.

    There is no heat map where nothing contributes, or the network has no feature maps.
    """

    shares: dict[str, float]
    note: str
    heat: Image.Image | None


@dataclass
class Network:
    """A trained network of the page.

    Attributes:
        title: Distinguishes it from the others.
        classifier: In evaluation mode.
        data: Knows how it wants its images.
        accuracy: On the test images, 0 to 1; None if no `weights.json` beside the checkpoint says.
    """

    title: str
    classifier: LitClassifier
    data: FashionMNISTDataModule
    accuracy: float | None = None

    @property
    def names(self) -> list[str]:
        """The classes as the page names them."""
        names = tuple(self.data.class_names)
        chinese = CHINESE if names == CLASS_NAMES else ("",) * len(names)
        return [f"{name} {translated}".rstrip() for name, translated in zip(names, chinese, strict=True)]

    @property
    def facts(self) -> str:
        """Size, accuracy, and the number of classes if they are not Fashion-MNIST's."""
        parameters = sum(parameter.numel() for parameter in self.classifier.net.parameters())
        facts = [f"{parameters:,} parameters · 参数"]
        if tuple(self.data.class_names) != CLASS_NAMES:
            facts.append(f"{len(self.data.class_names):,} classes of its own · 自有类别")
        if self.accuracy is not None:
            facts.append(f"test accuracy · 测试准确率 {self.accuracy:.2%}")
        return "<br>".join(facts)

    def image(self, seen: Seen) -> np.ndarray | None:
        """What the network sees of a picture, (H, W) or (H, W, 3) uint8; None if there is nothing."""
        return self.data.fit_picture(seen.picture) if isinstance(self.data, PicturesDataModule) else seen.garment

    def explain(self, image: np.ndarray) -> Answer:
        """What it takes the image for, and why."""
        batch = self.data.preprocess(as_batch([image]))
        probabilities = self.classifier.probabilities(batch)[0]
        try:
            cam = layer_cam(self.classifier.net, batch, probabilities.argmax()[None])[0]
        except UserError:
            cam = torch.zeros(1, 1)
        shares = dict(zip(self.names, probabilities.tolist(), strict=True))
        return Answer(shares, self._note(batch), heat_map(image, cam) if cam.any() else None)

    def stages(self, image: np.ndarray) -> list[tuple[Image.Image, str]]:
        """What each stage makes of the image, and its shape and kind."""
        outputs = stage_outputs(self.classifier.net, self.data.preprocess(as_batch([image])))
        return [(_drawn(output), f"{'×'.join(map(str, output.shape))} {kind}") for _, kind, output in outputs]

    @torch.no_grad()
    def _note(self, batch: Tensor) -> str:
        if self.classifier.out_of_distribution is None:
            return ""
        score = float(self.classifier.out_of_distribution.score(self.classifier(batch).float()))
        return f"unfamiliar · 陌生度 {score:.1f}" + (" **not sure · 不确定**" if score > 1 else "")


def load_networks(checkpoints: Sequence[Path], trust: bool = False) -> list[Network]:
    """The networks of some checkpoints, each under its architecture and its recipe, with the path if both repeat.

    Raises:
        UserError: If one can't be used.
    """
    loaded = [(path, *load_trained(path, trust)) for path in checkpoints]
    names = []
    for path, classifier, _, checkpoint in loaded:
        architecture, recipe = type(classifier.net).__name__, str(checkpoint.get("recipe") or path.stem)
        names.append(architecture if recipe == architecture.lower() else f"{architecture} · {recipe}")
    paths = [path for path, *_ in loaded]
    titles = [name if names.count(name) == 1 else f"{name} ({path})" for name, path in zip(names, paths, strict=True)]
    return [
        Network(title, classifier, data, listed(path).get("test_accuracy"))
        for title, (path, classifier, data, _) in zip(titles, loaded, strict=True)
    ]


def _drawn(output: Tensor) -> Image.Image:
    """The feature maps (C, H, W) of a stage, or its numbers (C,) as one nearly square map, row by row."""
    if output.dim() != 3:
        numbers = output.flatten()
        width = math.ceil(math.sqrt(len(numbers)))
        output = torch.cat([numbers, numbers.min().expand(-len(numbers) % width)]).view(1, -1, width)
    return feature_maps(output).convert("RGB")
