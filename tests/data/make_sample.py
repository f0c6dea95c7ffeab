"""Makes the sample in this folder out of the full data set: `python -m tests.data.make_sample`."""

import gzip
import struct
from pathlib import Path
from typing import Literal

import torch

from datamodules.files.finding import load, prepare

HERE = Path(__file__).parent


def main() -> None:
    full = prepare(HERE.parents[1] / "data")
    parts: tuple[tuple[Literal["train", "test"], str, int], ...] = (("train", "train", 150), ("test", "t10k", 50))
    for split, prefix, per_class in parts:
        images, labels = load(full, split)
        chosen = torch.cat([(labels == c).nonzero()[:per_class, 0] for c in range(10)]).sort().values
        _write(f"{prefix}-images-idx3-ubyte.gz", images[chosen])
        _write(f"{prefix}-labels-idx1-ubyte.gz", labels[chosen].to(torch.uint8))


def _write(name: str, values: torch.Tensor) -> None:
    header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    (HERE / name).write_bytes(gzip.compress(header + values.numpy().tobytes(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
