"""`--batch_size auto` and `--lr auto`: settings found by trial, the same on all processes, before the run is built."""

import json
import os
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from callbacks.lr_curve import Curve
from errors import UserError, one_line
from launch.checks import check_input
from launch.learning_rate import HIGHEST, LOWEST, STEPS, find_learning_rate, from_first_process
from launch.memory import largest_batch_size
from weights.imagenet import start_from_imagenet

LARGEST_BATCH = 8192  # larger ones leave too few steps in an epoch
FOUND = "CLASSIC_CNNS_FOUND"  # where the first process leaves what it found by trial for those that it starts


class Trials:
    """Trials on networks and data of their own.

    Args:
        parser: Builds them.
        batch_size: Find the batch size.
        lr: Find the learning rate.
    """

    def __init__(self, parser: Any, batch_size: bool, lr: bool) -> None:
        self.curve: Curve | None = None
        self._parser = parser
        self._batch_size, self._lr = batch_size, lr

    def settings(self, config: Namespace) -> dict[str, float]:
        """What was found, by dotted name."""
        if os.environ.get("LOCAL_RANK", "0") == "0" or FOUND not in os.environ:
            found = from_first_process(lambda: self._find(config.clone()), self._bare_trainer(config))
            os.environ[FOUND] = json.dumps(found)
        return json.loads(os.environ[FOUND])

    def _find(self, config: Namespace) -> dict[str, float]:
        """The batch size first: the learning rate depends on it."""
        found: dict[str, float] = {}
        if self._batch_size:
            config.data.batch_size = found["data.batch_size"] = self._find_batch_size(config)
        if self._lr:
            found["model.optimizer.init_args.lr"] = self._find_lr(config)
        return found

    def _bare_trainer(self, config: Namespace) -> Trainer:
        """Knows the run's processes, and nothing else of it."""
        settings = {name: config.trainer[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
        if not isinstance(settings["strategy"], str):
            settings["strategy"] = self._throwaway(config).trainer.strategy
        try:
            return Trainer(**settings, logger=False, enable_checkpointing=False, enable_model_summary=False)
        except (TypeError, ImportError) as error:
            raise UserError(one_line(str(error))) from None

    def _throwaway(self, config: Namespace) -> Namespace:
        """A network and data for a trial, so that the run's own are initialised as without one."""
        try:
            with torch.random.fork_rng():
                own = self._parser.instantiate_classes(config)
        except ValueError as error:
            raise UserError(one_line(str(error))) from None
        check_input(own.model.net, own.data.input_shape, own.model.hparams["num_classes"])
        return own

    def _find_batch_size(self, config: Namespace) -> int:
        on_gpu = torch.cuda.is_available() and config.trainer.accelerator in ("auto", "gpu", "cuda")
        dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(config.trainer.precision))
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        model = self._throwaway(config).model
        device = torch.device("cuda" if on_gpu else "cpu")
        with torch.random.fork_rng():
            size = largest_batch_size(model.net, model.optimizer, shape, device, dtype, LARGEST_BATCH)
        print(f"Batch size {size}: the largest power of two that fits, up to {LARGEST_BATCH}", flush=True)
        return size

    def _find_lr(self, config: Namespace) -> float:
        names = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        settings = {name: config.trainer[name] for name in names}
        # One process accumulates the batches that all would have.
        trainer = self._bare_trainer(config)
        accumulated = config.trainer.accumulate_grad_batches * trainer.world_size
        own = self._throwaway(config)
        if config.pretrained:
            start_from_imagenet(own.model.net, config.data.mean, config.data.std)
        print(f"Trying {STEPS} learning rates from {LOWEST:g} to {HIGHEST:g}", flush=True)
        self.curve = find_learning_rate(own.model, own.data, trainer.strategy.root_device, accumulated, **settings)
        rate = self.curve.learning_rate
        print(f"Learning rate {rate:g}: a tenth of that with the lowest loss", flush=True)
        return rate
