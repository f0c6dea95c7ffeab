"""How much of the image one value of a stage's output depends on."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inspection.stages import run_without_data, walk

WHOLE = -1  # every value depends on the whole image


def receptive_fields(net: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Side in pixels of the square of the image that one value of each stage's output depends on.

    Where branches meet, the largest counts. What lies outside the image is padding, so the square may be larger than
    the image. Nothing is computed: the forward pass runs on tensors without data. The arithmetic is that of Araujo,
    Norris, Sim: "Computing Receptive Fields of Convolutional Neural Networks", 2019, doi:10.23915/distill.00021.

    Args:
        net: The network; its stages are those of `inspection.stages.stages`.
        input_shape: Shape (C, H, W) of one image.

    Returns:
        Stage to side; `WHOLE` after a global average or a linear layer.

    Raises:
        Exception: Whatever the network raises for an image of that shape.
    """
    images = torch.empty(1, *input_shape, device="meta")
    noted = _Noted(images)

    def forward() -> Tensor:
        with noted:
            return run_without_data(net, images)

    walked, _ = walk(net, forward, lambda output: noted.seen[id(output)][0] if id(output) in noted.seen else 0)
    return {name: side for name, _, side in walked if side}


class _Noted(TorchDispatchMode):
    """For each tensor computed from the image: its receptive field, and the pixels between two neighbouring values."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.seen = {id(images): (1, 1)}
        self._kept: list[Any] = [images]  # so that no tensor's id is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [self.seen[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self.seen]
        if inputs:
            field, step = (WHOLE, 1) if (WHOLE, 1) in inputs else max(inputs)
            name = func.overloadpacket.__name__
            if name == "convolution":
                field, step = _window(field, step, args[1].shape[-1], args[3][-1], args[5][-1])
            elif name in ("max_pool2d_with_indices", "avg_pool2d"):
                kernel = args[1][-1]
                field, step = _window(field, step, kernel, args[2][-1] if len(args) > 2 and args[2] else kernel, 1)
            elif name in ("_adaptive_avg_pool2d", "adaptive_max_pool2d"):
                size, windows = args[0].shape[-1], args[1][-1]
                same = windows > 1 and size % windows == 0  # else they overlap, or there is one only
                field, step = _window(field, step, size // windows, size // windows, 1) if same else (WHOLE, 1)
            elif name in ("mean", "addmm", "mm", "bmm"):
                field, step = WHOLE, 1
            for value in tree_leaves(output):
                self.seen[id(value)] = field, step
            self._kept.append(output)
        return output


def _window(field: int, step: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    if field == WHOLE:
        return WHOLE, 1
    return field + (kernel - 1) * dilation * step, step * stride
