"""Calls to a network whose compiler records CUDA graphs: a graph knows one shape, and its runs share their memory."""

from collections import Counter

import torch
from torch import Tensor, nn

MODES = ("reduce-overhead", "max-autotune")  # of torch.compile


class CudaGraphs:
    """Runs batches of the usual size as compiled; others, at the end of an epoch, as plain PyTorch.

    A graph for each such size would cost more to make than it saves. On the CPU there are no graphs, and the network
    is compiled for the usual size alone.
    """

    def __init__(self) -> None:
        self._sizes: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}  # in training and in evaluation

    def __call__(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes) that the next call does not overwrite."""
        sizes = self._sizes[net.training]
        sizes[len(images)] += 1
        if len(images) != sizes.most_common(1)[0][0]:
            with torch.compiler.set_stance("force_eager"):
                return net(images)
        torch.compiler.cudagraph_mark_step_begin()
        return net(images).clone()
