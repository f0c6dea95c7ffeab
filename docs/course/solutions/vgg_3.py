"""A solution of vgg-3: only the training images are shuffled and split; the official test images stay what they are."""

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def split(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> tuple[Part, Part, Part]:
    """Images and labels to train on, to choose by, and for the one final test."""
    order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))
    val, train = order[:300], order[300:]
    held_out = train_images[val], train_labels[val]
    return (train_images[train], train_labels[train]), held_out, (test_images, test_labels)
