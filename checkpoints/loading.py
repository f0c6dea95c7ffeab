"""What LitClassifier and the data modules share: loading themselves from checkpoint files, which are not trusted."""

import io
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import lightning
import torch

from checkpoints.reading import read_checkpoint
from checkpoints.trust import NAMEABLE, Trusted
from errors import UserError, one_line

Loaded = TypeVar("Loaded", bound="CheckedLoading")
# LightningCLI makes load_from_checkpoint call this.
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


class CheckedLoading:
    """Comes before Lightning's class among the bases, and gives Lightning only what a file may say."""

    CHECKPOINT_HYPER_PARAMS_KEY: str

    @staticmethod
    def find_data(data_dir: Path) -> Path | None:
        """As `Trusted` wants it."""
        return None

    @classmethod
    def load_from_checkpoint(
        cls: type[Loaded], checkpoint_path: Any, *args: Any, trust_checkpoint: bool = False, **kwargs: Any
    ) -> Loaded:
        """Rebuild the object from a checkpoint file, whose content is not trusted; arguments as for Lightning's.

        With `trust_checkpoint` the file may name classes from outside this project, torch and torchvision. Even then
        nothing is unpickled but tensors and plain values, whatever `weights_only` says. Without it, an optimiser or a
        schedule from elsewhere is left out: using the network does not need it, and training says so.

        Raises:
            UserError: If it is not such a file, is damaged, or names a network from elsewhere.
        """
        path = checkpoint_path
        if not isinstance(path, str | PathLike):
            raise UserError(f"a checkpoint is loaded from a file; give its path, not {type(path).__name__}")
        checkpoint = read_checkpoint(path)
        load = super().load_from_checkpoint  # type: ignore[misc]
        kwargs = kwargs | {"weights_only": True}
        if trust_checkpoint:
            return load(str(Path(path).resolve()), *args, **kwargs)  # an absolute path can't be taken for an address
        settings, left_out = cls._checked(checkpoint, str(path), kwargs)
        kept = {cls.CHECKPOINT_HYPER_PARAMS_KEY: settings, "pytorch-lightning_version": lightning.__version__}
        kept |= {
            name: checkpoint[name]
            for name in ("state_dict", "temperature", "out_of_distribution")
            if name in checkpoint
        }
        file = io.BytesIO()
        torch.save(kept, file)
        file.seek(0)
        try:
            loaded = load(file, *args, **kwargs)
        except Exception as error:  # jsonargparse, networks and PyTorch raise various things
            raise UserError(f"{path} can't be loaded: {one_line(str(error)) or type(error).__name__}") from None
        for part in left_out:
            setattr(loaded, part, _LeftOut(part, str(path)))
        return loaded

    @classmethod
    def _checked(
        cls, checkpoint: dict[str, Any], path: str, given: dict[str, Any]
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The arguments that may be taken from the file, and which of its optimiser and schedule may not."""
        settings = checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {}
        if not isinstance(settings, Mapping):
            raise UserError(f"{path} does not say how it was trained")
        rules = Trusted(path, False, "pass trust_checkpoint=True", checkpoint["state_dict"], cls.find_data)
        own = {name: settings[name] for name in ("_instantiator", "_class_path") if name in settings}
        for value in own.values():
            if value != INSTANTIATOR:
                rules.refuse(value, "_instantiator")
        settings = {name: value for name, value in settings.items() if name not in given.keys() | own.keys()}
        if cls.CHECKPOINT_HYPER_PARAMS_KEY != "hyper_parameters":
            return rules.data(settings) | own, ()
        if "net" not in settings and "net" not in given:
            raise UserError(f"{path} does not say which network it holds; give it: load_from_checkpoint(path, net=...)")
        left_out = tuple(part for part in ("optimizer", "scheduler") if not rules.may_name(part, settings.get(part)))
        used = tuple(part for part in NAMEABLE if part in settings and part not in left_out)
        return rules.model(settings, {}, used) | own, left_out


class _LeftOut:
    """Stands in for an optimiser or a schedule that was not taken from a file."""

    def __init__(self, part: str, path: str) -> None:
        self._message = (
            f"the {part} that {path} names was not loaded, as it is not part of this project or torch; "
            "pass trust_checkpoint=True to load_from_checkpoint if you know where the file comes from"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError(self._message)
