"""How a network's weights are initialised."""

from torch import nn


def he_initialization(module: nn.Module) -> None:
    """Draw a convolution's or linear layer's weights from N(0, 2 / fan_in); its bias is 0 (arXiv:1502.01852)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def start_output(net: nn.Module, bias: float) -> None:
    """Clear the weights of the last convolution or linear layer and set its biases."""
    output = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][-1]
    nn.init.zeros_(output.weight)
    if output.bias is not None:
        nn.init.constant_(output.bias, bias)
