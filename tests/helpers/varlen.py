"""The operation behind varlen_attn, which torch has on GPUs alone, for tests on a CPU: one sequence after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from models.attention import kernel_restored, use_kernel


def check(q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int) -> None:
    """What flash kernels ask of their arguments; they read beyond the end, or wrongly, where it does not hold."""
    for x, ends, most in ((q, queries, most_queries), (k, keys, most_keys)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert x.stride(-1) == 1
        if not ends.is_meta:
            assert ends[0] == 0
            assert ends[-1] == len(x)
            assert 0 <= ends.diff().min() <= ends.diff().max() <= most
    assert queries.shape == keys.shape


def sequences(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of queries and keys of each sequence."""
    for rows, columns in zip(pairwise(queries.tolist()), pairwise(keys.tolist()), strict=True):
        yield slice(*rows), slice(*columns)


def weights(q: Tensor, k: Tensor) -> Tensor:
    """q [N, H, K], k [L, H, K] -> [H, N, L]."""
    return torch.einsum("nhk,lhk->hnl", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, *most: Any) -> tuple[Tensor, ...]:
    """q [B N, H, K], k and v [B L, H, K], int32 [sequences + 1] -> [B N, H, K], and two results that flash needs."""
    check(q, k, queries, keys, *most[:2])
    out = torch.empty_like(q)
    for rows, columns in sequences(queries, keys):
        out[rows] = torch.einsum("hnl,lhk->nhk", weights(q[rows], k[columns]), v[columns])
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2, dtype=torch.uint64)


def backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v by that of the output, g."""
    _, _, queries, keys, *most = rest
    check(q, k, queries, keys, *most[:2])
    dq, dk, dv = (torch.empty_like(part) for part in (q, k, v))
    for rows, columns in sequences(queries, keys):
        p = weights(q[rows], k[columns])  # [H, N, L]
        dp = torch.einsum("nhk,lhk->hnl", g[rows], v[columns])
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq[rows] = torch.einsum("hnl,lhk->nhk", ds, k[columns])
        dk[columns] = torch.einsum("hnl,nhk->lhk", ds, q[rows])
        dv[columns] = torch.einsum("hnl,nhk->lhk", p, g[rows])
    return dq, dk, dv


@contextmanager
def varlen_on_cpu(forward: Any = forward, backward: Any = backward) -> Iterator[None]:
    """A block of code in which the CPU has the operation (or the one given), and models take it. How it is derived, and
    its place in checkpointed and compiled blocks, are torch's own."""
    with torch.library._scoped_library("torch_attn", "IMPL") as library, kernel_restored():
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        use_kernel("varlen")
        yield
