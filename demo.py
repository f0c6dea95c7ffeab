"""A page in the browser: what several trained networks make of a photograph or a drawing, and why.

Only light modules are imported here, so that `--help` and plain mistakes answer at once.
"""

import argparse
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from errors import SIGNALS, MissingPackage, OneLineParser, RunError, UserError, importing, run_program

with importing("demo.py"):
    from cli.flags import refuse_pasted_dashes
    from cli.recipes import PROJECT

WEIGHTS = PROJECT / "weights"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog="python demo.py",
        usage="python demo.py [CHECKPOINT...] [--port N] [--host ADDRESS]",
        description="Serves a page to this machine's browser: upload a photograph or draw, and see the likeliest "
        "classes from several trained networks side by side, and what each looked at. Nothing leaves the machine.",
    )
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="*",
        metavar="CHECKPOINT",
        help="checkpoints of further networks, beside those in weights/",
    )
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port of the page (default: 7860)")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 lets other machines in (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="let checkpoints name classes from outside this project"
    )
    return parser


def _check_address(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise RunError(
            f"{host}:{port} can't be used: {str(error.strerror).partition(' (')[0]}; give another --port or --host"
        ) from None


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 1 if the page can't be served, 2 for a mistake in the command."""
    return run_program("demo.py", lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    refuse_pasted_dashes(arguments)
    options: Any = parser().parse_args(arguments)
    if not 0 < options.port < 65536:
        raise UserError(f"--port must be an integer from 1 to 65535, got {options.port}")
    ours = sorted(WEIGHTS.glob("*.ckpt"), key=lambda path: path.stat().st_size)  # LeNet, the smallest, first
    given = {path.resolve(): path for path in (*ours, *options.checkpoints)}
    checkpoints = list(given.values())
    if not checkpoints:
        raise UserError(f"{WEIGHTS} holds no weights; give the checkpoints of trained networks")
    for package in ("gradio", "captum"):
        if sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None:
            raise MissingPackage("the page needs", package)
    _check_address(options.host, options.port)
    for signum in SIGNALS:  # all end it like Ctrl-C, so that the folder with what was uploaded is removed
        if signal.getsignal(signum) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(signum, signal.default_int_handler)
    # Ctrl-C is how the page is closed.
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"  # of the system too: Gradio looks for its own page
        os.environ["GRADIO_TEMP_DIR"] = folder  # for what is uploaded; read when Gradio is imported
        from pictures.page import serve  # here, not above: torch and Gradio take seconds to import

        serve(checkpoints, options.host, options.port, Path(folder), options.trust_checkpoint)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
