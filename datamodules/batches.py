"""Which images make a batch, on which process, and how a batch is fetched: whole, by one indexing operation."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

# The label that LitClassifier's metrics leave out (PyTorch's own default for ignored targets).
IGNORED_LABEL = -100


class ImageTensors(Dataset):
    """Images (N, H, W) or (N, C, H, W) uint8 and labels (N,) int64; a batch is one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor, targets: Tensor | None = None) -> None:
        self.images = images[:, None] if images.dim() == 3 else images
        self.labels = labels
        self.targets = labels if targets is None else targets  # what batches hold; (N, classes) from a teacher

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | Tensor) -> tuple[Tensor, Tensor]:
        return self.__getitems__(index) if isinstance(index, Tensor) else (self.images[index], self.targets[index])

    def __getitems__(self, indices: Tensor | list[int]) -> Any:
        """The batch of images (N, C, H, W) and labels; an empty batch becomes one blank image that is not counted."""
        if isinstance(indices, list):
            return [self[int(index)] for index in indices]  # for a `DataLoader` of the user's own, also of a `Subset`
        if len(indices) == 0:
            return torch.zeros_like(self.images[:1]), torch.full_like(self.labels[:1], IGNORED_LABEL)
        indices = indices.to(self.labels.device, non_blocking=True)
        # Several times as fast as images[indices] on the CPU.
        return self.images.index_select(0, indices), self.targets.index_select(0, indices)

    def to(self, device: torch.device) -> "ImageTensors":
        """The same images and labels in the device's memory."""
        return ImageTensors(*(part.to(device) for part in (self.images, self.labels, self.targets)))


class _DealtOut(DistributedSampler, SequentialSampler):
    """Distributes batches to the processes itself. It has both bases so that Lightning, also in a user's own Trainer,
    leaves it alone: other samplers are replaced under several processes, and for `overfit_batches`."""

    def __init__(self, count: int, rank: int, world_size: int) -> None:
        super().__init__(range(count), world_size, rank)  # type: ignore[arg-type]


class TrainBatches(_DealtOut):
    """Indices of one process's training batches, in an order that depends only on seed and epoch.

    Each pass begins where `position` says that training is (epoch, batch), so a continued run sees the rest of its
    epoch and no image twice. (Lightning's `set_epoch` comes too late for workers, which fetch ahead.)

    A global batch is `batch_size * world_size` images long; process r takes every world_size-th of them from r on, so
    all processes make the same number of steps and each image is seen once per epoch. A rest of less than two images
    for each process, too few for batch normalisation, joins the batch before. Any image stands in where there is none.
    """

    weights: Tensor | None = None  # (count,): an epoch's images are drawn with replacement, in proportion to these

    def __init__(
        self,
        count: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        super().__init__(count, rank, world_size)
        self.count, self.batch_size, self.position = count, batch_size, position

    def __len__(self) -> int:
        least = 2 * self.num_replicas if self.batch_size > 1 else 1
        return max(1, -(-(self.count + 1 - least) // (self.batch_size * self.num_replicas)))

    def __iter__(self) -> Iterator[Any]:
        run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where seed_everything leaves it
        epoch, done = self.position()
        generator = torch.Generator().manual_seed(run_seed * 1_000_003 + epoch)
        order = torch.randperm(self.count, generator=generator)
        if self.weights is not None:
            order = torch.multinomial(self.weights, self.count, replacement=True, generator=generator)
        batches = list(order.split(self.batch_size * self.num_replicas))
        batches[len(self) - 1 :] = [torch.cat(batches[len(self) - 1 :])]
        for batch in batches[done:]:
            yield batch[self.rank :: self.num_replicas] if len(batch) > self.rank else batch[:1]


class EvalBatches(_DealtOut):
    """Indices of one process's evaluation batches: the batches of a single process, distributed in turn.

    Nothing is padded with duplicates, which would count twice. All processes make the same number of steps, so a
    process that would have none left gets an empty batch.
    """

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(count, rank, world_size)
        self.batches = torch.arange(count).split(batch_size) if count else ()

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        for turn in range(0, len(self.batches), self.num_replicas):
            mine = turn + self.rank
            yield self.batches[mine] if mine < len(self.batches) else torch.empty(0, dtype=torch.long)
