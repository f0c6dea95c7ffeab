"""Loss and accuracy of a whole set of images, exact whatever the batches."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

# Batches that only fill up a process's share of an evaluation set carry this label; no metric counts them.
IGNORED_LABEL = -100


class MeanLoss(Metric):
    """Mean loss of all images, over all batches and processes.

    (torchmetrics' MeanMetric ignores the weights if its NaN check, which waits for the device, is off; as of 1.9.)
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add the summed loss of `count` images; both may be vectors, of several batches."""
        self.total += total.to(self.total.dtype).sum()  # first, so that it makes no difference what is added at once
        self.count += count.sum()

    def compute(self) -> Tensor:
        """The mean; NaN where nothing was counted."""
        return self.total / self.count


class StageMetrics(MetricCollection):
    """Loss and accuracy of a stage ("val", "test_flip"), logged under its name (val/loss, test/loss_flip)."""

    def __init__(self, stage: str, num_classes: int) -> None:
        accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED_LABEL, validate_args=False)
        name, _, variant = stage.partition("_")
        metrics: dict[str, Metric | MetricCollection] = {"loss": MeanLoss(), "accuracy": accuracy}
        super().__init__(metrics, prefix=f"{name}/", postfix=variant and f"_{variant}", compute_groups=False)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (N, num_classes) and labels (N,)."""
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED_LABEL)
        self["loss"].update(loss, (labels != IGNORED_LABEL).sum())
        self["accuracy"].update(logits, labels)

    def add_trained(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Count training batches (mean loss, logits, labels) at once; returns the mean of their losses."""
        losses, logits, labels = zip(*batches, strict=True)
        counts = torch.tensor([len(batch) for batch in labels], dtype=torch.float32, device=losses[0].device)
        self["loss"].update(torch.stack(losses) * counts, counts)
        self["accuracy"].update(torch.cat(logits).float(), torch.cat(labels))
        return torch.stack(losses).mean()
