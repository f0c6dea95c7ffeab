"""How well the "not sure" score of the networks in weights/ tells garments from pictures of other things.

The area under the ROC curve: how often such a picture has the higher score of the two, compared with one of the 10,000
test images. The others are noise, and the pictures of each --folder, read and cut out as `train.py predict` reads them.

Command: python -m benchmarks.not_sure --folder path/to/digits --folder path/to/hats --data_dir DIR
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from benchmarks.harness.side_by_side import Parser, print_table, write_record
from datamodules import CLASS_NAMES, FashionMNISTDataModule
from errors import run_program
from lit_modules import LitClassifier
from pictures.predict import as_batch, read_pictures
from weights import WEIGHTS
from weights.trained import load_trained, logits_of

NOISE = 2000  # images


def main() -> None:
    """Measure each network against each kind of picture."""
    parser = Parser(__doc__, budget=300)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="pictures of one kind of thing")
    options = parser.parse_args()
    noise = torch.randint(256, (NOISE, 1, 28, 28), generator=torch.Generator().manual_seed(0)).byte()
    results: list[dict[str, Any]] = []
    for path in sorted(WEIGHTS.glob("*.ckpt")):
        classifier, data, _ = load_trained(path)
        if not classifier.out_of_distribution or tuple(data.class_names) != CLASS_NAMES:
            continue
        data.data_dir = Path(options.data_dir)
        data.setup("test")
        garments = _scores(classifier, data, data.test_set.images)
        pictures = {folder.name: read_pictures([folder], "auto", data).images for folder in options.folder}
        for name, images in {"noise": noise, **{name: as_batch(read) for name, read in pictures.items()}}.items():
            scores = _scores(classifier, data, images)
            is_other = torch.cat([torch.zeros(len(garments)), torch.ones(len(scores))]).long()
            one = {"auroc": binary_auroc(torch.cat([garments, scores]), is_other).item()}
            one |= {"not_sure_of": _share(scores), "not_sure_of_garments": _share(garments)}
            results.append({"weights": path.stem, "against": name, "images": len(scores), **one})
    rows = [[f"{value:.3f}" if isinstance(value, float) else value for value in one.values()] for one in results]
    print_table("weights | against | pictures | AUROC | not sure of | of garments", rows)
    write_record("not_sure", options, results)


def _scores(classifier: LitClassifier, data: FashionMNISTDataModule, images: Tensor) -> Tensor:
    """Images (N, 1, 28, 28) uint8 to scores (N,)."""
    fitted: Any = classifier.out_of_distribution
    return fitted.score(logits_of(classifier, data, images))


def _share(scores: Tensor) -> float:
    return (scores > 1).float().mean().item()


if __name__ == "__main__":
    sys.exit(run_program("benchmarks.not_sure", main))
