"""alexnet-2: validation looked fine, but a single photograph is classified worse than the same one in a batch.

Find the bug. / 验证集上一切正常，但同一张照片单独识别时比放在一批里更差。找出其中的错误。
"""

from torch import Tensor


def prepare(images: Tensor, train_images: Tensor) -> Tensor:
    """Centre images on 0 and scale them to a deviation of 1, by the statistics of the training images.

    Args:
        images: What the network is about to see, (N, 28, 28) uint8; training, validation or test images.
        train_images: All training images, (M, 28, 28) uint8.

    Returns:
        (N, 1, 28, 28) float32.
    """
    pixels = images[:, None].float() / 255
    return (pixels - pixels.mean()) / pixels.std()
