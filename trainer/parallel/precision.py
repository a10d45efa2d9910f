"""The type that a run computes in."""

from typing import Literal

import torch

Precision = Literal["bf16", "fp32", "fp64"]
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def precision_of(configured: Precision | None, device: torch.device) -> Precision:
    """parallel.precision; where it is null, bf16 on a GPU and fp32 on a CPU."""
    return configured or ("bf16" if device.type == "cuda" else "fp32")


def multiplies(precision: Precision, device: torch.device) -> bool:
    """Whether the device multiplies matrices in this precision itself. torch does so in a loop where a processor does
    not know bf16, which takes many times as long as fp32."""
    if precision != "bf16":
        return True
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def at_least_fp32(precision: Precision) -> torch.dtype:
    """For what must keep more digits than bf16 has: latents, and the autoencoder that makes them."""
    return torch.float64 if precision == "fp64" else torch.float32
