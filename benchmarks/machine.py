"""Where and when a figure was measured, and where it is written."""

import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Device, processor, versions and date."""
    cuda = torch.cuda.is_available()
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": model[0].partition(":")[2].strip() if model else platform.machine(),
        "cpu_count": len(model),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Print and store results with the machine's description."""
    text = json.dumps({"machine": machine(), **results}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(text)


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[torch.device], float]) -> float:
    """FLOP/s of products of square matrices. clock: seconds, when the device has done what it was given."""
    n, count = (8192, 20) if device.type == "cuda" else (1024, 5)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    began = clock(device)
    for _ in range(count):
        torch.mm(a, b)
    return 2 * n**3 * count / (clock(device) - began)
