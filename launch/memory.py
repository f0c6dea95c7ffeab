"""Main memory kept for the next step; what to do when a batch does not fit in memory, and the largest that does."""

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from errors import count
from runs.record import peak_memory

# Share of the free memory that the batch size found by trial may take: data, metrics and other programs need some.
SHARE = {"cuda": 0.9, "cpu": 0.5}


def keep_freed_memory() -> bool:
    """Have the C library keep what PyTorch frees, for the next step's tensors, until the process ends.

    By default, glibc gives each tensor of more than 32 MiB back to the kernel as soon as it is freed, and the kernel
    clears every page of the next one: on the CPU a twentieth to a sixth of the time of the tutorial's larger networks
    (benchmarks/freed_memory.py).

    Returns:
        Whether the C library can; only glibc does, on Linux.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # macOS, Windows, musl
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # from malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    pattern = (
        r"can't allocate memory|not enough memory|out of memory|CU\w+_STATUS_ALLOC_FAILED|CUDNN_STATUS_NOT_SUPPORTED"
        "|[Uu]nable to find (an engine|a valid cuDNN algorithm)"  # none that fits into what is free
    )
    return isinstance(error, RuntimeError) and re.search(pattern, str(error)) is not None


def advice(batch_size: int, image_size: int, flag: str = "--batch_size") -> str:
    """One line that names what did not fit and the next smaller sizes to try."""
    tries = [f"{flag} {batch_size // 2}"] if batch_size > 1 else []
    if image_size > 28:
        # Three quarters, in steps that the networks' pooling divides.
        tries.append(f"--image_size {max(28, image_size * 3 // 4 // 32 * 32)}")
    tries.append("a smaller network")
    batch = f"{count(batch_size, 'image')} of {image_size}x{image_size}"
    return f"out of memory with batches of {batch}; try {', or '.join(tries)}"


def largest_batch_size(
    net: nn.Module,
    make_optimizer: Callable[[], Any],
    input_shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype | None,
    most: int,
    processes: int = 1,
) -> int:
    """The largest power of two whose training step fits, found by doubling.

    On the CPU half of the free memory is the limit, and the size is not tried but worked out from the memory of the
    size before: a system that runs out of memory ends programs instead of refusing.

    Args:
        net: A network that is not needed afterwards: it is trained on noise, in the type of its weights.
        make_optimizer: Makes the optimiser of its parameters, once they are where they are trained.
        input_shape: Shape (C, H, W) of one image.
        device: Where to try.
        dtype: Type of autocast, or None.
        most: Never more than this.
        processes: How many share this machine's memory on the CPU.

    Raises:
        RuntimeError: If not even two images fit.
    """
    net = net.to(device).train()
    optimizer = make_optimizer()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            logits = net(torch.rand(size, *input_shape, device=device, dtype=next(net.parameters()).dtype))
            loss = F.cross_entropy(logits, torch.zeros(size, dtype=torch.long, device=device))
        loss.backward()
        return loss

    fits, size = 0, 2  # two: batch normalisation can't use one
    while True:
        before = peak_memory(device) or 0
        try:
            optimizer.step(closure)  # which LBFGS calls several times
        except RuntimeError as error:
            if not fits or not is_out_of_memory(error):
                raise
            break
        if device.type == "cuda" and (peak_memory(device) or 0) > SHARE["cuda"] * _free(device):
            break
        fits = size
        size *= 2
        growth = (peak_memory(device) or 0) - before
        if size > most or (device.type == "cpu" and 2 * growth > SHARE["cpu"] * _free(device) / processes):
            break
    if device.type == "cuda":
        del net, optimizer
        torch.cuda.empty_cache()
    return min(max(fits, 1), most)


def _free(device: torch.device) -> float:
    """Memory that this process may use, in bytes; including, on the GPU, what it uses already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        whole = int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        whole = 4 << 30  # unknown: assume 4 GiB
    return min(whole, *_free_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _free_of_groups(own: Path, root: Path) -> Iterator[float]:
    """What is left of the memory that a container or a cluster's job may use: of each of Linux's control groups."""
    yield math.inf
    with suppress(OSError, ValueError):  # other systems
        for line in own.read_text(encoding="utf-8").splitlines():
            _, kind, path = line.split(":", 2)
            if kind not in ("", "memory"):
                continue
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kind else ("memory.max", "memory.current")
            top = root / kind
            group = top / path.strip("/")
            for place in (group, *group.parents):  # a limit of one above counts too
                with suppress(OSError, ValueError):  # "max", where there is none
                    limit, used = (int((place / name).read_text()) for name in names)
                    # Files that the kernel keeps for later; the groups within count too, in the old version as a total.
                    kept = re.findall(r"^(?:total_)?inactive_file (\d+)", (place / "memory.stat").read_text(), re.M)
                    yield limit - used + max(map(int, kept), default=0)
                if place == top:
                    break
