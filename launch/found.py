"""`--batch_size auto` and `--lr auto`: settings found by trial, the same on all processes, before the run is built."""

import json
import os
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from callbacks.lr_curve import Curve
from errors import UserError, is_first_process, one_line
from launch.checks import check_input, check_network, explained
from launch.learning_rate import HIGHEST, LOWEST, STEPS, find_learning_rate, from_first_process
from launch.lightning_flags import try_optimizer, unfuse
from launch.memory import largest_batch_size
from weights.imagenet import start_from_imagenet

STEPS_AN_EPOCH = 100  # what fits in memory need not train well: fewer steps learn less in the same epochs
AUTOCAST = dict.fromkeys(("bf16", "bf16-mixed"), torch.bfloat16) | dict.fromkeys(("16", "16-mixed"), torch.float16)
WEIGHTS = {"64": torch.float64, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
OWN_RATE = ("LBFGS", "Rprop")  # what they learned at one rate decides their steps at the next
FOUND = "CLASSIC_CNNS_FOUND"  # where the first process leaves what it found for the processes that it starts


class Trials:
    """Trials on separate networks and data.

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
        if is_first_process() or FOUND not in os.environ:
            found = from_first_process(lambda: self._find(config.clone()), self._bare_trainer(config))
            os.environ[FOUND] = json.dumps(found)
        return json.loads(os.environ[FOUND])

    def _find(self, config: Namespace) -> dict[str, float]:
        """The batch size first: the learning rate depends on it."""
        optimizer = getattr(config.model.optimizer, "class_path", "").rpartition(".")[2]
        if self._lr and not optimizer:  # a function that makes one
            raise UserError("--lr auto needs a class, whose lr it sets, in model.optimizer; give it, or leave --lr out")
        if self._lr and optimizer in OWN_RATE:
            raise UserError(f"--lr auto can't find a rate for {optimizer}, whose steps follow those before; give --lr")
        found: dict[str, float] = {}
        if self._batch_size:
            config.data.batch_size = found["data.batch_size"] = self._find_batch_size(config)
        if self._lr:
            found["model.optimizer.init_args.lr"] = self._find_lr(config)
        return found

    def _bare_trainer(self, config: Namespace) -> Trainer:
        """Knows the run's processes and nothing else about the run."""
        settings = {name: config.trainer[name] for name in ("accelerator", "devices", "num_nodes", "strategy")}
        if not isinstance(settings["strategy"], str):
            settings["strategy"] = self._throwaway(config).trainer.strategy
        try:
            return Trainer(**settings, logger=False, enable_checkpointing=False, enable_model_summary=False)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(one_line(str(error))) from None

    def _throwaway(self, config: Namespace) -> Namespace:
        """A network and data for a trial, so that the run's own are initialised as if there had been none."""
        net = config.model.net.class_path
        with torch.random.fork_rng(devices=[]), explained(net):
            own = self._parser.instantiate_classes(config)
        check_network(own.model.net, net, optimised=True)
        check_input(own.model.net, own.data.input_shape, own.model.hparams["num_classes"])
        return own

    def _find_batch_size(self, config: Namespace) -> int:
        trainer = self._bare_trainer(config)
        device = trainer.strategy.root_device
        device = device if device.type == "cuda" else torch.device("cpu")
        dtype = AUTOCAST.get(str(config.trainer.precision))
        shape = (config.data.channels, config.data.image_size, config.data.image_size)
        own, given = self._throwaway(config), config.data.batch_size
        try_optimizer(own.model, config.model, device)
        own.data.prepare_data()
        own.data.setup("fit")
        each = len(own.data.train_set) // (STEPS_AN_EPOCH * trainer.world_size * config.trainer.accumulate_grad_batches)
        most = 1 << max(each, given, 1).bit_length() - 1  # the recipe's own is never too large
        with torch.random.fork_rng(devices=[]):
            net = own.model.net.to(WEIGHTS.get(str(config.trainer.precision), torch.float32))
            own.model.scheduler = None  # the optimiser alone is made
            size = largest_batch_size(
                net, own.model.configure_optimizers, shape, device, dtype, most, trainer.num_devices
            )
        steps = f"leaves {STEPS_AN_EPOCH} steps an epoch" if each >= given else f"is not above the recipe's {given}"
        print(f"Batch size {size}: the largest power of two that {'fits' if size < most else steps}", flush=True)
        if size != given and not self._lr:
            print(
                f"The learning rate is still the one for batches of {given}; --lr auto finds one for {size}", flush=True
            )
        return size

    def _find_lr(self, config: Namespace) -> float:
        names = ("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
        settings = {name: config.trainer[name] for name in names}
        # One process accumulates the batches that all would have.
        trainer = self._bare_trainer(config)
        accumulated = config.trainer.accumulate_grad_batches * trainer.world_size
        own = self._throwaway(config)
        optimizer = try_optimizer(own.model, config.model, trainer.strategy.root_device)
        if settings["gradient_clip_val"] and str(settings["precision"]) in AUTOCAST:
            unfuse(own.model, optimizer)
        if config.pretrained:
            start_from_imagenet(own.model.net, config.data.mean, config.data.std)
        print(f"Trying {STEPS} learning rates from {LOWEST:g} to {HIGHEST:g}", flush=True)
        self.curve = find_learning_rate(own.model, own.data, trainer.strategy.root_device, accumulated, **settings)
        rate = self.curve.learning_rate
        print(f"Learning rate {rate:g}: a tenth of that with the lowest loss", flush=True)
        return rate
