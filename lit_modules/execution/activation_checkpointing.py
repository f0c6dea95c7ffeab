"""Activation checkpointing: less memory for more time, and the same gradients.

T. Chen, B. Xu, C. Zhang, C. Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016,
https://arxiv.org/abs/1604.06174
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError

POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def apply_activation_checkpointing(net: nn.Module) -> None:
    """In training, don't keep what the convolutional stages compute between their input and their output.

    The backward pass computes it again, stage by stage, with the same dropout; batch normalisation counts each batch
    once. Names of parameters, evaluation and export stay as they are.

    Args:
        net: A network with an `nn.Sequential` that has convolutions. Its layers, including those of nested Sequentials,
            form the stages: each ends with a pooling layer.

    Raises:
        ValueError: If it has no such part.
    """
    parts = [child for child in net.children() if type(child) is nn.Sequential and _convolves([child])]
    if not parts:
        raise ValueError(
            f"checkpoint_activations: {type(net).__name__} has no nn.Sequential with convolutions directly in it, "
            "whose stages could be computed twice; leave that setting out"
        )
    for part in parts:
        # A method of the instance, which a deep copy binds to the copy; another class, or a wrapper, would show in
        # the names of the parameters, in the table of the stages and in exported files.
        part.forward = MethodType(forward, part)  # type: ignore[method-assign]


def forward(self: nn.Sequential, maps: Tensor) -> Tensor:
    """What `nn.Sequential.forward` computes.

    Raises:
        UserError: If a stage has overwritten its own input.
    """
    if not (self.training and torch.is_grad_enabled()):
        return nn.Sequential.forward(self, maps)
    for stage in _stages(self):
        if not _convolves(stage):
            maps = _run(stage, maps)
            continue
        version = maps._version
        output = checkpoint(_run, stage, maps, use_reentrant=False, context_fn=partial(_contexts, stage, maps.device))
        if maps._version != version:
            raise UserError(
                f"{type(stage[0]).__name__} changes its input in place, so it can't be computed twice; "
                "leave checkpoint_activations out"
            )
        maps = output
    return maps


def _stages(layers: nn.Sequential) -> list[list[nn.Module]]:
    """The layers, split into stages that each end with a pooling layer."""
    stages: list[list[nn.Module]] = [[]]
    for layer in _flat(layers):
        # A layer that works in place would overwrite the input from which the stage is computed a second time.
        if stages[-1] and isinstance(stages[-1][-1], POOLING) and not getattr(layer, "inplace", False):
            stages.append([])
        stages[-1].append(layer)
    return stages


def _flat(layers: nn.Sequential) -> list[nn.Module]:
    flat: list[nn.Module] = []
    for layer in layers:
        flat += _flat(layer) if type(layer) is nn.Sequential else [layer]
    return flat


def _convolves(stage: list[nn.Module]) -> bool:
    return any(isinstance(module, nn.Conv2d) for layer in stage for module in layer.modules())


def _run(stage: list[nn.Module], maps: Tensor) -> Tensor:
    for layer in stage:
        maps = layer(maps)
    return maps


def _contexts(stage: list[nn.Module], device: torch.device) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the forward pass and of computing it again."""
    # PyTorch repeats the random numbers of all devices but Apple's.
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    return nullcontext(), _spare_buffers(stage, state)


@contextmanager
def _spare_buffers(stage: list[nn.Module], state: Tensor | None) -> Iterator[None]:
    """Work on copies of the buffers: batch normalisation has counted this batch already. The state: an Apple GPU's."""
    now = None if state is None else torch.mps.get_rng_state()
    if state is not None:
        torch.mps.set_rng_state(state)
    kept = [(module, dict(module._buffers)) for layer in stage for module in layer.modules()]
    try:
        for module, buffers in kept:
            module._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        yield
    finally:
        for module, buffers in kept:
            module._buffers.update(buffers)
        if now is not None:
            torch.mps.set_rng_state(now)
