"""How large a network is that a file names, and what it makes of an image: found on tensors without data."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

SPARE = 10**7  # numbers that a network may hold beyond what its file does: buffers that are not saved
MODULES = 20_000  # parts of a network
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

    left = {"numbers": numbers + SPARE, "parts": MODULES, "outputs": 0}  # below 0 if it was stopped
    with _counted(left), suppress(Exception), torch.device("meta"), torch.random.fork_rng(devices=[]):
        made = instantiate_module(_Holder, {"net": net}).net.eval()
        with torch.no_grad(), _Outputs(left):
            made(torch.empty(1, *image))
    if left["outputs"] < 0:
        return "names a network that makes far too many numbers of one image"
    return "names a larger network than the one whose weights it holds" if min(left.values()) < 0 else ""


class _Holder:
    """What a network is given to, for the parser to build it."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net


class _Outputs(TorchDispatchMode):
    """Stops at an operation whose output is too large."""

    def __init__(self, left: dict[str, int]) -> None:
        super().__init__()
        self._left = left

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        made = output if isinstance(output, list | tuple) else [output]
        if any(isinstance(one, Tensor) and one.numel() > OUTPUTS for one in made):
            self._left["outputs"] = -1
            raise ValueError("too large")
        return output


@contextmanager
def _counted(left: dict[str, int]) -> Iterator[None]:
    """Stop the building of networks with more numbers or parts than this; the parser may hide that it did."""

    def count(module: nn.Module, name: str, part: Any) -> None:
        left["parts"] -= 1
        if isinstance(part, Tensor):
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
