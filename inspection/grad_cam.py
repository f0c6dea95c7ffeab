"""Grad-CAM: which parts of an image spoke for a class.

R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", 2017
(arXiv:1610.02391), in the implementation of Captum.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from errors import MissingPackage, UserError
from pictures.contact_sheet import INK, PAPER, fitting
from pictures.fonts import legible

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
        raise MissingPackage("--gradcam needs", "captum") from None


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
            net.forward(images[:1])  # not net(...): a compiled network knows no hooks
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

    Parameters, their gradients, random generators and the network's mode stay as they are, and it works where
    gradients are switched off, as in Lightning's evaluation.

    Args:
        net: A network; also a compiled one, whose plain form is used.
        images: A batch (N, C, H, W) as the network sees it, on the network's device.
        classes: The class to explain of each image, (N,).

    Returns:
        Values 0 to 1 of shape (N, h, w), the size of the feature maps; all 0 where nothing spoke for the class.

    Raises:
        UserError: If no stage of the network has feature maps larger than 1x1.
    """
    from captum.attr import LayerGradCam

    was_training = net.training
    try:
        net.eval()
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: what was made in inference mode can't take part in a backward pass.
            images, classes = images.to(next(net.parameters()).dtype).clone(), classes.clone()
            layer = last_feature_maps(net, images)
            maps = LayerGradCam(net.forward, layer).attribute(images, classes, relu_attributions=True)
    finally:
        net.train(was_training)
    maps = maps.detach()[:, 0].float().cpu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def overlay(image: np.ndarray, cam: Tensor, caption: str) -> Image.Image:
    """The image beside itself under the heat map.

    Args:
        image: What the network saw, (28, 28) uint8.
        cam: Its Grad-CAM (h, w), 0 to 1.
        caption: Written above.
    """
    grey = Image.fromarray(image).resize((EDGE, EDGE), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (2 * EDGE + 30, EDGE + 46), PAPER)
    caption, font = legible(caption, 16)
    ImageDraw.Draw(sheet).text((10, 24), fitting(caption, font, 2 * EDGE + 10), INK, font, "ls")
    sheet.paste(grey, (10, 36))
    sheet.paste(heat_map(image, cam), (EDGE + 20, 36))
    return sheet


def heat_map(image: np.ndarray, cam: Tensor, edge: int = EDGE) -> Image.Image:
    """The image (28, 28) uint8, enlarged to `edge` x `edge` pixels, under its Grad-CAM (h, w), 0 to 1."""
    size = (edge, edge)
    grey = Image.fromarray(image).resize(size, Image.Resampling.NEAREST).convert("RGB")
    heat = np.asarray(Image.fromarray(cam.numpy()).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    position = heat[..., None] * (len(COLOURS) - 1)
    lower = np.minimum(position.astype(int), len(COLOURS) - 2)
    below, above = COLOURS[lower[..., 0]], COLOURS[lower[..., 0] + 1]
    colours = Image.fromarray((below + (above - below) * (position - lower)).astype(np.uint8))
    return Image.blend(grey, colours, 0.6)
