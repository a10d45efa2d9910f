"""Which kernel of attention works on this device: each is tried on small tensors before a model depends on it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import Kernel, attend, kernel_restored, use_kernel, visible, visible_from

# What is taken in place of a kernel that fails. `math`, the last one, is matrix products and a softmax: the yardstick.
NEXT: dict[Kernel, Kernel] = {"flash3": "varlen", "cudnn": "varlen", "varlen": "efficient", "efficient": "math"}

# Largest difference to `math` in float64, relative to the largest value. Rounding to bfloat16 gives about 0.01.
_TOLERANCE = {torch.bfloat16: 0.04, torch.float32: 1e-3, torch.float64: 1e-9}

# Keys that are 64 more than a multiple of 128 are where cuDNN's backward pass has been wrong under a mask.
_IMAGE, _TEXT = 128, 64
_LENGTHS = (0, 1, 37, 64)  # tokens of the four texts


class Choice(NamedTuple):
    """The kernel to use, and why each that was tried before it was rejected."""

    kernel: Kernel
    rejected: dict[Kernel, str]


def choose_kernel(wanted: Kernel, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> Choice:
    """`wanted`, or the first one after it that gives the right numbers here. Waits for the device."""
    kernel, rejected = wanted, {}
    while kernel in NEXT and (fault := fault_of(kernel, device, dtype, heads, head_dim)) is not None:
        rejected[kernel] = fault
        kernel = NEXT[kernel]
    return Choice(kernel, rejected)


def fault_of(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> str | None:
    """What is wrong with a kernel, forward or backward; None where nothing is."""
    inputs = _inputs(device, dtype, heads, head_dim)
    with kernel_restored():
        use_kernel("math")
        expected = dict(_results(*(part.double() for part in inputs)))
        try:
            use_kernel(kernel)
            for name, found in _results(*inputs):
                difference = ((found - expected[name]).abs().max() / expected[name].abs().max()).item()
                if not difference <= _TOLERANCE[dtype]:  # NaN is not
                    return f"{name} differs by {difference:.2g} of the largest value, {_TOLERANCE[dtype]:.2g} allowed"
        except Exception as error:  # whatever it is, there are other kernels
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    return None


def _inputs(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, each [4, 128 + 64, H, K]."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(_LENGTHS), _IMAGE + _TEXT, heads, head_dim)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def _results(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Outputs and gradients of the forms that backbones have, by name; what no loss reads counts as zero."""
    text = torch.arange(_TEXT, device=q.device) < torch.tensor(_LENGTHS, device=q.device)[:, None]  # [4, 64]
    seen = visible(text, before=_IMAGE)
    real = torch.cat([text.new_ones(len(text), _IMAGE), text], dim=1)  # [4, 192]
    for form, queries, keys, where in (
        ("joint attention", _IMAGE + _TEXT, _IMAGE + _TEXT, seen),
        ("attention of images to both", _IMAGE, _IMAGE + _TEXT, visible_from(q[:, :_IMAGE], seen)),
        ("attention without a mask", _IMAGE, _IMAGE, None),
    ):
        parts = tuple(part[:, :n].clone().requires_grad_() for part, n in ((q, queries), (k, keys), (v, keys)))
        out = attend(parts[0], parts[1], parts[2], where)  # [4, queries, D]
        weight = gradient[:, :queries].flatten(2) * real[:, :queries, None]
        gradients = torch.autograd.grad(out, parts, weight)
        for name, result in zip(("the output", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True):
            if not bool(result.isfinite().all()):
                result = result.clone().fill_(torch.nan)  # in padding, too: NaN times zero is NaN
            elif name == "the output":
                result = result * real[:, :queries, None]
            yield f"{name} of {form}", result.double()
