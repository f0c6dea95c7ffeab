"""VGG, depth by repetition of small convolutions.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014,
https://arxiv.org/abs/1409.1556

Depths 11, 13, 16 and 19 are the paper's configurations A, B, D and E. Deliberate differences: optional batch
normalisation, which came later; `width_divisor`, as in Dive into Deep Learning's PyTorch edition, section 5.7
(https://github.com/ShusenTang/Dive-into-DL-PyTorch); and for benchmarks/speedrun.md fewer blocks, pooling first, no
hidden layers. Modules are numbered as torchvision's: its weights fit at in_channels=3, num_classes=1000, 224 pixels.
"""

from typing import Literal

import torch
from torch import nn

WIDTHS = (64, 128, 256, 512, 512)  # channels in each of the five blocks, whatever the depth
# Convolutions in each block; with the three linear layers they add up to the depth.
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions, each halving height and width, then two hidden layers of 4096 with dropout.

    Args:
        depth: layers with weights: 11, 13, 16 or 19.
        width_divisor: divides the channels of every block and the units of both hidden layers; a divisor of 64.
        batch_norm: put batch normalisation between every convolution and its ReLU.
        in_channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width of the images in pixels, at least 2 to the power of the number of blocks.
        dropout: probability of dropping a hidden unit.
        blocks: how many of the five blocks are built, from the first on; None builds all.
        no_hidden_layers: leave out both hidden layers, and the dropout with them.
        pool_first: halve after the first convolution of a block, so that the others have fewer pixels to go through.

    Raises:
        ValueError: if an argument is out of range or the image is too small.
    """

    def __init__(
        self,
        depth: Literal[11, 13, 16, 19] = 11,
        width_divisor: int = 1,
        batch_norm: bool = False,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 224,
        dropout: float = 0.5,
        blocks: int | None = None,
        no_hidden_layers: bool = False,
        pool_first: bool = False,
    ) -> None:
        super().__init__()
        if depth not in CONVOLUTIONS:
            raise ValueError(f"depth={depth} is not a VGG: use 11, 13, 16 or 19")
        if width_divisor < 1 or 64 % width_divisor:
            raise ValueError(f"width_divisor={width_divisor} must divide 64: use 1, 2, 4, 8, 16, 32 or 64")
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels={in_channels} and num_classes={num_classes} must both be at least 1")
        blocks = 5 if blocks is None else blocks
        if not 1 <= blocks <= 5:
            raise ValueError(f"blocks={blocks} must lie in 1 to 5")
        if image_size < 2**blocks:
            raise ValueError(f"image_size={image_size} is too small for VGG: it needs at least {2**blocks} pixels")
        self.image_shape = (in_channels, image_size, image_size)

        layers: list[nn.Module] = []
        channels = in_channels
        for width, convolutions in list(zip(WIDTHS, CONVOLUTIONS[depth], strict=True))[:blocks]:
            width //= width_divisor
            for number in range(convolutions):
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                layers += [nn.MaxPool2d(2)] if pool_first and number == 0 else []
                layers += [nn.BatchNorm2d(width)] if batch_norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers += [] if pool_first else [nn.MaxPool2d(2)]
        # (N, 64, 112, 112) -> (N, 128, 56, 56) -> (N, 256, 28, 28) -> (N, 512, 14, 14) -> (N, 512, 7, 7) at 224x224
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()  # (N, 25088); not inside `classifier`, whose numbering is torchvision's
        units = channels * (image_size // 2**blocks) ** 2
        layers = []
        for _ in range(0 if no_hidden_layers else 2):
            layers += [nn.Linear(units, 4096 // width_divisor), nn.ReLU(inplace=True), nn.Dropout(dropout)]
            units = 4096 // width_divisor
        self.classifier = nn.Sequential(*layers, nn.Linear(units, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes).

        Raises:
            ValueError: if the images don't have the shape that the network was built for.
        """
        if (shape := tuple(images.shape[1:])) != self.image_shape:
            expected = f"this VGG was built for {self.image_shape}"
            raise ValueError(f"images are (C, H, W)={shape}, {expected}: resize or rebuild")
        return self.classifier(self.flatten(self.features(images)))
