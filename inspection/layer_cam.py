"""LayerCAM: which parts of an image a network bases a class on.

P.-T. Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE TIP 2021
(doi:10.1109/TIP.2021.3089943). Unlike Grad-CAM, from which it comes, it weights each place of a map by that place's own
gradient, so that it works on maps larger than the last ones, which for images of 32 pixels are 2x2.
"""

import torch
from torch import Tensor, nn

from errors import MissingPackage, UserError
from inspection.stages import evaluating, walk

SMALLEST = 6  # pixels of a map on which one can see what a heat map points at


def check_captum() -> None:
    """Report at once if the package is missing.

    Raises:
        UserError: If it is.
    """
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        raise MissingPackage("--gradcam needs", "captum") from None


def explained_stage(net: nn.Module, images: Tensor) -> nn.Module:
    """The last stage with convolutions whose maps are at least `SMALLEST` wide and high, or what follows at that size.

    If none are as large, it is the first with maps. Among those of its size the last without negative values is taken,
    if there is one: only there does each value speak for something.

    Args:
        net: The network, whose stages are those of `inspection.stages.stages`.
        images: A batch (N, C, H, W) for it.

    Raises:
        UserError: If no stage has feature maps larger than 1x1.
    """

    def keep(output: Tensor) -> tuple[tuple[int, ...], bool]:
        return tuple(output.shape[2:]), bool((output >= 0).all())

    walked, _ = walk(net, lambda: net.forward(images[:1]), keep)
    seen = [stage for _, stage, _ in walked]
    maps: list[tuple[nn.Module, tuple[int, ...], bool, bool]] = []
    for _, stage, kept in walked:
        size, positive = kept or ((), False)
        convolves = any(isinstance(module, nn.Conv2d) for module in stage.modules())
        follows = bool(maps) and seen.count(stage) == 1  # a ReLU that several layers share has no maps of its own
        if (convolves or follows) and len(size) == 2 and size != (1, 1):
            maps.append((stage, size, positive, convolves))
    sizes = [size for _, size, _, convolves in maps if convolves]
    if not sizes:
        raise UserError(f"{type(net).__name__} has no feature maps for --gradcam to show")
    chosen = next((size for size in reversed(sizes) if min(size) >= SMALLEST), sizes[0])
    same = [(stage, positive) for stage, size, positive, _ in maps if size == chosen]
    return next((stage for stage, positive in reversed(same) if positive), same[-1][0])


def layer_cam(net: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """How much each part of each image contributes to its class.

    Parameters, their gradients, random generators and the network's mode stay as they are. It also works where
    gradients are switched off, as in Lightning's evaluation.

    Args:
        net: A network; also a compiled one, whose plain form is used.
        images: A batch (N, C, H, W) as the network sees it, on the network's device.
        classes: The class to explain for each image, (N,).

    Returns:
        Values 0 to 1 of shape (N, h, w), the size of the feature maps; all 0 if nothing contributes.

    Raises:
        UserError: If no stage of the network has feature maps larger than 1x1.
    """
    from captum.attr import LayerActivation, LayerGradientXActivation

    with evaluating(net), torch.inference_mode(False), torch.enable_grad():
        # Copies: what was made in inference mode can't take part in a backward pass.
        images, classes = images.to(next(net.parameters()).dtype).clone(), classes.clone()
        stage = explained_stage(net, images)
        activation = LayerActivation(net.forward, stage).attribute(images)
        gradient = LayerGradientXActivation(net.forward, stage, multiply_by_inputs=False).attribute(images, classes)
    maps = (gradient.detach().float().relu() * activation.detach().float()).sum(dim=1).relu().cpu()
    return maps / maps.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
