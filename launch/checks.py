"""Contradictions between configuration, machine, network and checkpoint, found before anything is written."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any
from urllib.error import URLError

import torch
from jsonargparse import Namespace
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cli.command import Command
from cli.messages import own_words
from errors import UserError, is_first_process, one_line, print_warning
from inspection.stages import run_without_data, stages
from launch.lightning_flags import check_trainer_settings
from launch.memory import is_out_of_memory
from lit_modules import LitClassifier
from lit_modules.execution.compilation import MODES
from runs.settings import is_kept, without_off

# Settings that test and predict, too, must share with the checkpoint: the network, and what its outputs mean.
LEARNED = ("model.net", "data.class_names")
OF_BATCHES = ("WarmupDecay", "OneCycleLR", "CyclicLR")  # schedules that are meant to move after each batch


def named(class_path: str) -> Any:
    """The class or function of that dotted name; not the module, where torchvision has one of the same name."""
    try:
        return resolve_name(":".join(class_path.rsplit(".", 1)))
    except ModuleNotFoundError:  # a class or a method within a class
        return resolve_name(class_path)


def check_configuration(config: Namespace, command: Command, data_class: type) -> None:
    """Refuse settings that contradict each other or this machine.

    Args:
        config: The parsed configuration.
        command: The command line that it was made from.
        data_class: The class of the data set.
    """
    for section in ("model", "data", "trainer"):
        if not isinstance(config[section], Namespace):
            raise UserError(f"{section} is {config[section]!r}; a mapping of settings was expected")
    if "max_epochs" not in config.trainer:  # null in a recipe, filled with the flags alone
        raise UserError("trainer is None; a mapping of settings was expected")
    if not hasattr(config.model.net, "class_path"):  # what a module holds, made already
        raise UserError(f"model.net names an object of {type(config.model.net).__name__}; name its class")
    check_nulls(config.model, LitClassifier, "model")
    check_nulls(config.data, data_class, "data")
    check_accelerator(config.trainer)
    check_trainer_settings(config.trainer, command.subcommand)
    check_accumulation(config.model.compile, config.trainer.accumulate_grad_batches)
    found = ["--model.optimizer.lr"] if command.find_lr else []
    check_learning_rate(config.model.scheduler, [*command.overrides, *found])


def check_accelerator(trainer: Namespace) -> None:
    """Refuse a device that this machine does not have."""
    accelerator = trainer.accelerator
    if not isinstance(accelerator, str):
        return
    forks = re.search("fork|notebook", str(trainer.strategy))  # which must find CUDA untouched
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() and not forks:
        try:
            torch.cuda.init()
        # GPUs are counted by NVIDIA's library, whose driver may be too old for PyTorch.
        except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # then none is counted
            if is_first_process():
                print_warning(f"the GPU is not used: {one_line(str(error))}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if {"gpu": cuda or mps, "cuda": cuda, "mps": mps}.get(accelerator, True):
        return
    raise UserError(
        f"accelerator={accelerator}: PyTorch finds no such device on this machine; use --accelerator cpu or auto"
    )


def check_learning_rate(scheduler: Any, flags: Sequence[str]) -> None:
    """Refuse a learning rate that the schedule would ignore."""
    if not hasattr(scheduler, "class_path") or not any(
        re.match(r"--model\.optimizer\.(init_args\.)?lr\b", flag) for flag in flags
    ):
        return
    for own in {"max_lr", "base_lr"} & set(inspect.signature(named(scheduler.class_path)).parameters):
        raise UserError(
            f"{scheduler.class_path} sets the learning rate itself, so --lr would change nothing; "
            f"set --model.scheduler.init_args.{own}"
        )


def warn_of_interval(model: Namespace, command: Command) -> None:
    """Say that a schedule moves after each batch, where only the recipe, which had another one, has said so."""
    own = command.given().get("model.scheduler") == "" or command.asked_for("model.scheduler.class_path")
    if not own or not hasattr(model.scheduler, "class_path") or model.scheduler_interval != "step":
        return
    name = model.scheduler.class_path.rpartition(".")[2]
    if name not in OF_BATCHES and not command.asked_for("model.scheduler_interval") and is_first_process():
        print_warning(
            f"{name} moves after each batch, as the recipe's schedule does; with --model.scheduler_interval epoch it "
            "moves after each epoch"
        )


def check_nulls(settings: Any, owner: Any, name: str) -> None:
    """Refuse null where the parameter of `owner` does not take it; the parser accepts it anywhere."""
    if not settings:
        return
    parameters = dict(inspect.signature(owner).parameters)
    if "kwargs" in parameters and inspect.isclass(owner):  # they stand for those of the class above
        parameters = dict(inspect.signature(inspect.getmro(owner)[1]).parameters) | parameters
    for key, value in settings.items(branches=True):
        if "." in key or key not in parameters:
            continue
        optional = re.search(r"None|Optional\[|Any\b|_empty", str(parameters[key].annotation))  # _empty: it has no type
        if value is None and parameters[key].default is not None and not optional:
            raise UserError(f"{name}.{key} is null; give it a value, or leave it out")
        if hasattr(value, "class_path"):
            check_nulls(value.get("init_args"), named(value.class_path), f"{name}.{key}.init_args")


def check_accumulation(compile: Any, batches: Any) -> None:
    """Refuse to sum gradients over batches if CUDA graphs overwrite them at each batch."""
    if compile in MODES and batches != 1:
        raise UserError(
            f"--model.compile {compile} can't go with accumulate_grad_batches={batches}: its CUDA graphs overwrite the "
            "gradients at each batch; use --compile"
        )


@contextmanager
def explained(net: str) -> Iterator[None]:
    """For the building of network, data module and Trainer: what one of them refuses is said in one line.

    Args:
        net: The network's class, as the user wrote it.

    Raises:
        UserError: In place of their own errors, except for those of memory.
    """
    try:
        yield
    except (ValueError, TypeError, AttributeError, AssertionError) as error:  # raised by the network itself
        if "uninitialized parameter" in str(error):  # when weights are drawn, or the optimiser is made
            raise UserError(
                f"{net} has lazy layers, which get their sizes when it is first used; "
                "use it once at the end of its __init__: self(torch.zeros(1, CHANNELS, HEIGHT, WIDTH))"
            ) from None
        raise UserError(own_words(str(error) or type(error).__name__)) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise UserError(one_line(str(error))) from None
    except URLError as error:
        raise UserError(f"{net} can't fetch its weights: {error.reason}; get online, or leave them out") from None
    except (OSError, LookupError, ArithmeticError, ImportError) as error:
        if isinstance(error, ImportError) and not error.name:  # Lightning's own words, of a logger's missing package
            raise UserError(one_line(str(error))) from None
        raise UserError(f"{net} can't be made: {type(error).__name__}: {one_line(str(error))}") from None


def check_network(net: nn.Module, name: str, optimised: bool) -> None:
    """Refuse a module that is no network.

    Args:
        net: The module.
        name: Its class, as the user wrote it.
        optimised: Whether it is to be trained.
    """
    problem = ""
    if type(net).forward is nn.Module.forward or isinstance(net, nn.ModuleList | nn.ModuleDict | nn.ParameterList):
        problem = "computes nothing"
    elif not all(isinstance(value, torch.Tensor) for value in net.state_dict().values()):  # of get_extra_state
        problem = "keeps more in its state_dict than tensors, which are all that a checkpoint may hold"
    elif optimised and not any(parameter.requires_grad for parameter in net.parameters()):
        problem = "has nothing to train"
    if problem:
        raise UserError(
            f"model.net is {name or 'empty'}, which {problem}; a network was expected, as models.lenet.LeNet"
        )


def check_input(net: nn.Module, shape: tuple[int, int, int], num_classes: int, batch_size: int = 2) -> None:
    """Try the network on the shape (C, H, W) of one image, in training in batches of at most this size."""
    name = type(net).__name__
    try:
        output = _output_in_training(net, (min(batch_size, 2), *shape))
        if isinstance(output, torch.Tensor):
            _, total = stages(net, shape)
    except NotImplementedError:
        return  # it needs data: training will show
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError) as error:
        size = "x".join(map(str, shape))
        reason = repr(error) if isinstance(error, KeyError) else one_line(str(error))
        raise UserError(f"{name} can't take images of {size} (channels x height x width): {reason}") from None
    if not isinstance(output, torch.Tensor):
        hint = "; set --model.net.aux_logits false" if hasattr(net, "aux_logits") else ""
        raise UserError(f"{name} gives a {type(output).__name__} in training; one tensor of logits was expected{hint}")
    if total.shape != (num_classes,):
        raise UserError(
            f"{name} gives outputs of shape {total.shape} for one image; {num_classes} logits were expected"
        )


def _output_in_training(net: nn.Module, shape: tuple[int, ...]) -> Any:
    """The network's output for images without data (batch normalisation may need two), in training mode."""
    was_training = net.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False):  # which disables compilation
            return run_without_data(net.train(), torch.empty(shape, device="meta"))
    finally:
        net.train(was_training)


