"""Starts VGG from torchvision's ImageNet weights: fetched, verified, and adapted to grey images and other classes."""

import hashlib
import http.client
import socket
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from datamodules.files.finding import locked
from errors import UserError, after_failed_fetch, one_line

TIMEOUT = 30.0  # seconds without a byte
FIRST = "features.0"
HIDDEN = ("classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias")


def start_from_imagenet(net: nn.Module, mean: float, std: float) -> str:
    """Copy ImageNet weights into a VGG, plain or with batch normalisation, for images (N, 1 or 3, H, W).

    The weights know images as (RGB - ImageNet's mean) / ImageNet's deviation, each channel with its own; ours are
    (grey - `mean`) / `std`. Where the three channels show the same grey, the first convolution can compensate for that:
    its filters are scaled (and, for one channel, summed over RGB), and its biases take the shift. That is exact except
    for the image's outermost pixels: there the zeros around the image stand for the mean, ours instead of ImageNet's.
    `mean` 0.449 and `std` 0.226, the averages over RGB, keep that difference small.

    The hidden layers are copied if they fit (images of 224x224), otherwise they stay as they are, and so does the
    last layer.

    Args:
        net: The network, changed in place.
        mean: Subtracted from the pixels, 0..1, of its images.
        std: Divides them afterwards.

    Returns:
        One line: which weights, and which of them were used.

    Raises:
        UserError: If there are no weights for this network, or the file can't be fetched or is the wrong one.

    Source: torchvision's `VGG*_Weights.IMAGENET1K_V1`, https://docs.pytorch.org/vision/stable/models/vgg.html
    """
    weights = _weights_for(net)
    source = _state_dict(weights)
    own = net.state_dict()
    taken = {name: tensor for name, tensor in source.items() if name.startswith("features.")}
    hidden_too = all(name in own and own[name].shape == source[name].shape for name in HIDDEN)
    if hidden_too:
        taken |= {name: source[name] for name in HIDDEN}
    transforms = weights.transforms()
    taken[f"{FIRST}.weight"], taken[f"{FIRST}.bias"] = _first_convolution(
        source[f"{FIRST}.weight"].double(),
        source[f"{FIRST}.bias"].double(),
        channels=own[f"{FIRST}.weight"].shape[1],
        shift=(mean - torch.tensor(transforms.mean, dtype=torch.float64)) / torch.tensor(transforms.std),
        scale=std / torch.tensor(transforms.std, dtype=torch.float64),
    )
    net.load_state_dict(taken, strict=False)
    what = "convolutions and hidden layers; the last layer is new"
    if not hidden_too:
        what = "convolutions; the classifier is new: ImageNet's has hidden layers for images of 224x224"
    return f"Starting from {weights}: {what}"


def _weights_for(net: nn.Module) -> WeightsEnum:
    """The weights of torchvision's VGG with the same convolutions."""
    features = getattr(net, "features", nn.Identity())
    convolutions = sum(isinstance(module, nn.Conv2d) for module in features.modules())
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in features.modules())
    name = f"vgg{convolutions + 3}{'_bn' if batch_norm else ''}"
    if name not in list_models(include="vgg*"):
        raise UserError(
            f"--pretrained has ImageNet weights for VGG-11, 13, 16 and 19, not for {type(net).__name__}; "
            "use --model pretrained/vgg16, or leave --pretrained out"
        )
    with torch.device("meta"):  # only for the shapes
        expected = get_model(name).state_dict()
    own = {key: tuple(tensor.shape) for key, tensor in net.state_dict().items()}
    for key, tensor in expected.items():
        fits = [tuple(tensor.shape)]
        if key == f"{FIRST}.weight":
            fits.append((tensor.shape[0], 1, *tensor.shape[2:]))
        if key.startswith("features.") and key not in own:
            raise UserError(
                f"--pretrained needs the layers of ImageNet's VGG: {key} is missing in this network; leave its blocks "
                "and pool_first as they are, or leave --pretrained out"
            )
        if key.startswith("features.") and own[key] not in fits:
            raise UserError(
                f"--pretrained needs a VGG of full width: {key} is {own[key]} in this network, "
                f"{tuple(tensor.shape)} in ImageNet's; set width_divisor to 1, or leave --pretrained out"
            )
    return get_model_weights(name)["IMAGENET1K_V1"]


def _first_convolution(
    weight: Tensor, bias: Tensor, channels: int, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Filters (64, `channels`, 3, 3) and biases (64,) for pixels that become ImageNet's as scale * pixel + shift."""
    bias = bias + (weight * shift[:, None, None]).sum(dim=(1, 2, 3))
    weight = weight * scale[:, None, None]
    return weight if channels == 3 else weight.sum(dim=1, keepdim=True), bias


def _state_dict(weights: WeightsEnum) -> dict[str, Tensor]:
    """Fetch the file into torch.hub's cache if it is not there, one process at a time, and read it."""
    path = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none, and would wait forever
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file that is there is complete, and its folder may be read-only: no lock.
        with nullcontext() if path.exists() else locked(Path(f"{path}.lock"), tolerated=()):
            if path.exists():
                _verify(path)  # torch.hub verifies only what it fetches
            return weights.get_state_dict(
                check_hash=True, weights_only=True, map_location="cpu", progress=sys.stderr.isatty()
            )
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "invalid hash value" not in str(error):
            raise
        if isinstance(error, HTTPError):
            error.close()
        reason = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
        first = after_failed_fetch(str(reason), "try again when online")
        raise UserError(
            f"--pretrained needs {path}, which can't be fetched from {weights.url}: {one_line(str(reason))}; "
            f"{first}, or put the file there yourself"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)


def _verify(path: Path) -> None:
    """Check the file against the beginning of its SHA-256, with which its name ends."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    wanted = path.stem.rpartition("-")[2]
    if not digest.hexdigest().startswith(wanted):
        raise UserError(
            f"{path} is damaged or a different file: its SHA-256 begins with {digest.hexdigest()[: len(wanted)]}, "
            f"not {wanted}; delete it, and it will be fetched again"
        )
