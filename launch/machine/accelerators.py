"""torch and its driver, the GPUs, and what joins them within a node and between nodes."""

import ctypes.util
import re
from pathlib import Path

import torch

from launch.machine.finding import GIB, Finding, answer, listed
from launch.machine.system import INFINIBAND

VERBS = Path("/dev/infiniband")
OLDEST = (2, 11)  # of torch, as in pyproject.toml
BUSY = 0.1  # share of a GPU's memory that a desktop may hold


def torch_and_driver() -> Finding:
    """Whether this torch and the driver of this machine fit together."""
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    version, cuda = torch.__version__, torch.version.cuda or torch.version.hip
    found = f"{version}, {f'CUDA {cuda}' if cuda else 'for CPUs'}, "
    found += f"driver {driver.splitlines()[0]}" if driver else "no driver of NVIDIA's answers"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST:
        return Finding("short", "torch", found, f"expected {OLDEST[0]}.{OLDEST[1]} or newer: make setup")
    if driver and not cuda:
        return Finding("short", "torch", found, "GPUs are here and this torch sees none: install its build for CUDA")
    if driver and not torch.cuda.is_available():
        return Finding("short", "torch", found, "this CUDA needs a newer driver: update it, or take an older build")
    return Finding("fine", "torch", found)


def gpus() -> Finding:
    """The GPUs that are seen: each multiplies a small matrix."""
    if not (count := torch.cuda.device_count()):
        return Finding("note", "GPUs", "none is seen", "training runs on the CPU, for tests; docker run --gpus all")
    names, trouble = [], []
    for number in range(count):
        names.append(f"{torch.cuda.get_device_name(number)}")
        try:
            ones = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.bfloat16)
            if (ones @ ones).sum().item() != 64**3:
                trouble.append(f"GPU {number} computes wrong numbers")
            free, total = torch.cuda.mem_get_info(number)
            if total - free > BUSY * total:
                trouble.append(f"GPU {number}: {(total - free) / GIB:.0f} of {total / GIB:.0f} GiB are taken")
        except RuntimeError as error:
            trouble.append(f"GPU {number}: {str(error).partition(chr(10))[0]}")
    found = listed([f"{names.count(name)} x {name}" for name in dict.fromkeys(names)])
    if trouble:
        return Finding("short", "GPUs", f"{found}; {listed(trouble)}", "nvidia-smi shows who uses them; drain the node")
    return Finding("fine", "GPUs", found)


def nvlink() -> Finding:
    """How the GPUs of this node reach each other, as `nvidia-smi topo -m` says."""
    if torch.cuda.device_count() < 2:
        return Finding("fine", "NVLink", "fewer than two GPUs: none is needed")
    if (topology := answer("nvidia-smi", "topo", "-m")) is None:
        return Finding("note", "NVLink", "nvidia-smi topo -m does not answer", "mudit preflight measures the rates")
    slow = slow_pairs(topology)
    if not slow:
        return Finding("fine", "NVLink", "joins all GPUs")
    pairs = listed([f"{one}-{other} by {way}" for one, other, way in slow], 3)
    return Finding(
        "note", "NVLink", f"not between GPUs {pairs}", "gathers of shards are slower; mudit preflight measures"
    )


def slow_pairs(topology: str) -> list[tuple[int, int, str]]:
    """(GPU, GPU, way) of the pairs that no NVLink joins. topology: the text of `nvidia-smi topo -m`."""
    text = re.sub(r"\x1b\[[\d;]*m", "", topology)  # its head is underlined
    rows = {
        int(number): rest.split()
        for number, rest in re.findall(r"(?m)^\s*GPU(\d+)\s+(.*)$", text)
        if "X" in rest.split()
    }
    order = sorted(rows)
    return [
        (one, other, rows[one][order.index(other)])
        for one in order
        for other in order
        if one < other and not rows[one][order.index(other)].startswith("NV")
    ]


def adapters() -> Finding:
    """InfiniBand and RoCE: by them nodes speak, else over TCP, many times slower and without an error."""
    devices = sorted(INFINIBAND.glob("*"))
    if not devices:
        return Finding("note", "adapters", "no InfiniBand or RoCE is seen", "several nodes would speak over TCP")
    active = [device for device in devices if any("ACTIVE" in _text(port) for port in device.glob("ports/*/state"))]
    rates = sorted({_text(rate) for device in active for rate in device.glob("ports/*/rate")})
    found = f"{len(active)} of {len(devices)} active ({listed(rates) or 'no rate is told'})"
    if not list(VERBS.glob("uverbs*")):
        return Finding("short", "adapters", f"{found}, {VERBS} is not here", f"docker run --device {VERBS}")
    if ctypes.util.find_library("ibverbs") is None:
        return Finding("short", "adapters", f"{found}, no libibverbs", "apt-get install libibverbs1 ibverbs-providers")
    if not active:
        return Finding("short", "adapters", found, "ibstat says why; nodes would speak over TCP")
    return Finding("fine", "adapters", found)


def _text(path: Path) -> str:
    return path.read_text().strip()
