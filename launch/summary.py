"""What a run prints when it is over: results, where its files are, and the next command to type."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from checkpoints.trust import needs_trust
from errors import count, shown, typed
from runs.settings import of_own_pictures

SHOWN_CLASSES = 12


def summary(record: dict[str, Any], trainer: Trainer, checkpoint: Path | None) -> str:
    """The closing lines.

    Args:
        record: What `RunRecord` wrote.
        trainer: The run's Trainer.
        checkpoint: The best checkpoint; None if nothing was saved.
    """
    lines = [""]
    if test := record.get("test"):
        lines.append(f"Test on {count(test['images'], 'image')}: {scores(test)}")
        if "class_names" in record["config"]["data"]:  # not Fashion-MNIST's
            lines.append(by_class(test["class_accuracy"]))
    if "fit_seconds" in record:
        best = f"; best validation accuracy {record['best_val_accuracy']:.4f}" if "best_val_accuracy" in record else ""
        lines.append(
            f"Training: {count(len(record['epochs']), 'epoch')} in {record['fit_seconds']:.1f} s, "
            f"{record['images_per_second']:,.0f} images/s{best}"
        )
    if checkpoint:
        lines.append(f"Checkpoint: {shown(checkpoint)}")
    if isinstance(trainer.logger, TensorBoardLogger):
        lines.append(f"Logs: {shown(trainer.logger.log_dir)}")
        lines.append(f"Next: {typed(['tensorboard', '--logdir', shown(trainer.logger.root_dir)])}")
    if checkpoint:
        of_own = of_own_pictures(record["config"]["data"])
        if needs_trust(record["config"]):
            of_own.append("--trust_checkpoint")  # this run's own
        lines.append(f"      {typed(['python', 'train.py', 'predict', '--ckpt_path', shown(checkpoint), *of_own])}")
    return "\n".join(lines)


def by_class(accuracies: Mapping[str, float]) -> str:
    """Each class's accuracy, the lowest first; of many classes, the lowest alone."""
    lowest = sorted(accuracies.items(), key=lambda item: item[1])[:SHOWN_CLASSES]
    what = "By class" if len(lowest) == len(accuracies) else f"Lowest of {len(accuracies)} classes"
    return f"{what}: {', '.join(f'{name} {accuracy:.3f}' for name, accuracy in lowest)}"


def scores(measured: Mapping[str, Any]) -> str:
    """Accuracy and loss in words; with those of `--model.flip_test`, if they were measured.

    Args:
        measured: Values under the names `accuracy`, `loss`, with unequal classes `balanced_accuracy`, with
            flip-averaging `accuracy_flip` and `loss_flip`.
    """
    text = f"accuracy {measured['accuracy']:.4f}, loss {measured['loss']:.4f}"
    if "balanced_accuracy" in measured:
        text += f"; balanced accuracy {measured['balanced_accuracy']:.4f}"
    if "accuracy_flip" in measured:
        flipped = f"accuracy {measured['accuracy_flip']:.4f}, loss {measured['loss_flip']:.4f}"
        text += f"; averaged with the mirror images: {flipped}"
    return text
