"""Ways to do one thing in a training step, beside each other on the device at hand; docs/performance.md draws on it.

    python -m benchmarks.choices --output benchmarks/results/choices_cpu.json

Attention: by kernel (models/attention.py), with padded text and without. Padding: a block at the longest text against
one at the mean length. Modulation: a linear layer in every block against one for all blocks. Averages and AdamW: by
kernel.
Milliseconds, medians of interleaved runs; on a CPU those of this process on one core.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import write
from benchmarks.train_step import clock
from models.attention import Kernel, attend, kernel_restored, use_kernel, visible
from models.configs import MMDiTConfig
from models.mmdit import Block
from trainer.ema import EMA

KERNELS: tuple[Kernel, ...] = ("sdpa", "varlen", "cudnn", "efficient", "math")
Works = dict[str, Callable[[], Any]]


def interleaved(works: Works, device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of each; an attention kernel that the device does not have is left out."""
    seconds: dict[str, list[float]] = {}
    for name, work in works.items():
        with suppress(RuntimeError):
            work()
            seconds[name] = []
    for _ in range(repeats):
        for name in seconds:
            began = clock(device)
            works[name]()
            seconds[name].append(clock(device) - began)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def attention(
    device: torch.device, dtype: torch.dtype, rows: int, heads: int, kernels: Sequence[Kernel] = KERNELS
) -> Works:
    """Forward and backward pass of 256 + 128 tokens by each kernel, without padding and with a third of the text."""
    q, k, v = (torch.randn(rows, 384, heads, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    text = (torch.arange(128, device=device) < 88).expand(rows, -1)
    gradient = torch.randn(rows, 384, heads * 64, device=device, dtype=dtype)

    def work(kernel: Kernel, padded: bool) -> Callable[[], Any]:
        with kernel_restored():
            use_kernel(kernel)
            seen = visible(text, before=256) if padded else None

        def run() -> None:
            with kernel_restored():
                use_kernel(kernel)
                torch.autograd.grad(attend(q, k, v, seen), (q, k, v), gradient)

        return run

    return {kernel + "_padded" * padded: work(kernel, padded) for kernel in kernels for padded in (False, True)}


def attention_3(device: torch.device, dtype: torch.dtype, rows: int, heads: int, repeats: int) -> dict[str, float]:
    """Milliseconds of FlashAttention 3 where it is installed. Alone, because it takes the place of FlashAttention 2."""
    with suppress(ImportError), kernel_restored():
        use_kernel("flash3")
        return interleaved(attention(device, dtype, rows, heads, ["flash3"]), device, repeats)
    return {}


def padding(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> Works:
    """A two-stream block of 256 image tokens with 256 text tokens, 128 (their mean, were they uniform), and 64."""
    block = Block(MMDiTConfig(width=width)).to(device, dtype)

    def work(length: int) -> Callable[[], Any]:
        x, y = (torch.randn(rows, n, width, device=device, dtype=dtype, requires_grad=True) for n in (256, length))
        c = torch.randn(rows, width, device=device, dtype=dtype)

        def run() -> None:
            outputs = block(x, y, c, None)
            torch.autograd.grad([out.sum() for out in outputs], [x, y, *block.parameters()])

        return run

    return {f"{length}_text_tokens": work(length) for length in (256, 128, 64)}


def modulation(device: torch.device, dtype: torch.dtype, rows: int, width: int, blocks: int = 19) -> Works:
    """Two streams of `blocks` blocks: [rows, D] -> 6 x [rows, D] each, forward and backward pass."""
    each = nn.ModuleList([nn.Linear(width, 6 * width, device=device, dtype=dtype) for _ in range(2 * blocks)])
    whole = nn.Linear(width, 6 * width * 2 * blocks, device=device, dtype=dtype)
    c = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, 6 * width * 2 * blocks, device=device, dtype=dtype)
    parts = gradient.chunk(2 * blocks, dim=1)
    return {
        "in_every_block": lambda: torch.autograd.grad([one(c) for one in each], [c, *each.parameters()], parts),
        "one_for_all": lambda: torch.autograd.grad(whole(c), [c, *whole.parameters()], gradient),
    }


def tensors(device: torch.device, width: int, blocks: int) -> list[Tensor]:
    """fp32 numbers of the shapes of an MMDiT's blocks."""
    with torch.device("meta"):
        shapes = [p.shape for p in Block(MMDiTConfig(width=width)).parameters()]
    return [torch.randn(shape, device=device) for _ in range(blocks) for shape in shapes]


def averages(device: torch.device, width: int, blocks: int) -> Works:
    """An update of the EMA that the device can skip: by a flag of its own, or by a rate that lies on it."""
    live, average = (tensors(device, width, blocks) for _ in range(2))
    ema = EMA({str(number): tensor for number, tensor in enumerate(live)}, (0.9999,), warmup=False)
    rate, taken = torch.tensor(1e-4, device=device), torch.zeros((), device=device)

    def three_passes() -> None:
        difference = torch._foreach_sub(live, average)
        torch._foreach_mul_(difference, rate)
        torch._foreach_add_(average, difference)

    def by_tensor() -> None:
        for one, other in zip(average, live, strict=True):
            one.lerp_(other, rate)

    return {
        "fused_sgd": lambda: ema.update(0, taken),
        "foreach_lerp": lambda: torch._foreach_lerp_(average, live, [rate] * len(live)),
        "foreach_sub_mul_add": three_passes,
        "lerp_by_tensor": by_tensor,
    }


def adamw(device: torch.device, width: int, blocks: int) -> Works:
    def step(**kernel: Any) -> Callable[[], Any]:
        parameters = [nn.Parameter(tensor) for tensor in tensors(device, width, blocks)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.AdamW(parameters, lr=1e-4, **kernel).step

    return {"fused": step(fused=True), "foreach": step(foreach=True), "by_tensor": step(foreach=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes: does it all work?")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if not cuda:
        torch.set_num_threads(1)
    rows, width, blocks = (64, 1728, 4) if cuda else (8, 384, 6)
    if arguments.dry_run:
        rows, width, blocks = 1, 64, 1
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        works = {
            "attention": attention(device, dtype, rows, width // 64),
            "padding": padding(device, dtype, rows, width),
            "modulation": modulation(device, dtype, rows, width),
        }
        found[name] = {what: interleaved(each, device, arguments.repeats) for what, each in works.items()}
        found[name]["attention"] |= attention_3(device, dtype, rows, width // 64, arguments.repeats)
    works = {"averages": averages(device, width, blocks), "adamw": adamw(device, width, blocks)}
    found["update"] = {what: interleaved(each, device, arguments.repeats) for what, each in works.items()}
    write(arguments.output, {"rows": rows, "width": width, "blocks": blocks, "milliseconds": found})


if __name__ == "__main__":
    main()
