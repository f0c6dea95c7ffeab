"""How large a network is that a file names, and what it makes of an image: found on tensors without data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

SPARE = 10**7  # numbers that a network may hold beyond what its file does: buffers that are not saved
BUILT = 2 * 10**8  # numbers in all that it may make on its way: one built on part of VGG-16 makes the rest too
MODULES = 20_000  # parts of a network, and copies of their tensors
OUTPUTS = 2**28  # numbers that any step of it may make of one image: VGG's first at 2048 pixels


def too_large(net: Mapping[str, Any], numbers: int, image: tuple[int, int, int]) -> str:
    """Build a network and show it an image of shape (C, H, W); both are stopped when they get too large.

    Args:
        net: Its class and arguments.
        numbers: How many the file holds.
        image: Shape of the image.

    Returns:
        What is too large; "" if nothing is, or if it can't be built, which is reported when it really is.
    """
    from lightning.pytorch.cli import instantiate_module  # here, not above: only this needs it

    left = {"numbers": numbers + BUILT, "parts": MODULES, "outputs": 0}  # below 0 if it was stopped
    made: list[nn.Module] = []
    with _counted(left), suppress(Exception), torch.device("meta"), torch.random.fork_rng(devices=[]):
        with _Made(left, inf):
            made.append(instantiate_module(_Holder, {"net": net}).net.eval())
        with torch.no_grad(), _Made(left, OUTPUTS):
            made[0](torch.empty(1, *image))
    if left["outputs"] < 0:
        return "names a network that makes far too many numbers of one image"
    # Counted again, as copies of a layer are not registered; lazy ones have their size now.
    held = [tensor.numel() for one in made for tensor in (*one.parameters(), *one.buffers()) if not is_lazy(tensor)]
    large = min(left.values()) < 0 or sum(held) > numbers + SPARE
    return "names a larger network than the one whose weights it holds" if large else ""


class _Holder:
    """What a network is given to, for the parser to build it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


class _Made(TorchDispatchMode):
    """Stops at an operation whose output has more numbers than `most`, and at too many copies, as of layers."""

    def __init__(self, left: dict[str, int], most: float) -> None:
        super().__init__()
        self._left = left
        self._most = most

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        made = output if isinstance(output, list | tuple) else [output]
        if any(isinstance(one, Tensor) and one.numel() > self._most for one in made):
            self._left["outputs"] = -1
        self._left["parts"] -= operation is torch.ops.aten.clone.default
        if min(self._left["outputs"], self._left["parts"]) < 0:
            raise ValueError("too large")
        return output


@contextmanager
def _counted(left: dict[str, int]) -> Iterator[None]:
    """Stop the building of networks with more numbers or parts than this; the parser may hide that it did."""

    def count(module: nn.Module, name: str, part: Any) -> None:
        left["parts"] -= 1
        if isinstance(part, Tensor) and not is_lazy(part):
            left["numbers"] -= part.numel()
        if min(left.values()) < 0:
            raise ValueError("too large")

    handles: list[Any] = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
