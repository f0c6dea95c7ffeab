"""GoogLeNet (Inception v1), parallel branches that look at several scales at once.

C. Szegedy, W. Liu, Y. Jia, P. Sermanet, S. Reed, D. Anguelov, D. Erhan, V. Vanhoucke, A. Rabinovich, "Going Deeper with
Convolutions", 2014, https://arxiv.org/abs/1409.4842

Deliberate differences from the paper, all from Dive into Deep Learning's PyTorch edition, section 5.9
(https://github.com/ShusenTang/Dive-into-DL-PyTorch): no auxiliary classifiers, no local response normalisation, no
dropout before the output layer, and no ReLU after the two convolutions of the second stage. The 5x5 branch is a true
5x5 convolution, as in the paper (torchvision's is 3x3). Batch normalisation is optional and came after the paper.
"""

from collections import OrderedDict

import torch
from torch import nn


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    batch_norm: bool = False,
    relu: bool = True,
) -> nn.Sequential:
    """Build a convolution, then batch normalisation and ReLU if wanted."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(out_channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class Inception(nn.Module):
    """Four branches side by side, concatenated along the channels; height and width stay.

    Args:
        in_channels: channels of the input.
        conv1: channels of the 1x1 branch.
        conv3: channels of the 3x3 branch: after its 1x1 reduction, and out.
        conv5: channels of the 5x5 branch: after its 1x1 reduction, and out.
        pool: channels of the max pooling branch, after its 1x1 projection.
        batch_norm: put batch normalisation between every convolution and its ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        conv1: int,
        conv3: tuple[int, int],
        conv5: tuple[int, int],
        pool: int,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.branch_conv1 = conv_block(in_channels, conv1, 1, batch_norm=batch_norm)
        self.branch_conv3 = nn.Sequential(
            conv_block(in_channels, conv3[0], 1, batch_norm=batch_norm),
            conv_block(conv3[0], conv3[1], 3, padding=1, batch_norm=batch_norm),
        )
        self.branch_conv5 = nn.Sequential(
            conv_block(in_channels, conv5[0], 1, batch_norm=batch_norm),
            conv_block(conv5[0], conv5[1], 5, padding=2, batch_norm=batch_norm),
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),
            conv_block(in_channels, pool, 1, batch_norm=batch_norm),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (N, in_channels, H, W) to (N, conv1 + conv3[1] + conv5[1] + pool, H, W)."""
        branches = self.branch_conv1(maps), self.branch_conv3(maps), self.branch_conv5(maps), self.branch_pool(maps)
        return torch.cat(branches, dim=1)


class GoogLeNet(nn.Module):
    """Two convolutional stages, nine Inception blocks in three stages, global average pooling, one linear layer.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        batch_norm: put batch normalisation after every convolution, before its ReLU.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, batch_norm: bool = False) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(f"in_channels={in_channels} and num_classes={num_classes} must both be at least 1")
        stage1 = nn.Sequential(  # shapes for 96x96 images
            conv_block(in_channels, 64, 7, stride=2, padding=3, batch_norm=batch_norm),  # (N, 64, 48, 48)
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # (N, 64, 24, 24)
        )
        stage2 = nn.Sequential(
            conv_block(64, 64, 1, batch_norm=batch_norm, relu=False),  # (N, 64, 24, 24)
            conv_block(64, 192, 3, padding=1, batch_norm=batch_norm, relu=False),  # (N, 192, 24, 24)
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # (N, 192, 12, 12)
        )
        stage3 = nn.Sequential(
            Inception(192, 64, (96, 128), (16, 32), 32, batch_norm),  # (N, 256, 12, 12)
            Inception(256, 128, (128, 192), (32, 96), 64, batch_norm),  # (N, 480, 12, 12)
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # (N, 480, 6, 6)
        )
        stage4 = nn.Sequential(
            Inception(480, 192, (96, 208), (16, 48), 64, batch_norm),  # (N, 512, 6, 6)
            Inception(512, 160, (112, 224), (24, 64), 64, batch_norm),  # (N, 512, 6, 6)
            Inception(512, 128, (128, 256), (24, 64), 64, batch_norm),  # (N, 512, 6, 6)
            Inception(512, 112, (144, 288), (32, 64), 64, batch_norm),  # (N, 528, 6, 6)
            Inception(528, 256, (160, 320), (32, 128), 128, batch_norm),  # (N, 832, 6, 6)
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),  # (N, 832, 3, 3)
        )
        stage5 = nn.Sequential(
            Inception(832, 256, (160, 320), (32, 128), 128, batch_norm),  # (N, 832, 3, 3)
            Inception(832, 384, (192, 384), (48, 128), 128, batch_norm),  # (N, 1024, 3, 3)
            nn.AdaptiveAvgPool2d(1),  # (N, 1024, 1, 1)
        )
        stages = {"stage1": stage1, "stage2": stage2, "stage3": stage3, "stage4": stage4, "stage5": stage5}
        self.features = nn.Sequential(OrderedDict(stages))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(1024, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, in_channels, H, W) of any size to logits (N, num_classes)."""
        return self.classifier(self.features(images))
