"""How a network's weights are initialised."""

from torch import nn


def he_initialization(module: nn.Module) -> None:
    """Draw a convolution's or linear layer's weights from N(0, 2 / fan_in); its bias is 0 (arXiv:1502.01852)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_output(net: nn.Module, bias: float) -> None:
    """Clear the last layer's weights and set its biases; ValueError if batch normalisation would undo that."""
    *_, output = (layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d))
    if isinstance(output, nn.BatchNorm2d):
        raise ValueError(f"output_bias={bias}: the batch normalisation after the last layer undoes it; set it to null")
    nn.init.zeros_(output.weight)
    if output.bias is not None:
        nn.init.constant_(output.bias, bias)
