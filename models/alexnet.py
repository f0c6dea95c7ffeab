"""AlexNet, the network that won ImageNet 2012.

A. Krizhevsky, I. Sutskever, G. E. Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012,
https://doi.org/10.1145/3065386

Deliberate differences from the paper: one stream of convolutions instead of two halves on two GPUs, and no local
response normalisation. Layer sizes follow Dive into Deep Learning's PyTorch edition, section 5.6
(https://github.com/ShusenTang/Dive-into-DL-PyTorch); `hidden_layers=1` is that tutorial's smaller version, which
leaves out the second hidden layer of 4096, and `hidden_layers=2` is the paper's depth. Batch normalisation is optional
and came after the paper; `width_divisor` makes narrow networks, as in vgg.py.
"""

from typing import Literal

import torch
from torch import nn


class AlexNet(nn.Module):
    """Five convolutions with overlapping max pooling, then one or two hidden layers of 4096 with dropout.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images in pixels, at least 67.
        hidden_layers: hidden linear layers before the output layer, 1 or 2.
        dropout: probability of dropping a hidden unit.
        batch_norm: put batch normalisation between every convolution and its ReLU.
        width_divisor: divides the channels and the units of the hidden layers; a divisor of 32.

    Raises:
        ValueError: if an argument is out of range or the image is too small.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        hidden_layers: Literal[1, 2] = 1,
        dropout: float = 0.5,
        batch_norm: bool = False,
        width_divisor: int = 1,
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels={in_channels} and num_classes={num_classes} must both be at least 1")
        if hidden_layers not in (1, 2):
            raise ValueError(f"hidden_layers={hidden_layers} is not possible for AlexNet: use 1 or 2")
        if width_divisor < 1 or 32 % width_divisor:
            raise ValueError(f"width_divisor={width_divisor} must divide 32: use 1, 2, 4, 8, 16 or 32")
        first, second, third, fifth, units = (width // width_divisor for width in (96, 256, 384, 256, 4096))
        size = (image_size - 11) // 4 + 1  # after the first convolution
        for _ in range(3):
            size = (size - 3) // 2 + 1  # after each pooling; the other convolutions keep the size
        if size < 1:
            raise ValueError(f"image_size={image_size} is too small for AlexNet: it needs at least 67 pixels")
        self.image_shape = (in_channels, image_size, image_size)

        def activate(channels: int) -> list[nn.Module]:
            return [*([nn.BatchNorm2d(channels)] if batch_norm else []), nn.ReLU(inplace=True)]

        self.features = nn.Sequential(  # shapes for 224x224 images at full width
            nn.Conv2d(in_channels, first, kernel_size=11, stride=4),  # (N, 96, 54, 54)
            *activate(first),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 96, 26, 26)
            nn.Conv2d(first, second, kernel_size=5, padding=2),  # (N, 256, 26, 26)
            *activate(second),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 256, 12, 12)
            nn.Conv2d(second, third, kernel_size=3, padding=1),  # (N, 384, 12, 12)
            *activate(third),
            nn.Conv2d(third, third, kernel_size=3, padding=1),  # (N, 384, 12, 12)
            *activate(third),
            nn.Conv2d(third, fifth, kernel_size=3, padding=1),  # (N, 256, 12, 12)
            *activate(fifth),
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 256, 5, 5)
        )
        hidden: list[nn.Module] = []
        for inputs in (fifth * size * size, units)[:hidden_layers]:
            hidden += [nn.Linear(inputs, units), nn.ReLU(inplace=True), nn.Dropout(dropout)]  # (N, 4096)
        self.classifier = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(units, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes).

        Raises:
            ValueError: if the images don't have the shape that the network was built for.
        """
        if (shape := tuple(images.shape[1:])) != self.image_shape:
            expected = f"this AlexNet was built for {self.image_shape}"
            raise ValueError(f"images are (C, H, W)={shape}, {expected}: resize or rebuild")
        return self.classifier(self.features(images))
