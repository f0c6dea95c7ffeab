"""What one command does, from top to bottom; and every way in which it can end, as one line."""

import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.divergence_guard import ADVICE, is_overflow
from callbacks.processes import Processes, end_process
from cli.command import Command
from errors import UNWRITABLE, Diverged, RunError, UserError, is_first_process, one_line, run_program, shown, unwritable
from launch import verbs
from launch.classifier_cli import ClassifierCLI
from launch.lightning_flags import refuse_broken_gpu
from launch.memory import advice, is_out_of_memory, keep_freed_memory
from launch.start import Start

LOST_CONNECTION = r"(?i)gloo|nccl|connection (closed|reset|refused)|broken pipe"


def run(command: Command) -> int:
    """Run a checked command line; returns the exit code, unless this is one of several processes, which then ends."""
    exit_code = run_program("train.py", lambda: _run(command))
    end_process(exit_code)
    return exit_code


def _run(command: Command) -> None:
    _prepare_process()
    processes = Processes()
    cli = ClassifierCLI(command, processes)
    with _one_line_errors(cli), _no_process_left(processes):
        processes.begin()
        cli.start = Start.of(command)
        cli.build()
        verbs.run(cli)


def _prepare_process() -> None:
    _quiet()
    if not torch.cuda.is_available():
        # Lightning has PyTorch ask NVIDIA's library for GPUs; where there is none, each optimiser step looks for it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    keep_freed_memory()
    sys.path.append(str(Path.cwd()))  # where the user's own networks are


@contextmanager
def _no_process_left(processes: Processes) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if re.search(LOST_CONNECTION, str(error)):
            processes.await_loss()
        processes.kill_children()
        raise
    finally:
        processes.ignore_ends()
        processes.watch.stop()
        if workers := multiprocessing.active_children():
            # Loaders of an interrupted run: they ignore the signals that stop a run.
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch would report their end as an error
            for worker in workers:
                worker.kill()


@contextmanager
def _one_line_errors(cli: ClassifierCLI) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if error.name:
            raise  # `run_program` knows it
        raise UserError(one_line(str(error))) from None  # Lightning's own words, of a callback's missing package
    except (MisconfigurationException, ArgumentError) as error:
        raise UserError(one_line(str(error))) from None
    except (RuntimeError, MemoryError) as error:
        if is_overflow(error):
            why = f"the optimiser's step is too large for the weights; {ADVICE}"
            raise Diverged(why if is_first_process() else "") from None
        compiling = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if compiling and not is_out_of_memory(error):
            reason = one_line(str(error)).partition(" Set TORCH")[0]
            raise RunError(f"the network can't be compiled here, leave --compile out: {reason}") from None
        _check_folder(cli)
        if "view size is not compatible" in str(error):  # a callback's or a network's own, like ModelPruning's
            raise UserError(f"{one_line(str(error))}; set --model.channels_last false") from None
        if "not used in producing" in str(error) or "finished reduction in the prior iteration" in str(error):
            why = "not every parameter of the network takes part in each step; "
            why += "add --trainer.strategy ddp_find_unused_parameters_true"
            raise RunError(why if is_first_process() else "") from None
        if "does not have a deterministic implementation" in str(error):
            why = f"{one_line(str(error)).partition(',')[0]}; set --trainer.deterministic warn"
            raise UserError(why if is_first_process() else "") from None
        if "not currently implemented for the MPS device" in str(error):
            raise RunError(f"{one_line(str(error)).partition('. ')[0]}; --accelerator cpu can do it") from None
        if not is_out_of_memory(error):
            refuse_broken_gpu(error)
            raise
        data = cli.config.data
        size, flag = data.batch_size, "--batch_size"
        if cli.command.subcommand != "fit":
            size, flag = data.eval_batch_size or size, "--data.eval_batch_size"
        raise RunError(advice(size, data.image_size, flag)) from None
    except OSError as error:
        _check_folder(cli)
        if error.errno not in UNWRITABLE:
            raise
        raise RunError(unwritable(error)) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into exit code 1
            raise KeyboardInterrupt from None
        raise


def _check_folder(cli: ClassifierCLI) -> None:
    """Say so if the cause of an error is that somebody removed the folder of the run."""
    folder = cli.callbacks.folder if hasattr(cli, "callbacks") else None
    if folder and folder.path and folder.is_here and not folder.path.exists():
        raise RunError(f"{shown(folder.path)} was removed while the run wrote to it; start it again") from None


def _without_disk_errors(failure: threading.ExceptHookArgs) -> None:
    """Report what ended a thread. TensorBoard's ends on a full disk, which the run's next write says in one line."""
    if not isinstance(failure.exc_value, OSError) or failure.exc_value.errno not in UNWRITABLE:
        threading.__excepthook__(failure)


def _quiet() -> None:
    """Keep Lightning's hints and notices out of a normal run."""
    threading.excepthook = _without_disk_errors
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # which print their reports this way
    for message in (
        "LightningCLI's args parameter is intended",  # the arguments are translated on purpose
        ".*does not have many workers",  # fetching a batch takes microseconds
        r"`ModelCheckpoint\(monitor='val/accuracy'\)` could not find",  # the run ends before its first validation
        "The number of training batches .* is smaller than the logging interval",
        "You have overridden `on_before_batch_transfer`",  # LitClassifier seeds the step there, for any data module
        "You're using the WeightAveraging callback, but loading a checkpoint outside",  # which holds the average
        "Be aware that when using `ckpt_path`, callbacks",  # a test needs no checkpoint callback
        "Checkpoint directory .* exists and is not empty",  # a continued run uses its own folder
        "Please use the new API settings to control TF32",  # of PyTorch 2.9, whose old ones work
        "You are using a custom batch sampler `EvalBatches`",  # which returns every image
        r"\s*Unable to serialize instance",  # of a callback's default device: it is not needed again
        ".*LeafSpec.* is deprecated",  # inside Lightning
        "The `srun` command is available on your system but is not used",  # the login machine of a cluster
        "The dirpath has changed from",  # the folder of the runs was moved, or a test has none
        "torch.distributed.nn.functional.all_gather is deprecated",  # inside Lightning
        "Total length of `.*` across ranks is zero",  # no validation images are wanted
        "You're resuming from a checkpoint that ended before the epoch",  # TrainBatches goes on where it ended
    ):
        warnings.filterwarnings("ignore", message)
