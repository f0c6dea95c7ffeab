"""Network in Network: 1x1 convolutions, and global average pooling instead of linear layers.

M. Lin, Q. Chen, S. Yan, "Network In Network", 2013, https://arxiv.org/abs/1312.4400

Deliberate differences from the paper, all from Dive into Deep Learning's PyTorch edition, section 5.8
(https://github.com/ShusenTang/Dive-into-DL-PyTorch): the kernels, strides and widths are AlexNet's, for 224x224 images,
and there is a single dropout, before the last block. The class maps pass a last ReLU, so no logit is negative, and a
class whose map is zero everywhere gets no gradient: an unlucky start can stay at chance, which the initialisation and
warm-up of configs/nin.yaml prevent. Batch normalisation is optional and came after the paper.
"""

import torch
from torch import nn


def nin_block(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, batch_norm: bool = False
) -> nn.Sequential:
    """Build a convolution and two 1x1 convolutions, a small multilayer perceptron at every position."""

    def activate() -> list[nn.Module]:
        return [*([nn.BatchNorm2d(out_channels)] if batch_norm else []), nn.ReLU(inplace=True)]

    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding),
        *activate(),
        nn.Conv2d(out_channels, out_channels, kernel_size=1),
        *activate(),
        nn.Conv2d(out_channels, out_channels, kernel_size=1),
        *activate(),
    )


class NiN(nn.Module):
    """Four NiN blocks; the last one has a map for each class, whose average is that class's logit.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        dropout: probability of dropping an activation before the last block.
        batch_norm: put batch normalisation between every convolution and its ReLU.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, in_channels: int = 1, num_classes: int = 10, dropout: float = 0.5, batch_norm: bool = False
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels={in_channels} and num_classes={num_classes} must both be at least 1")
        self.features = nn.Sequential(  # shapes for 224x224 images
            nin_block(in_channels, 96, kernel_size=11, stride=4, batch_norm=batch_norm),  # (N, 96, 54, 54)
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 96, 26, 26)
            nin_block(96, 256, kernel_size=5, padding=2, batch_norm=batch_norm),  # (N, 256, 26, 26)
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 256, 12, 12)
            nin_block(256, 384, kernel_size=3, padding=1, batch_norm=batch_norm),  # (N, 384, 12, 12)
            nn.MaxPool2d(kernel_size=3, stride=2),  # (N, 384, 5, 5)
            nn.Dropout(dropout),
            nin_block(384, num_classes, kernel_size=3, padding=1, batch_norm=batch_norm),  # (N, num_classes, 5, 5)
        )
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),  # (N, num_classes, 1, 1)
            nn.Flatten(),  # (N, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W), H and W at least 67, to logits (N, num_classes).

        Raises:
            ValueError: if the images are too small.
        """
        height, width = images.shape[-2:]  # below 67 the last pooling has nothing left to pool
        if height < 67 or width < 67:
            raise ValueError(f"{height}x{width} images are too small for NiN: it needs at least 67x67 pixels")
        return self.classifier(self.features(images))
