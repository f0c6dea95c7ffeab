"""A checkpoint as one file for other programs: ONNX or torch.export, checked against the checkpoint before it is kept.

Only light modules are imported here, so that `--help` and plain mistakes answer at once.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from errors import OneLineParser, UserError, importing, run_program

with importing("export.py"):
    from cli.flags import refuse_pasted_dashes

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python export.py",
        usage="python export.py --ckpt_path PATH --format onnx|torch_export [--output FILE]",
        description="Exports a checkpoint with its preprocessing. In: uint8 images, for Fashion-MNIST (N, 28, 28), "
        'grey, light on dark. Out: calibrated class probabilities, and a score that is above 1 for "not sure". N is '
        "free. The names of the classes are in the file's metadata. It is checked against the checkpoint before it is "
        "kept: on 1,000 test images, or on noise for other pictures.",
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, metavar="PATH", help="checkpoint of a run")
    parser.add_argument("--format", choices=SUFFIXES, required=True, help="kind of file")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file to write (default: beside the checkpoint, .onnx or .pt2)"
    )
    parser.add_argument(
        "--data_dir", type=Path, metavar="DIR", help="folder of the data set (default: the one of the training run)"
    )
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="let the checkpoint name classes from outside this project"
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 1 if the file can't be made, 2 for a mistake in the command."""
    return run_program("export.py", lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    refuse_pasted_dashes(arguments)
    options: Any = parser().parse_args(arguments)
    if not options.ckpt_path.name:
        raise UserError("--ckpt_path needs the path of a checkpoint")
    suffix = SUFFIXES[options.format]
    output = options.output or options.ckpt_path.with_suffix(suffix)
    if output.suffix != suffix:
        raise UserError(f"--output {output}: a file of the format {options.format} ends in {suffix}")
    from weights.exporting import export  # here, not above: torch and Lightning take seconds to import

    print(export(options.ckpt_path, options.format, output, options.data_dir, options.trust_checkpoint))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
