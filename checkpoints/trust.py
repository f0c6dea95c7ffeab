"""What a file from elsewhere may do: name a network, an optimiser and a schedule of known packages, and nothing else.

Everything that reads a checkpoint (train.py, export, demo, packing, Python) asks here which settings may be used. Only
modules of the packages named below are imported. What a file names there is judged as an object, by its base class and
its module, because a name proves nothing: trusted modules import others, and have functions that run commands.
"""

import importlib
import inspect
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from checkpoints.plain import OF_PICTURES, check_names, of_pictures
from checkpoints.sizes import too_large
from errors import UserError

# What a file may name: packages that are imported to look for it, and its base class.
NAMEABLE: dict[str, tuple[tuple[str, ...], type]] = {
    "net": (("models.", "torch.nn.", "torchvision.models."), nn.Module),
    "optimizer": (("torch.optim.", "optimizers."), Optimizer),
    "scheduler": (("torch.optim.", "lit_modules.schedules."), LRScheduler),
}
PLATEAU = "lightning.pytorch.cli.ReduceLROnPlateau"  # which is torch's, with the metric that it watches
ON_OR_OFF = ("logger", "plugins")  # a word would name a class
# The callbacks that recipes name. Others of this project write files.
CALLBACKS = ("callbacks.distillation.Distillation", "callbacks.ema.EMA", "callbacks.fine_tuning.FreezeFeatures")
# Settings of the Trainer that a run takes over from its checkpoint: what it computes, and with what.
TRAINER = [
    *("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches"),
    *("limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval"),
    *("check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing"),
    *("enable_progress_bar", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    *("deterministic", "benchmark", "inference_mode", "detect_anomaly", "sync_batchnorm", "precision"),
    *("reload_dataloaders_every_n_epochs", "accelerator", "logger", "devices", "strategy", "callbacks", "plugins"),
]
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
# Settings that say how training runs, not what was trained: only training needs them.
EXECUTION = ("compile", "checkpoint_activations")

SIZES = ("stored_size", "image_size", "batch_size", "eval_batch_size", "crop_padding", "num_workers")
LARGEST = 2**20  # of the numbers that say how large something is
PIXELS = 2**30  # of one batch
WORD = re.compile(r"[\w:,+ -]{0,200}", re.ASCII)
# As max_time has it: a dict of numbers, or 00:00:01:00.
TIME = re.compile(r"\{('\w+': [\d.e+-]+(, )?)+\}|\d{1,4}(:\d{1,2}){3}")
NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


class Trusted:
    """What may be used of the settings in one file.

    Args:
        path: The file, for messages.
        trust: Whether the user has vouched for it: then everything may be used.
        how: What the user can do to vouch for it, for messages.
        weights: Its tensors: the network that it names may hold no more numbers.
        find_data: Finds the folder below another one in which a data set lies, whole; None where there is none.
    """

    def __init__(
        self, path: str, trust: bool, how: str, weights: Mapping[str, Any], find_data: Callable[[Path], Path | None]
    ) -> None:
        self.path = path
        self.trust = trust
        self.how = how
        stored = {  # once, however many names it has
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.element_size()
            for tensor in weights.values()
            if isinstance(tensor, Tensor)
        }
        self.numbers = sum(stored.values())
        self.find_data = find_data

    def to_use(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of network and images that testing, predicting and exporting need, from a whole configuration.

        Raises:
            UserError: If the file names a network that it may not name, or a size that makes no sense.
        """
        data = self.data(config["data"])
        model = self.model(config["model"], data, ("net",))
        precision = (config.get("trainer") or {}).get("precision")
        plain = {key: value for key, value in model.items() if key not in (*EXECUTION, "optimizer", "scheduler")}
        data["num_workers"] = 0
        return {**config, "model": plain, "data": data, "trainer": {"precision": self._scalar("precision", precision)}}

    def to_train(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The settings to go on training with, from a whole configuration.

        Raises:
            UserError: If the file names something that it may not name, or a size that makes no sense.
        """
        data = self.data(config["data"])
        model = self.model(config["model"], data, tuple(NAMEABLE))
        return {**config, "model": model, "data": data, "trainer": self._trainer(config.get("trainer") or {})}

    def model(self, settings: Mapping[str, Any], data: Mapping[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
        """Arguments of `LitClassifier`: the `used` ones among network, optimiser and scheduler, and all plain values.

        Args:
            settings: What the file holds.
            data: Arguments of the data module, checked: the network is made for images of its size.
            used: Which of net, optimizer and scheduler are needed.
        """
        if self.trust:
            return dict(settings)
        check_names(settings, self.path)
        for part in used:
            if settings.get(part) is not None or part == "net":
                self._check_named(part, settings.get(part))
        if "net" in used:
            self._check_size(settings["net"], data)
        return {
            key: value if key in NAMEABLE else self._scalar(f"model.{key}", value)
            for key, value in settings.items()
            if key in used or key not in NAMEABLE
        }

    def data(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the data module; the folder only where it holds the images already, for it is never written to.

        Raises:
            UserError: If a size makes no sense.
        """
        if self.trust:
            return dict(settings)
        check_names(settings, self.path)
        own = "class_names" in settings  # of other pictures
        apart = ("data_dir", *(OF_PICTURES if own else ()))
        kept = {key: self._scalar(f"data.{key}", value) for key, value in settings.items() if key not in apart}
        folder = None if own else settings.get("data_dir")
        if own:
            kept |= of_pictures(settings, self.path)
        local = isinstance(folder, str) and "\0" not in folder and not folder.replace("\\", "/").startswith("//")
        if local and (found := self.find_data(Path(str(folder)))):
            kept["data_dir"] = str(found)
        sizes = {name: kept.get(name) for name in SIZES}
        if any(value is not None and type(value) is not int for value in sizes.values()):
            raise UserError(f"{self.path} holds a size of its images or batches that is no whole number; not loaded")
        stored, side, *batches, padding, workers = (value or 0 for value in sizes.values())
        # Of one's own pictures exporting makes a batch of its own.
        if max(*batches, 60 * own) * max(stored, side) ** 2 > PIXELS or padding > max(stored, side, 28):
            raise UserError(f"{self.path} asks for batches of images that no machine can hold; not loaded")
        if workers:
            kept["num_workers"] = min(workers, os.cpu_count() or 1)
        return kept

    def may_name(self, part: str, named: Any) -> bool:
        """Whether an optimiser or a schedule may be taken over; none at all may."""
        try:
            if named is not None:
                self._check_named(part, named)
        except UserError:
            return False
        return True

    def _trainer(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if self.trust:
            return dict(settings)
        kept = {key: settings[key] for key in TRAINER if key in settings}
        for name, value in kept.items():
            if name == "callbacks":
                for callback in value if isinstance(value, list) else [value] if value else []:
                    self._check_callback(callback)
            elif name == "devices":
                given = re.fullmatch(
                    r"auto|-1|\d{1,2}(,\d{1,2})*,?", ",".join(map(str, value if isinstance(value, list) else [value]))
                )
                most = max(os.cpu_count() or 1, torch.accelerator.device_count())
                if not given or (given[0] != "auto" and max(map(int, given[0].strip(",").split(","))) > most):
                    asked = f"asks for the devices {str(value)[:40]}, which this machine does not have"
                    raise UserError(f"{self.path} {asked}; give --devices")
            elif (name == "strategy" and value not in STRATEGIES) or (
                name in ON_OR_OFF and value not in (None, True, False)
            ):
                self.refuse(value, name)
            elif name not in ("max_time", "val_check_interval") or not TIME.fullmatch(str(value)):
                self._scalar(f"trainer.{name}", value)
        return kept

    def _check_callback(self, callback: Any) -> None:
        if not isinstance(callback, dict) or callback.get("class_path") not in CALLBACKS:
            self.refuse(callback, "callback")
        self._check_arguments("callback", callback)

    def _check_named(self, part: str, named: Any) -> None:
        """Refuse what `find` does not find, and arguments that are more than numbers, words and networks."""
        if not isinstance(named, dict) or find(part, named.get("class_path")) is None:
            self.refuse(named, part)
        self._check_arguments(part, named)

    def _check_arguments(self, part: str, named: dict[str, Any]) -> None:
        if named.keys() - {"class_path", "init_args", "dict_kwargs"}:
            self.refuse(named, part)
        for key in ("init_args", "dict_kwargs"):
            self._check_values(part, named.get(key))

    def _check_values(self, part: str, value: Any) -> None:
        if isinstance(value, dict):
            if "class_path" in value:
                if part != "net":  # an optimiser or a schedule is made of numbers
                    self.refuse(value, part)
                self._check_named(part, value)
                return
            for key, inner in value.items():
                if re.match("weights|pretrained", str(key)) and inner:
                    raise UserError(f"{self.path} asks for weights from the network ({key}); {self.how}")
                self._check_values(part, inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                self._check_values(part, inner)
        elif isinstance(value, str):
            if not _is_word(value) and (part != "net" or find(part, value) is None):
                self.refuse(value, part)
        elif isinstance(value, int) and part == "net" and abs(value) > LARGEST:
            raise UserError(f"{self.path} asks for a network with {value} of something; not loaded")
        elif not (value is None or isinstance(value, int | float)):
            self.refuse(value, part)

    def _check_size(self, net: dict[str, Any], data: Mapping[str, Any]) -> None:
        """Refuse a network that holds more than the file does, or makes more of an image than a machine can hold."""
        side, nets = data.get("image_size"), [net]
        arguments = net.get("init_args") or {}
        known = {*inspect.signature(find("net", net["class_path"])).parameters, *arguments}
        if side not in (None, arguments.get("image_size")) and "image_size" in known:  # train.py gives it that
            nets.append({**net, "init_args": {**arguments, "image_size": side}})
        for one in nets:
            if problem := too_large(one, self.numbers, (data.get("channels") or 1, side or 28, side or 28)):
                raise UserError(f"{self.path} {problem}; {self.how} if you know where the file comes from")

    def _scalar(self, name: str, value: Any) -> Any:
        """The value, if no reading of it imports or opens anything."""
        if not (value is None or isinstance(value, int | float) or (isinstance(value, str) and _is_word(value))):
            self.refuse(value, name)
        return value

    def refuse(self, named: Any, part: str) -> None:
        """Report that the file may not name this."""
        shown = str(named.get("class_path") if isinstance(named, dict) and "class_path" in named else named)[:80]
        raise UserError(
            f"{self.path} names the class {shown}, which this project, torch and torchvision do not have for {part}; "
            f"{self.how} if you know where the file comes from"
        )


def needs_trust(config: Mapping[str, Any]) -> bool:
    """Whether a run's own checkpoint can be used with the user's word alone, as its network is the user's own."""
    return not Trusted("", False, "", {}, lambda folder: None).may_name("net", config["model"]["net"])


def find(part: str, name: Any) -> Any:
    """What files may name as net, optimizer or scheduler: a class, or a function of torchvision's that makes one.

    Returns:
        None for every other name.
    """
    packages, base = NAMEABLE[part]
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    if not name.startswith(packages) and (part, name) != ("scheduler", PLATEAU):
        return None
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError):
        return None
    if part == "net" and name.startswith("torchvision."):
        import torchvision  # here, not above: only this needs its networks

        if found in map(torchvision.models.get_model_builder, torchvision.models.list_models(torchvision.models)):
            return found
    if not isinstance(found, type) or not issubclass(found, base):
        return None
    return found if f"{found.__module__}.".startswith(packages) or name == PLATEAU else None


def _is_word(text: str) -> bool:
    """Whether the parser takes a text only as itself: no class's name, no number (32-true is none), no file."""
    number = re.match(r"[\s+-]*\d(?!\d-(true|mixed)$)", text)
    return WORD.fullmatch(text) is not None and not number and not Path(text).is_file()
