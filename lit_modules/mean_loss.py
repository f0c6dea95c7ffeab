"""The mean loss of an evaluation, exact whatever the batches."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Sum of the losses of all images over their number, over all batches and processes.

    (torchmetrics' MeanMetric would do, but with its NaN check off, which waits for the device at each update, it
    ignores the weights, as of 1.9.)
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
        self.total += total.sum()
        self.count += count.sum()

    def compute(self) -> Tensor:
        """The mean; NaN where nothing was counted."""
        return self.total / self.count
