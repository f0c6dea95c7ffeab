"""A network's stages: output shape, parameters and FLOPs of each."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Kept = TypeVar("Kept")


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
        net: The network; its children are the stages, and a Sequential or a list counts as its members.
        input_shape: Shape (C, H, W) of one image.

    Raises:
        NotImplementedError: If the network needs data.
        Exception: Whatever else the network raises for an image of that shape.
    """

    def forward() -> Tensor:
        with counter:
            return run_without_data(net, torch.empty(1, *input_shape, device="meta"))

    counter = FlopCounterMode(display=False)
    walked, output = walk(net, forward, lambda output: tuple(output.shape[1:]))
    flops = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    rows = [
        Stage(name, type(module).__name__, shape or (), _parameters(module), flops.get(name, 0))
        for name, module, shape in walked
    ]
    return rows, Stage("", type(net).__name__, tuple(output.shape[1:]), _parameters(net), counter.get_total_flops())


def walk(
    net: nn.Module, forward: Callable[[], Any], keep: Callable[[Tensor], Kept]
) -> tuple[list[tuple[str, nn.Module, Kept | None]], Any]:
    """Run a network once, in evaluation mode and without gradients, and look at each stage's output.

    Args:
        net: The network; its mode is restored afterwards.
        forward: Runs it. Not through `net(...)`: a compiled network ignores hooks, and would be compiled again.
        keep: What to keep of an output, before the next stage may change it in place.

    Returns:
        Name, module and what was kept (None if the output is no tensor) of each stage, in the order in which they
        ran; and what `forward` returned.
    """
    names = stage_modules(net)
    walked: list[tuple[str, nn.Module, Kept | None]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        walked.append((names[module], module, keep(output) if isinstance(output, Tensor) else None))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with evaluating(net), torch.no_grad():
            return walked, forward()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each part is in its own again, as frozen ones evaluate while the others train."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def stage_outputs(net: nn.Module, image: Tensor) -> list[tuple[str, str, Tensor]]:
    """Name, kind and output, (C, H, W) or (C,) on the CPU, of each stage for one image (1, C, H, W).

    What follows a convolution or a linear layer and keeps its shape (normalisation, activation, dropout) counts as part
    of it.
    """
    image = image.to(next(net.parameters()).dtype)
    walked, _ = walk(net, lambda: net.forward(image), lambda output: output[0].clone())
    found: list[tuple[str, str, Tensor]] = []
    for name, module, output in walked:
        if output is None:
            continue
        follows = all(parameter.dim() < 2 for parameter in module.parameters())
        if follows and found and output.shape == found[-1][2].shape:
            found[-1] = (*found[-1][:2], output)
        else:
            found.append((name, type(module).__name__, output))
    return [(name, kind, output.float().cpu()) for name, kind, output in found]


def stage_modules(net: nn.Module) -> dict[nn.Module, str]:
    """Module to name of a network's stages: its children, where a Sequential or a list counts as its members."""
    names: dict[nn.Module, str] = {}
    for name, child in net.named_children():
        if type(child) in (nn.ModuleList, nn.ModuleDict):
            names |= {inner: f"{name}.{inner_name}" for inner, inner_name in stage_modules(child).items()}
        elif type(child) is nn.Sequential:
            names |= {inner: f"{name}.{inner_name}" for inner_name, inner in child.named_children()}
        else:
            names[child] = name
    return names


def run_without_data(net: nn.Module, images: Tensor) -> Any:
    """The network's output for images on the device "meta", in float32 whatever precision it is trained in.

    Raises:
        NotImplementedError: If the network needs data, for a shape or a branch that depends on values.
        Exception: Whatever else the network raises for images of that shape.
    """
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    # What the forward pass may keep for the next one: attributes, buffers, and what is in a list or a dictionary.
    kept: list[Any] = [one for module in net.modules() for one in (vars(module), *vars(module).values())]
    before = [(one, one.copy()) for one in kept if isinstance(one, dict | list)]
    stand_ins = {
        name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    try:
        return torch.func.functional_call(net, stand_ins, (images,))
    except (RuntimeError, TypeError) as error:  # PyTorch has no class of its own for what can't be done without data
        if re.search(r"\bmeta\b", str(error)):
            raise NotImplementedError(str(error)) from None
        raise
    finally:
        for one, own in before:
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(one)):
                one.clear()
                (one.update if isinstance(one, dict) else one.extend)(own)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
