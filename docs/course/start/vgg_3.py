"""vgg-3: a test accuracy too good to be true. Find the bug.

测试准确率好得不真实。找出其中的错误。
"""

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def split(
    train_images: Tensor, train_labels: Tensor, test_images: Tensor, test_labels: Tensor
) -> tuple[Part, Part, Part]:
    """Images and labels to train on, to choose by, and for the one final test.

    Args:
        train_images: The official training images, (N, 28, 28) uint8.
        train_labels: Their labels, (N,).
        test_images: The official test images, (M, 28, 28) uint8.
        test_labels: Their labels, (M,).
    """
    images = torch.cat([train_images, test_images])
    labels = torch.cat([train_labels, test_labels])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    val, test, train = order[:300], order[300:800], order[800:]
    return (images[train], labels[train]), (images[val], labels[val]), (images[test], labels[test])
