"""The polar factor by Newton-Schulz, beside the singular value decomposition."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.parallel.polar import multiply_adds, polar_factor


def spectrum(ratio: float, rows: int, columns: int) -> Tensor:
    """A matrix whose singular values fall from 1 to `ratio`."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(rows, columns, generator=generator, dtype=torch.float64), False)
    return u @ torch.diag(torch.logspace(0, torch.tensor(ratio).log10().item(), u.shape[1]).double()) @ vt


@pytest.mark.parametrize("shape", [(48, 48), (96, 24), (24, 96)])
@pytest.mark.parametrize("size", [1.0, 1e-17, 1e-34])
def test_directions_are_kept_and_singular_values_are_near_1(shape: tuple[int, int], size: float) -> None:
    matrix = size * spectrum(0.1, *shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    factor = polar_factor(matrix[None].float(), 5)[0].double()
    values = u.mT @ factor @ vt.mT
    assert 0.65 < values.diagonal().min() < values.diagonal().max() < 1.25
    assert (values - torch.diag(values.diagonal())).abs().max() < 1e-4


def test_few_steps_leave_small_singular_values_small() -> None:
    """So the test above can fail."""
    matrix = spectrum(0.1, 48, 48)[None]
    assert torch.linalg.svdvals(polar_factor(matrix, 1)).min() < 0.3


def test_nothing_to_move_along_is_no_movement() -> None:
    assert not polar_factor(torch.zeros(2, 3, 5), 5).any()


def test_each_matrix_is_its_own() -> None:
    matrices = torch.stack([spectrum(0.1, 8, 16), 1e-6 * spectrum(0.5, 8, 16)])
    alone = [polar_factor(each[None], 5)[0] for each in matrices]
    assert torch.allclose(polar_factor(matrices, 5), torch.stack(alone), atol=1e-12)


def test_multiply_adds_are_those_that_torch_counts() -> None:
    with FlopCounterMode(display=False) as counter:
        polar_factor(torch.randn(3, 8, 20), 4)
    assert counter.get_total_flops() == 2 * 3 * multiply_adds(8, 20, 4) == 2 * 3 * multiply_adds(20, 8, 4)
