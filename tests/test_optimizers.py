"""Muon: what a step is, beside torch.optim's. (A run with it that is continued: test_launch.py.)"""

from typing import Any

import pytest
import torch
from torch import nn

from optimizers.muon import BETAS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(16, 9), (9, 16), (64, 576), (1, 9), (10, 10)])
def test_orthogonal_is_near_the_nearest_orthogonal_matrix(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ orthogonal(1e-3 * matrix) @ right.T  # whatever the scale
    large = values > 0.05 * values.max()
    torch.testing.assert_close(found, found.diagonal().diag(), atol=1e-9, rtol=0)
    assert ((found.diagonal()[large] > 0.65) & (found.diagonal()[large] < 1.25)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_low_rank_is_no_larger_for_its_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(64, 5, generator=generator) @ torch.randn(5, 576, generator=generator)
    assert torch.linalg.svdvals(orthogonal(matrix.to(dtype)).float()).max() < 1.25


def steps(optimizer: Any, parameters: list[nn.Parameter], count: int = 5) -> None:
    """The same gradients for whatever optimiser and order in memory."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() == 4:
                parameter.grad = parameter.grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_all_but_kernels_move_as_with_adamw() -> None:
    shapes = [(4, 6), (6,), ()]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    steps(Muon(ours, lr=0.1, weight_decay=0.3, others=0.2), ours)
    steps(torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.3, betas=BETAS), theirs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch >= 2.9, which has a Muon for matrices")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_kernels_move_as_matrices_do_with_torchs_muon(shape: tuple[int, int]) -> None:
    start, ours, theirs = parameters(shape, (*shape, 1, 1), shape)
    ours.data, theirs.data = start.data.clone().view_as(ours), start.data.clone()
    steps(Muon([ours], lr=0.1, weight_decay=0.3), [ours])
    steps(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"), [theirs])
    assert (ours.flatten(1) - theirs).norm() < 0.05 * (theirs - start).norm()  # which computes in bfloat16


def test_the_order_in_memory_changes_nothing() -> None:
    ours, other = parameters((8, 3, 3, 3)), parameters((8, 3, 3, 3))
    other[0].data = other[0].data.contiguous(memory_format=torch.channels_last)
    steps(Muon(ours, lr=0.1), ours)
    steps(Muon(other, lr=0.1), other)
    torch.testing.assert_close(ours, other)


def test_a_step_is_as_long_as_adamws() -> None:
    (kernel,) = parameters((32, 16, 3, 3))
    before = kernel.detach().clone()
    steps(Muon([kernel], lr=0.1), [kernel], count=1)
    assert 0.7 < (kernel - before).square().mean().sqrt() / (0.2 * 0.1) < 1.2


@pytest.mark.parametrize("setting", ["lr", "momentum", "weight_decay", "others"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_setting_out_of_range_is_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{setting}={value}"):
        Muon(parameters((2, 2)), **{setting: value})
