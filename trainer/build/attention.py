"""The attention kernel of a run: what its config asks for, as far as the devices can."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from models.attention import PACKED, Kernel, kernel_restored, use_kernel
from models.attention_probe import Choice, choose_kernel

from ..collectives import together
from ..config.schema import TrainConfig
from ..parallel.mesh import World
from ..parallel.precision import DTYPES, precision_of

# Flash kernels compute in 16 bits alone, and torch's memory-efficient one in no more than 32.
_BY_PRECISION: dict[str, Kernel] = {"bf16": "varlen", "fp8": "varlen", "fp32": "efficient", "fp64": "math"}

_choose = cache(choose_kernel)  # once for each shape, however many models a process builds


def attention_choice(config: TrainConfig, world: World) -> Choice:
    """The kernel for this model, the same on all ranks; on GPUs it has been tried on each. A CPU takes torch's own
    choice: a config that was written for a GPU must also serve where it is sampled or tested without one."""
    asked, device = config.parallel.attention, world.device
    precision, head_dim = precision_of(config.parallel.precision, device), config.model.head_dim
    if device.type != "cuda":
        return Choice("sdpa", {} if asked == "auto" else {asked: "it needs a GPU"})
    wanted = _BY_PRECISION[precision] if asked == "auto" else asked
    heads = config.model.width // head_dim
    choices = together(lambda: _choose(wanted, device, DTYPES[precision], heads, head_dim), world.control)
    return max(choices, key=lambda choice: len(choice.rejected))


@contextmanager
def simulated_kernel(config: TrainConfig) -> Iterator[Kernel]:
    """Take the kernel that stands for a GPU's on tensors without memory; after the block it is as before."""
    asked = config.parallel.attention
    wanted = _BY_PRECISION[config.parallel.precision or "bf16"] if asked == "auto" else asked
    with kernel_restored():
        kernel: Kernel = "varlen" if wanted in PACKED else "sdpa"
        use_kernel(kernel)
        yield kernel


def describe(choice: Choice) -> list[str]:
    """What the user is told at the start."""
    rejected = [f"warning: attention kernel {kernel} is not used: {why}" for kernel, why in choice.rejected.items()]
    return [*rejected, f"attention kernel: {choice.kernel}"]