def check_settings(stored: dict[str, Any], wanted: dict[str, Any], *, resume: bool) -> None:
    """Refuse settings that the checkpoint would silently override.

    Args:
        stored: The configuration in the checkpoint.
        wanted: The configuration of this run.
        resume: Whether training continues; otherwise only the network and its classes must be the same.
    """
    scheduled = bool(wanted["model"]["scheduler"])
    for name, (then, now) in _differences(stored, wanted).items():
        if resume and name == "trainer.callbacks":
            then, now = without_off(_own_callbacks(then)), without_off(_own_callbacks(now))
        elif not (is_kept(name, scheduled) if resume else name.startswith(LEARNED)):
            continue
        if then != now:
            raise UserError(
                f"the checkpoint was made with {name}={then}, not {now}; "
                "a checkpoint keeps its settings: leave that setting as it was, or start again without --ckpt_path"
            )


def check_weights(path: str | None, stored: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Args:
        path: The checkpoint, for the message.
        stored: Name and shape of its tensors; empty without a checkpoint.
        model: The LightningModule.
    """
    if not stored:
        return
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in shapes | stored:
        then, own = stored.get(name, "missing"), shapes.get(name, "missing")
        if then != own:
            raise UserError(
                f"{path} holds another network's weights: {name} is {then} there, {own} in "
                f"{type(model.net).__name__}; give the --model that it was trained with"
            )


def _own_callbacks(callbacks: Any) -> list[Any]:
    """The callbacks of this project that recipes name, which change what training computes."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    named = [entry for entry in listed if isinstance(entry, dict)]
    return [entry for entry in named if str(entry.get("class_path")).startswith("callbacks.")]


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key in then.keys() & now.keys():
        if isinstance(then[key], dict) and isinstance(now[key], dict):
            found |= _differences(then[key], now[key], f"{prefix}{key}.")
        elif then[key] != now[key]:
            found[f"{prefix}{key}"] = (then[key], now[key])
    return dict(sorted(found.items()))
