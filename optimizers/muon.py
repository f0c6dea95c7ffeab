"""Muon: each convolution moves by the nearest orthogonal matrix to its momentum."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BETAS, EPS = (0.9, 0.95), 1e-8  # of AdamW; the second as Jordan has it, shorter than in torch.optim


class Muon(Optimizer):
    """Muon for the kernels of convolutions, AdamW for everything else.

    A kernel (out, in, height, width) is a matrix of `out` rows. Its step has a root mean square of about 0.2 times the
    learning rate, as AdamW's has (Liu et al. 2025, arXiv:2502.16982). `torch.optim.Muon` takes matrices alone, and no
    other parameters.

    Args:
        params: The parameters of a network, or groups of them.
        lr: Learning rate of the kernels.
        momentum: Of the kernels: share of the old gradients in the mean that is kept (Nesterov's).
        weight_decay: Decoupled from the gradient, times the learning rate.
        others: Learning rate of everything else, as a share of `lr`.

    Raises:
        ValueError: If a setting lies outside of its range.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); AdamW is that of Loshchilov & Hutter 2017
    (arXiv:1711.05101).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        others: float = 0.3,
    ) -> None:
        if not lr >= 0 or not weight_decay >= 0 or not others >= 0:
            raise ValueError(f"lr={lr}, weight_decay={weight_decay} and others={others} must be at least 0")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "others": others})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; returns what `closure` returns."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.dim() == 4:
                    rate, step = group["lr"], self._kernel_step(param, param.grad, group["momentum"])
                else:
                    rate, step = group["lr"] * group["others"], self._adam_step(param, param.grad)
                param.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=-rate)
        return loss

    def _kernel_step(self, param: Tensor, grad: Tensor, momentum: float) -> Tensor:
        """The orthogonalised momentum of a kernel, in its shape."""
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
        mean = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        matrix = grad.lerp(mean, momentum).flatten(1)
        return (orthogonal(matrix) * (0.2 * max(matrix.shape) ** 0.5)).view_as(param)

    def _adam_step(self, param: Tensor, grad: Tensor) -> Tensor:
        """The mean of the gradients over the root of the mean of their squares, both corrected for their start."""
        state = self.state[param]
        if not state:
            zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.tensor(0.0), **zeros)  # on the CPU, as torch.optim's
        state["step"] += 1
        mean = state["exp_avg"].lerp_(grad, 1 - BETAS[0])
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - BETAS[1])
        corrections = [1 - beta ** state["step"].item() for beta in BETAS]
        return mean / corrections[0] / (square / corrections[1]).sqrt().add(EPS)


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly the nearest matrix (rows, columns) with orthonormal rows or columns: singular values of 0.7 to 1.2.

    Five steps of a Newton–Schulz iteration, with Jordan's coefficients. A step multiplies the matrix by a polynomial of
    its Gram matrix, so that steps can be taken on the Gram matrix alone, which is smaller than a kernel. Each makes the
    rounding of its small eigenvalues up to twelve times as large: it is computed anew after two.
    """
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if (tall := x.size(0) > x.size(1)) else x  # the smaller product
    for more in (1, 2):
        gram = x @ x.T
        product = factor = _factor(gram)
        for _ in range(more):
            gram = factor @ gram @ factor
            factor = _factor(gram)
            product = factor @ product
        x = product @ x
    return x.T if tall else x


def _factor(gram: Tensor) -> Tensor:
    """By what a step multiplies a matrix."""
    factor = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
    factor.diagonal().add_(3.4445)
    return factor
