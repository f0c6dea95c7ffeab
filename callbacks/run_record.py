"""One JSON per run: what was trained, where, how fast and how well; also fills TensorBoard's HParams tab."""

import hashlib
import platform
import statistics
import time
from collections.abc import Sequence, Sized
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from callbacks.confusion import Confusion
from callbacks.run_folder import RunCheckpoint, RunFolder, RunLogger
from callbacks.speed import Speed
from datamodules import PicturesDataModule
from datamodules.batches import TrainBatches
from errors import Stopped, UserError, one_line, shown
from inspection.stages import stages
from runs.record import commit, machine, pack_right, peak_memory, read, write_json
from runs.settings import leaves

# What TensorBoard's HParams tab shows without a click.
FIRST_HPARAMS = ("recipe", "model.optimizer.lr", "data.batch_size", "max_epochs", "seed")
# What a record holds only when the run is over; removed when it continues.
OF_THE_END = ("test", "fit_seconds", "stopped_after_seconds", "best_val_accuracy", "images_per_second")
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")


class RunRecord(Callback):
    """Writes `record.json` into the run's folder, again after each epoch and after testing.

    Args:
        recipe: Name of the recipe.
        config: The resolved configuration, as nested mappings.
        config_text: The same as YAML, for its hash.
        folder: The run's folder.
        speed: The callback that measures the epochs; it must come before this one.
        confusion: The callback that counts which class is taken for which.
        best: The callback that saves the best checkpoint.
    """

    def __init__(
        self,
        recipe: str,
        config: dict[str, Any],
        config_text: str,
        folder: RunFolder,
        speed: Speed,
        confusion: Confusion,
        best: RunCheckpoint,
    ) -> None:
        self._config = config
        self._speed = speed
        self._confusion = confusion
        self._best_checkpoint = best
        self._start = 0.0
        self._folder = folder
        self._peak_before: int | None = None  # of earlier parts of the run
        self._begun = False  # training has; until then the record may lack the run's earlier epochs
        self.record: dict[str, Any] = {
            "recipe": recipe,
            "config": config,
            "config_sha256": hashlib.sha256(config_text.encode()).hexdigest(),
            "commit": commit(),
            "seed": None if (seed := config.get("seed_everything")) is False else seed,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "epochs": [],
        }

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note machine and model, and tell TensorBoard the hyperparameters."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        device = trainer.strategy.root_device
        self.record |= {
            "machine": machine(device),
            "devices": trainer.world_size,
            "precision": trainer.precision,
            "parameters": sum(parameter.numel() for parameter in pl_module.net.parameters()),  # type: ignore[union-attr, misc]
            "train_images": len(data.train_set),
            "val_images": len(data.val_set) if trainer.enable_validation else 0,
            "batch_size": data.batch_size * trainer.world_size,
            "image_size": data.image_size,
            "max_epochs": trainer.max_epochs,
        }
        if (flops := _flops(pl_module.net, data.input_shape)) is not None:
            self.record["flops"] = flops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._start = time.perf_counter()
        if trainer.is_global_zero and isinstance(trainer.logger, RunLogger):
            # Only names the metrics; their values are the last ones that the logger was given.
            metrics = {"test/accuracy": 0, "test/loss": 0, "val/max_accuracy": 0}
            mine = {key: self.record[key] for key in ("recipe", "seed", "max_epochs")}
            values = _hyperparameters(mine | {key: self._config[key] for key in ("model", "data")})
            summaries = hparams(values, metrics)
            _arrange(summaries[0], FIRST_HPARAMS)
            writer = trainer.logger.experiment.file_writer
            for summary in summaries:
                writer.add_summary(summary)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what an earlier part of the run recorded; only here is the epoch known at which it continues."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        batches = int(trainer.num_training_batches)
        if batches < len(TrainBatches(len(data.train_set), data.batch_size, 0, trainer.world_size)):
            self.record["train_images"] = batches * trainer.world_size * data.batch_size
        self._continue_record(trainer)
        self._begun = True

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note how many images it takes; before a training's first validation its batches may not be known."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            images = trainer.datamodule.val_set  # type: ignore[attr-defined]
            self.record["val_images"] = images_measured(trainer, images, trainer.num_val_batches)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the epoch's line."""
        measured = self._speed.measured(trainer)
        metrics = {name: value.item() for name, value in measured.items() if not name.endswith("_step")}
        self.record["epochs"].append(
            {
                "epoch": trainer.current_epoch + 1,
                **metrics,
                "seconds": self._speed.epoch_seconds,
                "images_per_second": self._speed.images_per_second,
                "elapsed_seconds": time.perf_counter() - self._start,
            }
        )
        if (best := self._best()) is not None and "val/accuracy" in metrics:
            for logger in trainer.loggers:
                logger.log_metrics({"val/max_accuracy": best}, step=trainer.global_step - 1)
        self._write(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Note how long a stopped run took, even one in its first epoch, so that it is found again."""
        if isinstance(exception, Stopped) and self._begun and trainer.state.fn == TrainerFn.FITTING:
            self.record |= {"stopped_after_seconds": time.perf_counter() - self._start} | self._peak(trainer)
            self._write(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the run's totals."""
        if not self.record["epochs"]:  # nothing was left to train
            if "fit_seconds" in (earlier := self._earlier(trainer)):
                self.record = earlier
                return
            self._continue_record(trainer)
        epochs = self.record["epochs"]
        if not epochs:
            return
        self.record |= {
            "fit_seconds": time.perf_counter() - self._start,
            "images_per_second": statistics.median(epoch["images_per_second"] for epoch in epochs),
            **self._peak(trainer),
        }
        if (best := self._best()) is not None:
            self.record["best_val_accuracy"] = best
        self._write(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the test results."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.record["test"] = {
            **evaluated(trainer, "test", self._confusion),
            "images": int(self._confusion.matrix.sum()),  # fewer than there are, with limit_test_batches
            "test_set": len(data.test_set),
            **({"test_pictures": _known_by(data.test_names)} if isinstance(data, PicturesDataModule) else {}),
            "class_accuracy": self._confusion.class_accuracy,
            "right": pack_right(self._confusion.right),
        }
        self._write(trainer)

    def _continue_record(self, trainer: pl.Trainer) -> None:
        """Keep the epochs of a run that is continued in its own folder."""
        if not (earlier := self._earlier(trainer)):
            return
        epochs = [epoch for epoch in earlier["epochs"] if epoch["epoch"] <= trainer.current_epoch]
        # Times continue; what a stopped epoch had taken counts, unless the run continues from before it.
        elapsed = [epochs[-1]["elapsed_seconds"]] if epochs else []
        if len(epochs) == len(earlier["epochs"]):
            elapsed += [earlier[key] for key in ("stopped_after_seconds", "fit_seconds") if key in earlier]
        self._start -= max(elapsed, default=0.0)
        self._peak_before = earlier.get("peak_memory_bytes")
        self.record["epochs"] = epochs
        self.record |= {name: value for name, value in earlier.items() if name not in {*self.record, *OF_THE_END}}
        if test := earlier.get("test"):  # that of the checkpoint that was the best until then
            tested = {"epochs": len(earlier["epochs"]), **test}
            self.record["earlier_tests"] = [*earlier.get("earlier_tests", []), tested]

    def _best(self) -> float | None:
        """The best validation accuracy so far; several in an epoch count where their best was saved."""
        known = [epoch["val/accuracy"] for epoch in self.record["epochs"] if "val/accuracy" in epoch]
        score = self._best_checkpoint.best_model_score
        return max([*known, *([] if score is None else [score.item()])], default=None)

    def _earlier(self, trainer: pl.Trainer) -> dict[str, Any]:
        """The record of a run that is continued in its own folder."""
        path = self._folder.path and self._folder.path / "record.json"
        if not (path and trainer.ckpt_path and path.is_file()):
            return {}
        try:
            return read(path)
        except ValueError as error:
            reason = one_line(str(error))
            raise UserError(f"{shown(path)} is damaged ({reason}); repair it, or remove it to begin anew") from None

    def _peak(self, trainer: pl.Trainer) -> dict[str, int | None]:
        """Peak memory so far, earlier parts of the run included."""
        known = [size for size in (peak_memory(trainer.strategy.root_device), self._peak_before) if size is not None]
        return {"peak_memory_bytes": max(known, default=None)}

    def _write(self, trainer: pl.Trainer) -> None:
        begun = self.record["epochs"] or "stopped_after_seconds" in self.record
        if trainer.is_global_zero and self._folder.path and begun:
            write_json(self._folder.path / "record.json", self.record)


def evaluated(trainer: pl.Trainer, stage: str, confusion: Confusion) -> dict[str, float]:
    """Accuracy and loss of an evaluation; `accuracy_flip` and `loss_flip` with `--model.flip_test`, and the balanced
    accuracy of the user's own pictures, with them.

    Args:
        trainer: The run's Trainer.
        stage: "val" or "test".
        confusion: The callback that counted what was taken for what.
    """
    own = isinstance(trainer.datamodule, PicturesDataModule)  # type: ignore[attr-defined]
    balanced = {"balanced_accuracy": value} if own and (value := confusion.balanced_accuracy) is not None else {}
    metrics = {name.partition("/"): value.item() for name, value in trainer.callback_metrics.items()}
    return {name: value for (of, _, name), value in metrics.items() if of == stage} | balanced


def images_measured(trainer: pl.Trainer, images: Sized, batches: Sequence[int | float]) -> int:
    """How many of the images an evaluation takes; Trainer arguments like `limit_test_batches` leave some out.

    Args:
        trainer: The run's Trainer.
        images: All of them.
        batches: Number of batches of each of the evaluation's loaders on this process; each process has as many.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return min(len(images), int(sum(batches)) * trainer.world_size * data.eval_batch_size)


def _hyperparameters(mapping: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """The hyperparameters as TensorBoard takes them; a class becomes its name, its arguments become settings."""
    found = {}
    for name, value in leaves(mapping).items():
        if name.endswith(".class_path"):
            name, value = name.removesuffix(".class_path"), value.rpartition(".")[2]
        found[name] = value if isinstance(value, str | int | float | bool) else str(value)
    return found


def _arrange(experiment: Any, first: tuple[str, ...]) -> None:
    """Let TensorBoard list these hyperparameters first, and find the metrics where `RunLogger` puts them."""
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first  # it prefers those marked as differing between the runs
    for info in content.experiment.metric_infos:
        stage, _, metric = info.name.tag.partition("/")
        info.display_name = f"{stage} {metric.replace('_', ' ')}"
        info.name.group, info.name.tag = stage, f"curves/{metric}"
    plugin_data.content = content.SerializeToString()


def _known_by(names: list[str]) -> str:
    """A short digest of pictures' names, the same on every system."""
    return hashlib.sha256("\n".join(name.replace("\\", "/") for name in names).encode()).hexdigest()[:8]


def _flops(net: Any, input_shape: tuple[int, int, int]) -> int | None:
    """Floating-point operations of one image's forward pass; None if the network needs data."""
    try:
        return stages(net, input_shape)[1].flops
    except NotImplementedError:
        return None
