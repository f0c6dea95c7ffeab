"""What fit, validate, test and predict do once network, data and Trainer are built."""

from collections.abc import Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.callbacks import WeightAveraging

from callbacks.run_folder import OUTPUTS, next_folder
from callbacks.run_record import RunRecord, evaluated, images_measured
from datamodules import PicturesDataModule
from errors import RunError, UserError, count, print_warning, shown
from inspection.layer_cam import check_captum
from inspection.table import short_table
from launch.classifier_cli import ClassifierCLI
from launch.lengths import check_length
from launch.summary import by_class, scores, summary
from launch.trainer import validates
from weights.imagenet import start_from_imagenet
from weights.trained import may_know


def run(cli: ClassifierCLI) -> None:
    """Do what the command says; without a subcommand, fit and then test."""
    {"fit": fit, "validate": validate, "test": test, "predict": predict}[cli.command.subcommand](cli)


def fit(cli: ClassifierCLI) -> None:
    """Train; without a subcommand, also test the best checkpoint; print the summary."""
    trainer, model, data, config = cli.trainer, cli.model, cli.datamodule, cli.config
    cli.start.check_processes(trainer.world_size)
    if config.pretrained and not cli.command.ckpt_path:
        started = start_from_imagenet(model.net, config.data.mean, config.data.std)
        if trainer.is_global_zero:
            print(started)
    if cli.command.then_test:
        data.setup("test")
    data.setup("fit")  # before anything is written
    if validates(config) and not len(data.val_set):
        raise UserError("no picture is left to validate on; add some, or set --val_size 0, which keeps the last epoch")
    check_length(trainer, model, data, cli.command.then_test)
    try:
        if trainer.world_size == 1:  # other processes still look for pictures, of which it may be taken for a class
            Path(cli.command.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"runs can't be written to {error.filename}: {error.strerror}; set --log_dir") from None
    if trainer.is_global_zero:
        where = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
        reason = f" ({cli.why_precision})" if cli.why_precision else ""
        print(f"Training {cli.start.recipe} on {where}, precision {trainer.precision}{reason}", flush=True)
        if config.model.compile and trainer.strategy.root_device.type == "cpu":
            print_warning("--compile can make training on a CPU slower; compare the images/s of an epoch without it")
        print(short_table(model.net, data.input_shape), flush=True)

    trainer.fit(model, data, ckpt_path=cli.command.ckpt_path, weights_only=True)

    best = trainer.strategy.broadcast(cli.callbacks.best_checkpoint())
    if cli.command.then_test:
        if best and cli.processes.largest(not best.exists()):  # so that all stop together
            problem = (
                f"trained, not tested: {shown(best)} is not on every machine; test it where it is with python train.py "
                "test --ckpt_path, or give a --log_dir that all machines share"
            )
            raise RunError(problem if trainer.is_global_zero else "")
        if trainer.is_global_zero and (steps := cli.callbacks.best.not_validated(trainer)):
            print_warning(
                f"the run took {count(steps, 'step')} after its last validation: tested is the best of the weights "
                "before; last.ckpt holds the last ones"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback._average_model = None  # or loading would put the plain weights back in place of the averaged
        with cli.callbacks.stop.around_test(trainer):
            trainer.test(model, data, best, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        record = next(callback.record for callback in trainer.callbacks if isinstance(callback, RunRecord))  # type: ignore[attr-defined]
        print(summary(record, trainer, best), flush=True)


def validate(cli: ClassifierCLI) -> None:
    """Measure on the validation images; print one line."""
    cli.datamodule.setup("validate")
    if not len(cli.datamodule.val_set):
        raise UserError(
            "data.val_size=0: the run trained on all images, so none is left to validate on; test measures on others"
        )
    now = cli.datamodule.hparams
    if may_know(dict(now) | cli.start.settings.get("data", {}), now):
        _warn_of_known(cli, "val_size or split_seed is not its run's")
    else:
        _check_pictures(cli, "val")
    cli.trainer.validate(cli.model, cli.datamodule, cli.command.ckpt_path, verbose=False, weights_only=True)
    _print_scores(cli, "validate", "val", cli.datamodule.val_set, cli.trainer.num_val_batches)


def test(cli: ClassifierCLI) -> None:
    """Measure on the test images; print one line."""
    _check_pictures(cli, "test")
    cli.trainer.test(cli.model, cli.datamodule, cli.command.ckpt_path, verbose=False, weights_only=True)
    _print_scores(cli, "test", "test", cli.datamodule.test_set, cli.trainer.num_test_batches)


def predict(cli: ClassifierCLI) -> None:
    """Write the classes of the test images, or of the user's pictures."""
    command, trainer, model, data = cli.command, cli.trainer, cli.model, cli.datamodule
    if command.images:
        from pictures.predict import predict_pictures  # here, not above: only this needs it

        torch.backends.cudnn.allow_tf32 = False  # the same numbers as on a CPU
        wanted = {name: getattr(command, name) for name in ("images", "invert", "output", "sort", "gradcam")}
        wanted |= {"ckpt_path": str(command.ckpt_path), "new_folder": partial(next_folder, OUTPUTS, "predict")}
        predict_pictures(trainer, model, data, data.class_names, **wanted)
        return
    if command.gradcam:
        check_captum()
    trainer.predict(model, data, ckpt_path=command.ckpt_path, return_predictions=False, weights_only=True)
    written = cli.callbacks.predictions
    print(f"Wrote the class probabilities of {count(written.images, 'image')} to {written.path}")
    if command.gradcam and trainer.is_global_zero:
        from pictures.predict import write_mistakes

        mistakes = cli.callbacks.confusion.mistakes
        write_mistakes(trainer, model, data, data.class_names, mistakes, written.path.with_name("mistakes.png"))


def _check_pictures(cli: ClassifierCLI, part: Literal["val", "test"]) -> None:
    """Pictures that are held out of others than the run's may be among those that it was trained on."""
    data, known = cli.datamodule, cli.start.pictures
    if not isinstance(data, PicturesDataModule) or not known:
        return
    data.prepare_data()
    if known != data.state_dict() and data.held_out(part):
        _warn_of_known(cli, "the pictures, or how they are split, are not its run's")


def _warn_of_known(cli: ClassifierCLI, why: str) -> None:
    if cli.trainer.is_global_zero:
        print_warning(f"the network may have been trained on some of these: {why}")


def _print_scores(cli: ClassifierCLI, function: str, stage: str, images: Sized, batches: Sequence[int | float]) -> None:
    if cli.trainer.is_global_zero:
        measured = evaluated(cli.trainer, stage, cli.callbacks.confusion)
        print(f"{function} on {count(images_measured(cli.trainer, images, batches), 'image')}: {scores(measured)}")
        if isinstance(cli.datamodule, PicturesDataModule):
            print(by_class(cli.callbacks.confusion.class_accuracy))
