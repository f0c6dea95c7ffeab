"""Calls to a network whose compiler records CUDA graphs: a graph knows one shape, and its runs share their memory."""

import torch
from torch import Tensor, nn

MODES = ("reduce-overhead", "max-autotune")  # of torch.compile


class CudaGraphs:
    """Runs full batches as compiled; smaller ones, at the end of an epoch, as plain PyTorch.

    A graph for each such size would cost more to make than it saves. On the CPU there are no graphs, and the network
    is compiled for the full batches alone.
    """

    def __init__(self) -> None:
        self._full = {True: 0, False: 0}  # images in the largest batch so far, in training and in evaluation

    def __call__(self, net: nn.Module, images: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes) that the next call does not overwrite."""
        full = self._full[net.training] = max(self._full[net.training], len(images))
        if len(images) < full:
            with torch.compiler.set_stance("force_eager"):
                return net(images)
        torch.compiler.cudagraph_mark_step_begin()
        return net(images).clone()
