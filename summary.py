"""What a run prints when it is over: results, where its files lie, and the next command to type."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


def summary(record: dict[str, Any], trainer: Trainer, checkpoint: str) -> str:
    """The closing lines.

    Args:
        record: What `RunRecord` wrote.
        trainer: The run's Trainer.
        checkpoint: Path of the best checkpoint; empty where nothing was saved.
    """
    lines = [""]
    if test := record.get("test"):
        lines.append(f"Test on {test['images']:,} images: accuracy {test['accuracy']:.4f}, loss {test['loss']:.4f}")
    if "fit_seconds" in record:
        best = f"; best validation accuracy {record['best_val_accuracy']:.4f}" if "best_val_accuracy" in record else ""
        lines.append(
            f"Training: {len(record['epochs'])} epochs in {record['fit_seconds']:.1f} s, "
            f"{record['images_per_second']:,.0f} images/s{best}"
        )
    if checkpoint:
        lines.append(f"Checkpoint: {shown(checkpoint)}")
    if isinstance(trainer.logger, TensorBoardLogger):
        lines.append(f"Logs: {shown(trainer.logger.log_dir)}")
        lines.append(f"Next: tensorboard --logdir {shown(trainer.logger.root_dir)}")
    if checkpoint:
        lines.append(f"      python train.py predict --ckpt_path {shown(checkpoint)}")
    return "\n".join(lines)


def shown(path: str | Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
