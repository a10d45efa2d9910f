"""Attention, and the kernel that computes it: packed sequences on a GPU, a mask elsewhere.

Flash kernels take no mask, but they take sequences of different lengths that lie behind each other in memory. A padded
batch is already such a pack: each row is two sequences, its tokens and then its padding, and each attends to itself
alone. So nothing is moved, the lengths stay on the device, and the padding gets finite numbers that nobody reads.

Shapes: B batch, N queries, L keys, H heads, K head_dim, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.nn.attention.varlen import varlen_attn

Kernel = Literal["sdpa", "varlen", "flash3", "cudnn", "efficient", "math"]
"""`sdpa`: torch's own choice, with a mask. `varlen` and `flash3`: FlashAttention 2 and 3, on packed rows. `cudnn`,
`efficient` and `math`: torch's kernel of that name, with a mask. Those with a name take that kernel or raise."""

PACKED: tuple[Kernel, ...] = ("varlen", "flash3")
_BACKENDS = {
    "varlen": SDPBackend.FLASH_ATTENTION,  # where there is no text to pack
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class _InUse:
    """One kernel for the process: activation checkpointing calls `attend` again in threads of autograd."""

    kernel: Kernel = "sdpa"


def kernel_in_use() -> Kernel:
    """The kernel that `attend` takes."""
    return _InUse.kernel


def use_kernel(kernel: Kernel) -> None:
    """Let all models of this process take `kernel` from now on. Raises what torch raises where FlashAttention 3 is not
    installed, and changes nothing then."""
    if kernel == "flash3":
        if current_flash_attention_impl() is None:
            activate_flash_attention_impl("FA3")
    elif current_flash_attention_impl() is not None:
        restore_flash_attention_impl()
    _InUse.kernel = kernel


@contextmanager
def kernel_restored() -> Iterator[None]:
    """A block of code after which the kernel in use is again what it was before."""
    before = _InUse.kernel
    try:
        yield
    finally:
        if _InUse.kernel != before:
            use_kernel(before)


class Packing(NamedTuple):
    """Where the 2 B sequences of B rows begin, and where the last one ends: of queries and of keys, int32 [2 B + 1]."""

    queries: Tensor
    keys: Tensor


Visible: TypeAlias = Tensor | Packing | None
"""What queries may look at: a mask [B, 1, 1, L], True where to look; a packing; or None, which is everything."""


def visible(mask: Tensor, before: int = 0) -> Visible:
    """For attention among the tokens of a row: `before` tokens that are real in every row, then text with its mask
    [B, L]. Where the kernel in use packs, padding is taken to follow the text's tokens; and no number comes to the
    host."""
    if _InUse.kernel not in PACKED:
        return torch.cat([mask.new_ones(mask.shape[0], before), mask], dim=1)[:, None, None]  # [B, 1, 1, before + L]
    row = before + mask.shape[1]
    first = row * torch.arange(len(mask), device=mask.device)  # [B]
    ends = torch.stack([first, first + before + mask.sum(1)], dim=1).flatten()  # [2 B]
    ends = F.pad(ends, (0, 1), value=row * len(mask)).int()  # [2 B + 1]
    return Packing(ends, ends)


def visible_from(x: Tensor, seen: Visible) -> Visible:
    """For queries from x [B, N, D], all of them real, to the same keys."""
    if not isinstance(seen, Packing):
        return seen
    batch, n = x.shape[:2]
    # Lengths N, 0, N, 0, ...: from the padding nobody asks.
    ends = (torch.arange(2 * batch + 1, dtype=torch.int32, device=x.device) + 1) // 2 * n  # [2 B + 1]
    return Packing(ends, seen.keys)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible = None) -> Tensor:
    """Softmax attention: q [B, N, H, K], k and v [B, L, H, K] -> [B, N, D]. seen: of `visible` or `visible_from`."""
    if isinstance(seen, Packing):
        rows, most_keys = q.shape[:2], k.shape[1]
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))  # [B N or B L, H, K]
        attended = varlen_attn(q, k, v, seen.queries, seen.keys, rows[1], most_keys)
        assert isinstance(attended, Tensor)  # [B N, H, K]
        return attended.unflatten(0, rows).flatten(2)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # [B, H, N or L, K]
    backend = _BACKENDS.get(_InUse.kernel)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [B, H, N, K]
    return attended.transpose(1, 2).flatten(2)
