"""What a profiler's trace says about attention."""

from collections.abc import Iterable, Mapping
from typing import Any

_OPERATIONS = ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn")
_OTHER_KERNELS = ("fmha_cutlass", "cudnn_generated_fort_native_sdpa", "efficient")  # by parts of their names


def attention_faults(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """What in a trace of training steps on a GPU is not FlashAttention: operations, kernels, or a pass without any."""
    events = [event for event in events if "name" in event]
    operations = {event["name"] for event in events if event["name"].startswith(_OPERATIONS)}
    kernels = {event["name"] for event in events if event.get("cat") == "kernel"}
    faults = [f"{name} is not flash" for name in sorted(operations) if "flash" not in name]
    faults += [f"kernel {name}" for name in sorted(kernels) if any(part in name for part in _OTHER_KERNELS)]
    flash = {name for name in kernels if "flash" in name}
    for direction in ("fwd", "bwd"):
        if not any(direction in name for name in flash):
            faults.append(f"no flash kernel is named {direction}, of {sorted(flash) or 'none'}")
    return faults
