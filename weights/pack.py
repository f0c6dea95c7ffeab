"""A run's checkpoint as a small file of this folder: weights in half precision, without what training needs.

The file is tested before it is kept, and `weights.json` records its score, its origin and its SHA-256, which
`read_checkpoint` checks it against. A small file may be packed again, which adds the score of strange images if it was
made by a version that had none.

Command: python -m weights.pack logs/lenet/version_0/checkpoints/best.ckpt
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from checkpoints.reading import LISTING, listed
from datamodules import FashionMNISTDataModule
from errors import OneLineParser, RunError, UserError, run_program, written_aside
from lit_modules import LitClassifier
from lit_modules.execution.out_of_distribution import OutOfDistribution
from runs.record import read, write_json
from weights import WEIGHTS
from weights.trained import OWN_CLASS, load_trained, logits_of

# How much rounding may change the accuracy, as a share of the test images; at least one image.
TOLERANCE = 0.0005
MIXED_TOLERANCE = 0.002  # if the record was not measured in float32, as the small file is
# What loads, tests and describes a network. The rest serves to continue training, and holds paths of the machine.
KEPT = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hparams_name",
    "hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hyper_parameters",
    "recipe",
    "temperature",
    "out_of_distribution",
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m weights.pack", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of a finished run, beside its record.json")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="file to write (default: weights/RECIPE.ckpt, / in names as -; a small file itself)",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="the run's record (default: ../record.json of the checkpoint)"
    )
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), metavar="DIR", help="folder of the data set (default: data)"
    )
    return parser


def pack(ckpt_path: Path, output: Path | None, record_path: Path | None, data_dir: Path) -> str:
    """Write the small file and its entry in `weights.json` beside it.

    Args:
        ckpt_path: A checkpoint of a finished run.
        output: The file to write; None names it after the recipe. Another folder gets a `weights.json` of its own.
        record_path: The run's `record.json`; None looks for it where a run leaves it, or in `weights.json`.
        data_dir: Folder of the data set.

    Returns:
        One line that says what was written.

    Raises:
        UserError: If checkpoint, record or data set can't be used.
        RunError: If the small file's score differs from the record's; nothing is written then.
    """
    known = listed(ckpt_path) if record_path is None else {}
    record = (
        _listed_record(known) if known else _read_record(record_path or ckpt_path.resolve().parents[1] / "record.json")
    )
    classifier, data, checkpoint = load_trained(ckpt_path, how=OWN_CLASS)
    if type(data) is not FashionMNISTDataModule:
        raise UserError(f"{ckpt_path} was trained on other data; weights/ holds networks for Fashion-MNIST alone")
    recipe = str(checkpoint.get("recipe") or "unnamed")
    if recipe != record["recipe"]:
        raise UserError(f"the record is of a run of {record['recipe']}, the checkpoint of {recipe}; give --record FILE")
    output = output or (ckpt_path if known else WEIGHTS / f"{recipe.replace('/', '-')}.ckpt")
    listed(output)  # refuses a damaged listing before anything is measured
    output.parent.mkdir(parents=True, exist_ok=True)
    data.data_dir = data_dir
    if not checkpoint.get("out_of_distribution"):
        checkpoint["out_of_distribution"] = _fit_out_of_distribution(classifier, data)
    with written_aside(output) as partial:  # not listed, so that it can be loaded before it is
        torch.save(_small(checkpoint), partial)
        epoch = checkpoint.get("epoch", 0) + 1
        del checkpoint  # Windows replaces no file that is mapped, and `output` may be the one it was read from
        classifier, data = load_trained(partial)[:2]
        data.data_dir = data_dir
        scores, images = _measure(classifier, data)
        test = record.get("test") or {}  # a run that was stopped has none
        expected, given = test.get("accuracy"), scores["test_accuracy"]
        assert given is not None
        if images != test.get("images", images):
            raise UserError(f"{data_dir} holds {images:,} test images; the record is of {test['images']:,}")
        tolerance = TOLERANCE if record["precision"] == "32-true" else MIXED_TOLERANCE
        if expected is not None and not abs(given - expected) * images < max(1, tolerance * images) + 0.5:
            raise RunError(
                f"in half precision {ckpt_path} scores {given:.4f} on the test images, its record says {expected:.4f}; "
                "nothing was written"
            )
        entry = {
            "recipe": recipe,
            "seed": record.get("seed"),
            "epoch": epoch,
            "epochs": record.get("max_epochs"),
            **scores,
            "bytes": partial.stat().st_size,
            "sha256": hashlib.sha256(partial.read_bytes()).hexdigest(),
            "record": {
                "commit": record.get("commit"),
                "config_sha256": record.get("config_sha256"),
                "precision": record["precision"],
                "val_accuracy": record.get("best_val_accuracy"),
                "test_accuracy": expected,
            },
        }
    _list(output, entry)
    said = "the run was stopped before its test" if expected is None else f"{expected:.4f} in the record"
    return f"Wrote {output} ({entry['bytes'] / 1e6:.2f} MB): test accuracy {given:.4f}, {said}"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read(path)
    except ValueError as error:
        raise UserError(f"{path} is not the record of a run ({error}); give --record FILE") from None


def _listed_record(entry: dict[str, Any]) -> dict[str, Any]:
    """What `weights.json` keeps of a run's record."""
    try:
        kept = entry["record"]
        test = {"accuracy": kept["test_accuracy"]}
        return {"recipe": entry["recipe"], "seed": entry["seed"], "test": test, **kept} | {
            "best_val_accuracy": kept["val_accuracy"]
        }
    except (KeyError, TypeError):
        raise UserError("weights.json holds no record of that file; give --record FILE") from None


