"""Matrix products in fp8, forward and backward, by torchao's recipe "rowwise".

Inputs, weights and gradients are rounded to E4M3 as they are multiplied, each row (or column) at a scale of its own, a
power of two that is found anew every time; sums are kept in fp32 and come out in bf16. So nothing is saved or sent in
fp8, and there is no state: weights, moments and checkpoints are those of bf16. On a CPU the rounding is emulated.
"""

import dataclasses
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor

MULTIPLE = 16
"""Of which both sizes of a weight must be, for the hardware. Any number of tokens will do: torchao pads them."""
_TOLERANCE = 0.06  # of a product of random numbers; what is right differs by 0.04
_LEAST = (8, 9)  # compute capability of the first GPUs with fp8 products

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def fp8_multiply(device: torch.device) -> Multiply:
    """(input [B, N, K], weight [M, K], bias [M]) in bf16 -> [B, N, M] in bf16, multiplied in fp8. Raises ImportError
    without torchao."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    # Compiled, a normalised key of the backward pass must be that of the forward pass to the last bit, or attention's
    # gradients become NaN (https://github.com/pytorch/pytorch/issues/150859).
    inductor.emulate_precision_casts = True
    recipe = Float8LinearConfig.from_recipe_name("rowwise")
    settings = dataclasses.replace(recipe, pad_inner_dim=True, emulate=device.type == "cpu")
    # Of a layer that is converted we take its settings alone: torchao would exchange our layers for its own, and knows
    # no bias of query and value. It also mends the compiler, for which it asks that something is converted.
    layer = nn.Linear(MULTIPLE, MULTIPLE, bias=False, device="meta")
    sums = convert_to_float8_training(layer, config=settings).linear_mm_config

    def multiply(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() < 3:
            raise TypeError(f"fp8 is for tokens [B, N, K], got {list(input.shape)}: modulation is no TokenLinear")
        output = matmul_with_hp_or_float8_args.apply(input, weight.t(), sums, settings)  # [B, N, M]
        return output if bias is None else output + bias

    return multiply


@cache
def fp8_problem(device: torch.device) -> str | None:
    """Why there are no fp8 products on this device; None where there are. A GPU computes some, to be sure."""
    try:
        multiply = fp8_multiply(device)
    except (ImportError, AttributeError, TypeError) as error:
        return f"torchao is missing or another one than 0.18 ({error}): pip install -e '.[fp8]'"
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return f"{name}: it is written for NVIDIA's GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST:
        has, needs = (".".join(map(str, version)) for version in (capability, _LEAST))
        return f"{name} has compute capability {has}, and fp8 needs {needs} (Ada, Hopper, Blackwell)"
    try:
        error = _largest_error(multiply, device)
    except Exception as error:  # whatever a kernel raises: it is the answer
        return f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if not error <= _TOLERANCE:  # NaN is not
        return f"{name} multiplies wrongly: products differ by {error:.2g} of their norm, {_TOLERANCE} allowed"
    return None


def _largest_error(multiply: Multiply, device: torch.device) -> float:
    """Of an output and both gradients, against fp32: the norm of the difference over the norm."""
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((3, 19, 64), (128, 64), (3, 19, 128))  # 57 tokens: not a multiple of 16
    )
    results: list[list[Tensor]] = []
    for product, dtype in ((multiply, torch.bfloat16), (F.linear, torch.float32)):
        inputs = [each.to(dtype, copy=True).requires_grad_() for each in (x, weight)]
        output = product(inputs[0], inputs[1], None)
        results.append([output.detach(), *torch.autograd.grad(output, inputs, gradient.to(dtype))])
    pairs = zip(*results, strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
