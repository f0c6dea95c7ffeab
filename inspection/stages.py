"""A network's stages: output shape, parameters and FLOPs of each, as the tutorial prints them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Stage(NamedTuple):
    """One row of the table.

    Attributes:
        name: Name of the module within the network.
        kind: Its class.
        shape: Shape (C, H, W) or (C,) of its output for one image.
        parameters: Number of its parameters.
        flops: Floating-point operations of its forward pass for one image (2 for each multiply-add).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def stages(net: nn.Module, input_shape: tuple[int, int, int]) -> tuple[list[Stage], Stage]:
    """The rows for a network, and their total.

    Nothing is computed: the forward pass runs on tensors without data.

    Args:
        net: The network; its children are the stages, and a Sequential counts as its members.
        input_shape: Shape (C, H, W) of one image.

    Raises:
        Exception: Whatever the network raises for an image of that shape.
    """
    names = stage_modules(net)
    shapes: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note_shape(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        shapes.append((module, tuple(output.shape[1:]) if isinstance(output, Tensor) else ()))

    handles = [module.register_forward_hook(note_shape) for module in names]
    was_training = net.training
    counter = FlopCounterMode(display=False)
    try:
        net.eval()
        with torch.no_grad(), counter:
            output = torch.func.functional_call(net, without_data(net), torch.empty(1, *input_shape, device="meta"))
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    rows = [
        Stage(names[module], type(module).__name__, shape, _parameters(module), flops.get(names[module], 0))
        for module, shape in shapes
    ]
    return rows, Stage("", type(net).__name__, tuple(output.shape[1:]), _parameters(net), counter.get_total_flops())


def stage_modules(net: nn.Module) -> dict[nn.Module, str]:
    """Module to name of a network's stages: its children, where a Sequential counts as its members."""
    names: dict[nn.Module, str] = {}
    for name, child in net.named_children():
        if type(child) is nn.Sequential:
            names |= {inner: f"{name}.{inner_name}" for inner_name, inner in child.named_children()}
        else:
            names[child] = name
    return names


def without_data(net: nn.Module) -> dict[str, Tensor]:
    """Stand-ins for a network's parameters and buffers, in float32 whatever precision it is trained in."""
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    return {
        name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def table(net: nn.Module, input_shape: tuple[int, int, int]) -> str:
    """The stages as aligned text."""
    rows, total = stages(net, input_shape)
    lines = [("stage", "module", "output shape", "parameters", "FLOPs"), ("input", "", _shape(input_shape), "", "")]
    lines += [(row.name, row.kind, _shape(row.shape), f"{row.parameters:,}", f"{row.flops:,}") for row in rows]
    lines.append(("total", total.kind, _shape(total.shape), f"{total.parameters:,}", f"{total.flops:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * max(len(line) for line in text)
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
