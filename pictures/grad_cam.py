"""Grad-CAM: which parts of an image spoke for a class.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017
(arXiv:1610.02391), in the implementation of Captum.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from errors import UserError
from pictures.contact_sheet import INK, PAPER, fitting

EDGE = 280  # pixels of each of the two images of an overlay
# From cold to hot, in equal steps.
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], np.float64)


def check_captum() -> None:
    """Say at once if the package is missing.

    Raises:
        UserError: If it is.
    """
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        raise UserError("--gradcam needs the package captum: pip install -r requirements-extras.txt") from None


def last_feature_maps(net: nn.Module, images: Tensor) -> nn.Module:
    """The stage whose output Grad-CAM weighs: the last that has convolutions, or what follows it at the same size.

    Args:
        net: The network; its children are the stages, and a Sequential counts as its members.
        images: A batch (N, C, H, W) for it.

    Raises:
        UserError: If no stage has feature maps larger than 1x1.
    """
    stages: list[nn.Module] = []
    for child in net.children():
        stages += child.children() if type(child) is nn.Sequential else [child]
    sizes: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note_size(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        sizes.append((module, tuple(output.shape[2:]) if isinstance(output, Tensor) else ()))

    handles = [stage.register_forward_hook(note_size) for stage in stages]
    try:
        with torch.no_grad():
            net(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    found: tuple[nn.Module, tuple[int, ...]] | None = None
    for stage, size in sizes:
        if len(size) != 2 or size == (1, 1):
            continue
        convolves = any(isinstance(module, nn.Conv2d) for module in stage.modules())
        if convolves or (found and size == found[1] and stage is not found[0]):
            found = stage, size
    if found is None:
        raise UserError(f"{type(net).__name__} has no feature maps for --gradcam to show")
    return found[0]


def grad_cam(net: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much each part of each image spoke for its class.

    Args:
        net: A network in evaluation mode.
        images: A batch (N, C, H, W) as the network sees it.
        classes: The class to explain of each image, (N,).

    Returns:
        Values 0 to 1 of shape (N, h, w), the size of the feature maps; all 0 where nothing spoke for the class.
    """
    from captum.attr import LayerGradCam

    layer = last_feature_maps(net, images)
    with torch.enable_grad():
        maps = LayerGradCam(net, layer).attribute(images, classes, relu_attributions=True)
    maps = maps.detach()[:, 0].float().cpu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def overlay(image: np.ndarray, cam: Tensor, caption: str) -> Image.Image:
    """The image beside itself under the heat map.

    Args:
        image: What the network saw, (28, 28) uint8.
        cam: Its Grad-CAM (h, w), 0 to 1.
        caption: Written above.
    """
    size = (EDGE, EDGE)
    grey = Image.fromarray(image).resize(size, Image.Resampling.NEAREST).convert("RGB")
    heat = np.asarray(Image.fromarray(cam.numpy()).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    position = heat[..., None] * (len(COLOURS) - 1)
    lower = np.minimum(position.astype(int), len(COLOURS) - 2)
    below, above = COLOURS[lower[..., 0]], COLOURS[lower[..., 0] + 1]
    colours = Image.fromarray((below + (above - below) * (position - lower)).astype(np.uint8))
    sheet = Image.new("RGB", (2 * EDGE + 30, EDGE + 46), PAPER)
    font = ImageFont.load_default(16)
    ImageDraw.Draw(sheet).text((10, 8), fitting(caption, font, 2 * EDGE + 10), INK, font)
    sheet.paste(grey, (10, 36))
    sheet.paste(Image.blend(grey, colours, 0.6), (EDGE + 20, 36))
    return sheet
