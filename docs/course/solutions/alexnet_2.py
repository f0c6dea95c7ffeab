"""A solution of alexnet-2: mean and deviation are the training images', whatever else is in the batch."""

from torch import Tensor


def prepare(images: Tensor, train_images: Tensor) -> Tensor:
    """Images (N, 28, 28) uint8, centred and scaled by the statistics of the training images, (N, 1, 28, 28) float32."""
    known = train_images.float() / 255
    return (images[:, None].float() / 255 - known.mean()) / known.std()
