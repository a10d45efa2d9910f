"""The type that a run computes in."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp8", "fp32", "fp64"]
DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""Of weights and activations. fp8 narrows what the blocks multiply, at the product alone (see float8)."""


def precision_of(configured: Precision | None, device: torch.device) -> Precision:
    """parallel.precision; where it is null, bf16 on a GPU and fp32 on a CPU."""
    return configured or ("bf16" if device.type == "cuda" else "fp32")


def without_fp8(precision: Precision) -> Literal["bf16", "fp32", "fp64"]:
    """For what fp8 is not meant for: encoders, and models that are not trained."""
    return "bf16" if precision == "fp8" else precision


def multiplies(precision: Precision, device: torch.device) -> bool:
    """Whether the device multiplies matrices in this precision itself. torch does so in a loop where a processor does
    not know bf16, which takes many times as long as fp32; fp8 is emulated on every processor."""
    if device.type == "cuda":
        return precision != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16":
        return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))
    return precision != "fp8"


def at_least_fp32(precision: Precision) -> torch.dtype:
    """For what must keep more digits than bf16 has: latents, and the autoencoder that makes them."""
    return torch.float64 if precision == "fp64" else torch.float32
