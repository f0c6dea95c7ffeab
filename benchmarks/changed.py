"""The networks of configs/small with one part changed that their classes have no argument for.

What that does to accuracy: `python -m benchmarks.results --families ablation`, docs/results.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from models import VGG, AlexNet, GoogLeNet, LeNet, NiN

NETWORKS: dict[str, Callable[..., Any]] = {
    "lenet": LeNet,
    "alexnet": partial(AlexNet, width_divisor=4),
    "vgg11": partial(VGG, depth=11, width_divisor=8),
    "nin": lambda image_size: NiN(),
    "googlenet": lambda image_size: GoogLeNet(),
}


def sigmoid(network: Literal["lenet", "alexnet", "vgg11", "nin", "googlenet"], image_size: int = 28) -> nn.Module:
    """Build the network with a sigmoid for every ReLU; NiN keeps its last one, or its logits would lie in 0..1."""
    net = NETWORKS[network](image_size=image_size)
    names = [name for name, module in net.named_modules() if isinstance(module, nn.ReLU)]
    for name in names[:-1] if network == "nin" else names:
        net.set_submodule(name, nn.Sigmoid())
    return net


def averaged(network: Literal["lenet", "alexnet", "vgg11"], image_size: int = 28) -> nn.Module:
    """Build the network with the average of each map in place of its last pooling and of its hidden linear layers."""
    net = NETWORKS[network](image_size=image_size)
    channels = [layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)][-1]
    net.features[-1] = nn.AdaptiveAvgPool2d(1)
    net.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels, 10))
    return net


def hidden(network: Literal["nin", "googlenet"], image_size: int = 28) -> nn.Module:
    """Build the network with AlexNet's hidden layer of 4096 in place of NiN's last block, or before GoogLeNet's output.

    The average goes too, which changes nothing at the sizes of configs/small: the maps are 1x1 before it.
    """
    net = NETWORKS[network](image_size=image_size)
    last = net.features if network == "nin" else net.features.stage5
    last[-1] = nn.Flatten()
    width = net.features(torch.zeros(2, 1, image_size, image_size)).shape[1]
    net.classifier = nn.Sequential(nn.Linear(width, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, 10))
    return net


def large_kernels(network: Literal["vgg11"], image_size: int = 32) -> nn.Module:
    """Build the network with one 5x5 convolution, which sees as much, in place of every two 3x3 convolutions."""
    net = NETWORKS[network](image_size=image_size)
    layers: list[nn.Module] = []
    for layer in net.features:
        if isinstance(layer, nn.Conv2d) and len(layers) > 1 and isinstance(layers[-2], nn.Conv2d):
            layers[-2:] = [nn.Conv2d(layers[-2].in_channels, layer.out_channels, kernel_size=5, padding=2)]
        else:
            layers.append(layer)
    net.features = nn.Sequential(*layers)
    return net


def without_1x1(network: Literal["nin"], image_size: int = 67) -> nn.Module:
    """Build the network with the first convolution of every block alone."""
    net = NETWORKS[network](image_size=image_size)
    for place, block in enumerate(net.features):
        if isinstance(block, nn.Sequential):
            net.features[place] = block[:2]
    return net
