"""LeNet-5, the network that made convolutions work.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of
the IEEE 86(11), 1998, https://doi.org/10.1109/5.726791

Deliberate differences from the paper: the second convolution sees all six maps instead of a hand-made selection,
pooling has no trainable weights, the activation is ReLU or sigmoid instead of a scaled tanh, and the output is a linear
layer instead of radial basis functions. Padding 2 turns the 28x28 image into the paper's 32x32 input.
`activation="sigmoid", padding=0` is the network of Dive into Deep Learning's PyTorch edition, section 5.5
(https://github.com/ShusenTang/Dive-into-DL-PyTorch), which pools by maximum. Batch normalisation is optional and
came after the paper.
"""

from typing import Literal

import torch
from torch import nn


class LeNet(nn.Module):
    """Two convolutions, each followed by 2x2 pooling, then three linear layers.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images in pixels, at least 16 - 2 * padding.
        activation: "relu" or "sigmoid".
        pooling: "max" or "average".
        padding: zeros around the image in the first convolution, in pixels.
        batch_norm: put batch normalisation between every convolution and its activation.

    Raises:
        ValueError: if an argument is out of range or the image is too small.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        activation: Literal["relu", "sigmoid"] = "relu",
        pooling: Literal["max", "average"] = "max",
        padding: int = 2,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels={in_channels} and num_classes={num_classes} must both be at least 1")
        if activation not in ("relu", "sigmoid"):
            raise ValueError(f"activation={activation!r} is unknown: use 'relu' or 'sigmoid'")
        if pooling not in ("max", "average"):
            raise ValueError(f"pooling={pooling!r} is unknown: use 'max' or 'average'")
        if padding < 0:
            raise ValueError(f"padding={padding} is negative: it must be at least 0 pixels")
        minimum = max(1, 16 - 2 * padding)
        if image_size < minimum:
            needed = f"with padding={padding} it needs at least {minimum} pixels"
            raise ValueError(f"image_size={image_size} is too small for LeNet: {needed}")
        self.image_shape = (in_channels, image_size, image_size)
        size = ((image_size + 2 * padding - 4) // 2 - 4) // 2  # after both 5x5 convolutions and both poolings

        def activate() -> nn.Module:
            return nn.ReLU(inplace=True) if activation == "relu" else nn.Sigmoid()

        def normalize(channels: int) -> list[nn.Module]:
            return [nn.BatchNorm2d(channels)] if batch_norm else []

        def pool() -> nn.Module:
            return nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)

        self.features = nn.Sequential(  # shapes for 28x28 images and padding 2
            nn.Conv2d(in_channels, 6, kernel_size=5, padding=padding),  # (N, 6, 28, 28)
            *normalize(6),
            activate(),
            pool(),  # (N, 6, 14, 14)
            nn.Conv2d(6, 16, kernel_size=5),  # (N, 16, 10, 10)
            *normalize(16),
            activate(),
            pool(),  # (N, 16, 5, 5)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (N, 400)
            nn.Linear(16 * size * size, 120),
            activate(),
            nn.Linear(120, 84),
            activate(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes).

        Raises:
            ValueError: if the images don't have the shape that the network was built for.
        """
        if (shape := tuple(images.shape[1:])) != self.image_shape:
            expected = f"this LeNet was built for {self.image_shape}"
            raise ValueError(f"images are (C, H, W)={shape}, {expected}: resize or rebuild")
        return self.classifier(self.features(images))
