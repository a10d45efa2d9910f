"""The polar factor of matrices, which is what Muon moves weights by."""

import torch
from torch import Tensor

# Of the quintic that Jordan et al. (Muon, 2024) chose: each step maps a singular value s to a s + b s^3 + c s^5, which
# takes small ones up by a factor of a and leaves all of them between 0.7 and 1.2, not at 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def polar_factor(matrices: Tensor, steps: int) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, by Newton-Schulz iteration in the matrices' own type.

    matrices: [M, R, C]. steps: 5 bring singular values from 0.003 times the largest norm up to 0.7. A matrix of zeros
    stays zero, and one that is tiny is not taken for zero: only the ratios of singular values count.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # [M, r, c] with r <= c: the products below are [r, r]
    # By its largest entry first: squares of entries below 1e-23 are 0 in fp32, and a momentum fades to that.
    x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / norm.clamp(min=1)).to(matrices.dtype)  # it is at least 1, but for a matrix of zeros
    for _ in range(steps):
        gram = x @ x.mT  # [M, r, r]
        polynomial = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)  # b S + c S^2
        x = torch.baddbmm(x, polynomial, x, beta=_A)  # a X + (b S + c S^2) X
    return x.mT if tall else x


def multiply_adds(rows: int, columns: int, steps: int) -> int:
    """Multiply-adds of `polar_factor` for one matrix."""
    short, long = sorted((rows, columns))
    return steps * (2 * short * short * long + short**3)