def _fit_out_of_distribution(classifier: LitClassifier, data: FashionMNISTDataModule) -> dict[str, Any] | None:
    """As at the end of a training epoch; see callbacks/out_of_distribution.py."""
    data.setup("validate")
    fitted = OutOfDistribution.fit(logits_of(classifier, data, data.val_set.images))
    return fitted and fitted._asdict()


def _small(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint without what only training needs.

    Filters and matrices become float16. Vectors (biases, batch norm's parameters and statistics) stay as they are: they
    are a hundredth of the size, and a variance may lie outside float16's range.
    """
    config = yaml.safe_load(checkpoint["config"])
    config |= {"log_dir": "logs", "ckpt_path": None}
    config["data"]["data_dir"] = "data"
    small = {key: checkpoint[key] for key in KEPT if key in checkpoint}
    small["config"] = yaml.safe_dump(config, sort_keys=False)
    small["datamodule_hyper_parameters"] = {**checkpoint.get("datamodule_hyper_parameters", {}), "data_dir": "data"}
    # Copies, because a view would be saved with everything that it is a view of.
    small["state_dict"] = {
        name: tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor.clone()
        for name, tensor in checkpoint["state_dict"].items()
    }
    return small


def _measure(classifier: LitClassifier, data: FashionMNISTDataModule) -> tuple[dict[str, Any], int]:
    """Accuracy on validation and test images, on the latter also by class, in float32; and the number of the latter."""
    data.setup("validate")
    data.setup("test")
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    val, test = (correct(classifier, data, part.images, part.labels) for part in (data.val_set, data.test_set))
    classes = {name: share(test[data.test_set.labels == label]) for label, name in enumerate(data.class_names)}
    return {"val_accuracy": share(val), "test_accuracy": share(test), "class_accuracy": classes}, len(test)


def correct(
    classifier: LitClassifier, data: FashionMNISTDataModule, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Which of the uint8 images (N, 1, 28, 28) get their label (N,) as prediction: (N,) bool."""
    return logits_of(classifier, data, images).argmax(dim=1) == labels


def share(found: torch.Tensor) -> float | None:
    """The share of True in (N,) bool; None without any."""
    return int(found.sum()) / len(found) if len(found) else None


def _list(path: Path, entry: dict[str, Any]) -> None:
    listing = path.with_name(LISTING)
    entries = json.loads(listing.read_text(encoding="utf-8")) if listing.exists() else {}
    entries[path.name] = entries.get(path.name, {}) | entry  # an origin that was written by hand stays
    write_json(listing, dict(sorted(entries.items())))


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit code: 0, 1 if the scores differ, 2 for a mistake in the command."""
    return run_program("weights.pack", lambda: _run(arguments))


def _run(arguments: list[str]) -> None:
    options: Any = parser().parse_args(arguments)
    print(pack(options.checkpoint, options.output, options.record, options.data_dir))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
