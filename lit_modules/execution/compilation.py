"""A network compiled by `torch.compile`, in its modes: how it is compiled, and how it is called then."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

MODES = ("reduce-overhead", "max-autotune")  # with CUDA graphs


def prepare(net: nn.Module, mode: bool | str) -> Callable[[nn.Module, Tensor], Tensor]:
    """Compile the network in place, so that checkpoints keep the plain parameter names; True is the usual mode.

    Returns:
        What calls it with images (N, C, H, W), and gives its logits (N, num_classes).
    """
    if not mode:
        return _plain
    net.compile(mode=mode if isinstance(mode, str) else None, dynamic=False if mode in MODES else None)
    return CudaGraphs() if mode in MODES else _any_size


def _plain(net: nn.Module, images: Tensor) -> Tensor:
    return net(images)


def _any_size(net: nn.Module, images: Tensor) -> Tensor:
    # One compilation serves all batch sizes: an epoch's last batch, and evaluation.
    torch._dynamo.maybe_mark_dynamic(images, 0)
    return net(images)


class CudaGraphs:
    """Runs batches of the usual size as compiled; others, at the end of an epoch, as plain PyTorch.

    A graph knows one shape, and its runs share their memory; one for each such size would cost more to make than it
    saves. On the CPU there are no graphs, and the network is compiled for the usual size alone.
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
