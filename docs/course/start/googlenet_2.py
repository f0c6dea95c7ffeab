"""googlenet-2: put two 3x3 convolutions in the place of the 5x5, as Inception v2 does. The block still sees 5x5 pixels.

像 Inception v2 那样，用两个 3x3 卷积代替 5x5 卷积。整个块的感受野仍为 5x5。
"""

import torch
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel_size: int, padding: int = 0) -> nn.Sequential:
    """A convolution and its ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size, padding=padding), nn.ReLU())


class Answer(nn.Module):
    """The first Inception block of GoogLeNet: 192 channels in, 256 out."""

    def __init__(self) -> None:
        super().__init__()
        self.branch1 = conv(192, 64, 1)
        self.branch3 = nn.Sequential(conv(192, 96, 1), conv(96, 128, 3, padding=1))
        self.branch5 = nn.Sequential(conv(192, 16, 1), conv(16, 32, 5, padding=2))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(192, 32, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, 192, H, W) to (N, 256, H, W)."""
        branches = self.branch1(maps), self.branch3(maps), self.branch5(maps), self.branch_pool(maps)
        return torch.cat(branches, dim=1)
