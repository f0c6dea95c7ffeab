"""Augmentation of whole batches on the device; each image by its own random draw."""

import torch
from torch import Tensor
from torch.nn import functional as F


def shift_and_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Move uint8 images (N, C, H, W) by up to `padding` pixels, zeros coming in; with `flip` mirror half of them."""
    if not padding and not flip:
        return images
    count, _, height, width = images.shape
    device = images.device
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), device=device)
    # A view of every possible window of an image; one gather picks each image's own.
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, rows, columns, H, W)
    moved = windows[torch.arange(count, device=device), :, shifts[0, :, 0], shifts[1, :, 0]]
    if flip:
        keep = torch.rand(count, 1, 1, 1, device=device) < 0.5
        moved = torch.where(keep, moved, moved.flip(-1))
    return moved


def erase(images: Tensor, probability: float) -> Tensor:
    """Fill one rectangle of some uint8 images (N, C, H, W) with random pixels (Zhong et al. 2017, arXiv:1708.04896)."""
    if not probability:
        return images
    count, _, height, width = images.shape
    device = images.device
    chosen, area, aspect, y, x = torch.rand(5, count, 1, 1, device=device)
    area = (0.02 + 0.31 * area) * height * width
    aspect = 0.3 * 11**aspect  # 0.3 to 3.3; drawn evenly in its logarithm: as often tall as wide
    # The largest and longest rectangles would be 4 % longer than the image.
    rows = (area * aspect).sqrt().round().clamp(max=height)
    columns = (area / aspect).sqrt().round().clamp(max=width)
    row = torch.arange(height, device=device)[:, None] - (y * (height - rows + 1)).floor()  # counted from the top
    column = torch.arange(width, device=device) - (x * (width - columns + 1)).floor()
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns) & (chosen < probability)
    return torch.where(inside[:, None], torch.empty_like(images).random_(), images)


def jitter(pixels: Tensor, brightness: float, contrast: float) -> Tensor:
    """Scale pixels (N, C, H, W) in 0..1, then their distance from the image's mean, by factors within 1 +- these."""
    if not brightness and not contrast:
        return pixels
    draws = 2 * torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device) - 1
    pixels = pixels * (1 + brightness * draws[0])
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (pixels - mean) * (1 + contrast * draws[1])).clamp_(0, 1)
