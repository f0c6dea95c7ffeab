"""A solution of googlenet-2: from 16 channels, 16 and then 32 by 3x3 each: the width grows only at the end."""

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
        self.branch5 = nn.Sequential(conv(192, 16, 1), conv(16, 16, 3, padding=1), conv(16, 32, 3, padding=1))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(192, 32, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (N, 192, H, W) to (N, 256, H, W)."""
        branches = self.branch1(maps), self.branch3(maps), self.branch5(maps), self.branch_pool(maps)
        return torch.cat(branches, dim=1)
