"""Random numbers that are a function of a sample's key alone: not of rank, world size, micro-batch or worker.

A counter-based generator: number i of a key is SplitMix64 (Steele et al., 2014) of key and i, on int64 tensors
of any device.
"""

import math

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB

# One number per purpose (its first four letters), so that streams of one key are independent of each other.
PURPOSES = {
    "time": 0x74696D65,
    "noise": 0x6E6F6973,
    "posterior": 0x706F7374,
    "features": 0x66656174,
    "uniform": 0x756E6966,
    "pooled": 0x706F6F6C,
    "route": 0x726F7574,
}


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, which wraps around as unsigned arithmetic does."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def bits(keys: Tensor, count: int, purpose: str) -> Tensor:
    """keys int64 [B] -> [B, count] int64, uniformly distributed."""
    start = mix(mix(keys) ^ PURPOSES[purpose])
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    return mix(start[:, None] + counter * _GOLDEN)


def normal(keys: Tensor, shape: tuple[int, ...], purpose: str) -> Tensor:
    """keys int64 [B] -> standard normal [B, *shape], float64 (Box-Muller, two numbers from one hash)."""
    count = math.prod(shape)
    words = bits(keys, (count + 1) // 2, purpose)
    high = _shift_right(words, 32).double()
    low = (words & 0xFFFFFFFF).double()
    radius = (-2 * ((high + 0.5) * 2.0**-32).log()).sqrt()
    angle = (low + 0.5) * (2.0**-32 * 2 * math.pi)
    numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return numbers.reshape(len(keys), -1)[:, :count].reshape(len(keys), *shape)


def uniform(keys: Tensor, count: int, purpose: str) -> Tensor:
    """keys int64 [B] -> [B, count] float64, uniform on (0, 1), both ends excluded."""
    return (_shift_right(bits(keys, count, purpose), 12).double() + 0.5) * 2.0**-52


def integers(keys: Tensor, high: int, purpose: str) -> Tensor:
    """keys int64 [B] -> [B] int64, uniform on 0 .. high - 1.

    The upper half of a word times `high` keeps the odds of two values within high / 2^32 of each other.
    """
    return (_shift_right(bits(keys, 1, purpose)[:, 0], 32) * high) >> 32


def subset(keys: Tensor, size: int, count: int, purpose: str) -> Tensor:
    """keys int64 [B] -> [B, count] int64: so many of the numbers 0 .. size - 1, rising, each set as likely as any."""
    drawn = uniform(keys, size, purpose).argsort(dim=1, stable=True)[:, :count]
    return drawn.sort(dim=1).values


def at_step(keys: Tensor, step: int | Tensor) -> Tensor:
    """Keys of one step of a sampler, or of each row's own int64 [B]: int64 [B], independent of those of other steps."""
    return mix(mix(keys) + (torch.zeros_like(keys) + step + 1) * _GOLDEN)


def at_time(keys: Tensor, t: Tensor) -> Tensor:
    """Keys of one time t [B] of a sampler, by its bits in float32: int64 [B], independent of those of other times."""
    return at_step(keys, t.float().view(torch.int32).long())
