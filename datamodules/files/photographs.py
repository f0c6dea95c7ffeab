"""Augmentation that photographs need beside `datamodules.augmentation`; whole batches, on the device."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def warp(images: Tensor, rotation: float, zoom: float, shift: float) -> Tensor:
    """Turn uint8 images (N, C, H, W) by up to `rotation` degrees, scale by 1 +- `zoom`, move by `shift` of the size."""
    if not rotation and not zoom and not shift:
        return images
    turn, scale, right, down = 2 * torch.rand(4, len(images), device=images.device) - 1
    angle, scale = turn * math.radians(rotation), 1 / (1 + zoom * scale).clamp(min=0.1)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cosine, -sine, 2 * shift * right, sine, cosine, 2 * shift * down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Beyond its edge an image goes on as its outermost pixels. (Not by `padding_mode`, which PyTorch 2.8 lacks on MPS.)
    edge = (1 - 1 / torch.tensor([images.shape[3], images.shape[2]])).to(images.device, non_blocking=images.is_cuda)
    moved = F.grid_sample(images.float(), grid.clamp(-edge, edge), align_corners=False)
    return moved.round_().clamp_(0, 255).byte()


def saturate(images: Tensor, saturation: float) -> Tensor:
    """Scale the colours of uint8 images (N, 3, H, W) around their greys by a factor within 1 +- this."""
    if not saturation or images.shape[1] != 3:
        return images
    factors = 1 + saturation * (2 * torch.rand(len(images), 1, 1, 1, device=images.device) - 1)
    grey = images.float().mean(dim=1, keepdim=True)
    return (grey + (images - grey) * factors).round_().clamp_(0, 255).byte()
