"""The record of a run, `record.json`: what it holds, how it is written, and the facts about the machine in it.

Imports nothing heavy.
"""

import base64
import json
import os
import platform
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from errors import written_aside

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

PROJECT = Path(__file__).resolve().parents[1]
# What each entry of a record holds, and whether a record may lack it. A count or an amount is at least 0.
SCHEMA: dict[str, tuple[str, bool]] = {
    "recipe": ("text", True),
    "config": ("mapping", True),
    "commit": ("text", False),
    "seed": ("count", False),
    "versions": ("mapping of texts", True),
    "machine": ("mapping", True),
    "machine.cpu": ("text", True),
    "machine.gpu": ("text", False),
    "precision": ("text", True),
    "devices": ("count", True),
    "epochs": ("list of mappings", True),
    "parameters": ("amount", False),
    "flops": ("amount", False),
    "train_images": ("count", False),
    "val_images": ("count", False),
    "batch_size": ("count", False),
    "image_size": ("count", False),
    "max_epochs": ("number", False),
    "images_per_second": ("amount", False),
    "fit_seconds": ("amount", False),
    "stopped_after_seconds": ("amount", False),
    "peak_memory_bytes": ("amount", False),
    "best_val_accuracy": ("share", False),
    "test": ("mapping", False),
    "test.accuracy": ("share", True),
    "test.loss": ("float", True),
    "test.accuracy_flip": ("share", False),
    "test.images": ("count", True),
    "test.test_set": ("count", False),
    "test.test_pictures": ("text", False),
    "test.balanced_accuracy": ("share", False),
    "test.class_accuracy": ("mapping of shares", False),
    "test.right": ("text", False),
}
EPOCH = {"epoch": ("count", True), "seconds": ("amount", False), "images_per_second": ("amount", False)}
LARGEST = 1e18  # no number of a record is larger; a larger one can't be calculated with


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all: whoever reads it meanwhile finds the previous one."""
    with written_aside(path) as written:
        written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: If it makes no sense: with the entry that is wrong, and what was expected there.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        raise ValueError("it can't be read as JSON") from None
    if isinstance(record, dict) and record.get("seed") is False:  # an older record of a run without a seed
        record["seed"] = None
    check(record)
    return record


def check(record: Any) -> None:
    """Refuse a record that makes no sense.

    Raises:
        ValueError: With the entry that is wrong, and what was expected there.
    """
    if not isinstance(record, dict):
        raise ValueError("a mapping was expected")
    _check(record, SCHEMA)
    for number, epoch in enumerate(record["epochs"]):
        _check(epoch, EPOCH, f"epochs[{number}].")
        for name, value in epoch.items():
            if name.endswith("/accuracy") and not _is(value, "share"):
                raise ValueError(f"epochs[{number}].{name} must be a number from 0 to 1")
            if name.endswith("/loss") and not _is(value, "float"):
                raise ValueError(f"epochs[{number}].{name} must be a number")
    if "test" in record and not record["test"]["images"]:
        raise ValueError("test.images must be at least 1")
    if not record["recipe"] or not record["devices"]:
        raise ValueError("recipe and devices must not be empty")


def commit() -> str | None:
    """The project's commit, with -dirty behind it if files were changed since; None if git can't tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}  # may be in any encoding
        done = subprocess.run(command, cwd=PROJECT, text=True, timeout=10, check=True, **pipes)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine(device: Any = "cpu") -> dict[str, Any]:
    """Where this runs: system, processor and cores; with an NVIDIA GPU its name and CUDA's version.

    Args:
        device: A torch.device, or its name; any other than these has the processor's name with its own in brackets.
    """
    found: dict[str, Any] = {"platform": platform.platform(), "cpu": _cpu(), "cores": os.cpu_count()}
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        import torch  # here, not above: it takes seconds to import

        return found | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found if kind == "cpu" else found | {"gpu": f"{found['cpu']} ({kind})"}


def peak_memory(device: Any = "cpu") -> int | None:
    """Most memory used so far, in bytes, of a GPU or, on the CPU, of this process; None if the system can't tell.

    Args:
        device: A torch.device, or its name.
    """
    if str(device).startswith("cuda"):
        import torch  # here, not above: it takes seconds to import

        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pack_right(right: Sequence[bool]) -> str:
    """Which test images a network got right, as text of about a bit per image."""
    bits = int("".join("01"[bool(one)] for one in reversed(right)) or "0", 2)
    return base64.b64encode(zlib.compress(bits.to_bytes((len(right) + 7) // 8, "little"), 9)).decode()


def unpack_right(text: str, images: int) -> list[bool]:
    """The inverse of `pack_right`.

    Raises:
        ValueError: If the text does not hold this many images.
    """
    size = (images + 7) // 8
    try:
        unpacker = zlib.decompressobj()
        packed = unpacker.decompress(base64.b64decode(text, validate=True), size + 1)  # a small text can hold gigabytes
    except zlib.error as error:
        raise ValueError(str(error)) from None
    bits = int.from_bytes(packed, "little")
    if len(packed) != size or bits >> images:
        raise ValueError(f"{images} images were expected")
    return [bit == "1" for bit in reversed(f"{bits:0{images}b}")] if images else []


def _check(mapping: Any, schema: dict[str, tuple[str, bool]], prefix: str = "") -> None:
    for name, (kind, needed) in schema.items():
        *parents, key = name.split(".")
        inside = mapping.get(parents[0]) if parents else mapping
        value = inside.get(key) if inside is not None else None
        absent = value is None and not (needed and inside is not None)
        if not absent and not _is(value, kind):
            raise ValueError(f"{prefix}{name} must be {KINDS[kind][0]}")


def _is(value: Any, kind: str) -> bool:
    return KINDS[kind][1](value)


def _is_number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _holds(value: Any, outer: type, kind: str) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, outer) and all(_is(one, kind) for one in inner)


# What is expected, in words, and whether a value is that.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", lambda value: isinstance(value, str)),
    "mapping": ("a mapping", lambda value: isinstance(value, dict)),
    "mapping of texts": ("a mapping of texts", lambda value: _holds(value, dict, "text")),
    "mapping of shares": ("a mapping of numbers from 0 to 1", lambda value: _holds(value, dict, "share")),
    "list of mappings": ("a list of mappings", lambda value: _holds(value, list, "mapping")),
    "number": ("a number", _is_number),
    "float": ("a number", lambda value: isinstance(value, float) or _is_number(value)),  # a loss may be infinite or NaN
    "amount": ("a number of at least 0", lambda value: _is_number(value, 0)),
    "count": ("an integer of at least 0", lambda value: isinstance(value, int) and _is_number(value, 0)),
    "share": ("a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
}


def _cpu() -> str:
    """The processor's name; one without a number, which many virtual machines give, gets its family and model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = facts["model name"]
        return name if re.search(r"\d", name) else f"{name} family {facts['cpu family']} model {facts['model']}"
    except (OSError, KeyError):
        name = ""
    if sys.platform == "darwin":  # where Python knows "arm" and "i386" alone
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return name or platform.processor() or platform.machine()
