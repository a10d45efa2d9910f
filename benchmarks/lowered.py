"""Kernels and memory traffic of a compiled block, counted from the code that inductor would give a GPU. None is needed.

    python -m pip install --no-deps --target .cache/triton triton==3.7.0   # torch for CPUs does not bring it
    PYTHONPATH=.cache/triton python -m benchmarks.lowered --config mmdit_2b_mup.yaml --device h200 \
        --output benchmarks/results/lowered_mmdit_2b.json

Inductor's own passes, partitioner, scheduler and code generator run on fake tensors of a GPU that is described to them;
the code is written and not run. So all figures are counts, none is a time, and they are the same on every machine.

One D is one read or write of all tokens that a block hands on, in the compute type. A Triton kernel's traffic is what
its scheduler node reads and writes outside itself: for each part of a buffer as many elements as its index reaches,
once where the kernel comes back to it (the caches are taken to hold it), no buffer more than whole, and what lives
inside the kernel not at all. GEMMs and attention have traffic of their own, which is not counted. Saved D is what the
forward pass makes and the backward pass reads; weights and what the block was given are not in it.
Captions have their full length. As in training, sizes of a batch are symbols to the compiler, and inductor's options
are those of training (trainer/parallel/compile.py); a size that is asked for is that of one batch.
"""

import argparse
import itertools
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx as compile_fx
from torch import Tensor, nn
from torch._dynamo.device_interface import get_interface_for_device
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.dependencies import Dep, MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv, optimization_hint
from torch.utils import _triton
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from benchmarks.machine import write
from models.attention import use_kernel
from trainer.build.meta import meta_inputs, meta_model
from trainer.config.load import load_config
from trainer.parallel.compile import inductor_options

# What inductor asks of a device, from the data sheet and the CUDA programming guide's table of compute capability 9.0.
DEVICES = {
    "h200": SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        gcnArchName="sm_90",
        multi_processor_count=132,
        total_memory=141 * 10**9,
        L2_cache_size=50 * 2**20,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
        shared_memory_per_multiprocessor=228 * 2**10,
    )
}
GEMMS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm.")


def pretend(device: Any) -> None:
    """Let this process take its GPU for `device`, from now to its end."""
    torch._C._ensureCUDADeviceGuardSet()
    capability = (device.major, device.minor)
    interface = get_interface_for_device("cuda")
    for owner, answers in (
        (
            torch.cuda,
            {
                "device_count": 1,
                "current_device": 0,
                "get_device_properties": device,
                "get_device_capability": capability,
                "get_device_name": device.name,
                "is_initialized": False,
                "_lazy_init": None,
            },
        ),
        (
            interface,
            {
                "is_available": True,
                "current_device": 0,
                "get_device_properties": device,
                "get_compute_capability": 10 * device.major + device.minor,
                "is_triton_capable": True,
                "raise_if_triton_unavailable": None,
                "is_bf16_supported": True,
            },
        ),
        (fake_tensor, {"init_gpu_context": None}),
        (_triton, {"triton_hash_with_backend": "", "triton_backend": None}),
    ):
        for name, answer in answers.items():
            setattr(owner, name, staticmethod(lambda *_, answer=answer, **__: answer))
    torch.version.cuda = "13.0"


def flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None) -> Tensor:
    """The kernel that torch takes on a GPU where there is no mask. Without a GPU it would take that of CPUs."""
    assert attn_mask is None
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def block_calls(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[nn.Module, tuple[Any, ...], Any]]:
    """The first block of each class: module, inputs, outputs."""
    calls: dict[str, tuple[nn.Module, tuple[Any, ...], Any]] = {}

    def note(block: nn.Module, given: tuple[Any, ...], result: Any) -> None:
        calls.setdefault(type(block).__name__, (block, given, result))

    for block in model.shard_units():  # pyright: ignore[reportCallIssue]
        block.register_forward_hook(note)
    model(*inputs)
    return calls


def joint_graphs(
    block: nn.Module, given: tuple[Any, ...], mode: FakeTensorMode
) -> tuple[GraphModule, GraphModule, int]:
    """Forward and backward graph as inductor's partitioner parts them, and the number of the block's outputs."""

    numbers = itertools.count()

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            made = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made.requires_grad_(tensor.is_floating_point())

    def varying(tensor: Tensor) -> Tensor:
        real = torch.empty(tensor.shape, dtype=tensor.dtype)  # never written, so it takes no memory
        made = mode.from_tensor(real, source=ConstantSource(f"input_{next(numbers)}"))
        return made.requires_grad_(tensor.is_floating_point())

    weights = {name: fake(weight) for name, weight in block.named_parameters()}
    flat, structure = tree_flatten(tree_map_only(Tensor, varying, given))
    tensors = [leaf for leaf in flat if isinstance(leaf, Tensor)]

    def call(*arguments: Tensor) -> tuple[Tensor, ...]:
        rest = iter(arguments[len(weights) :])
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in flat]
        named = dict(zip(weights, arguments, strict=False))
        result = torch.func.functional_call(block, named, tree_unflatten(leaves, structure))
        return tuple(leaf for leaf in tree_leaves(result) if leaf is not None)

    with mode, mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention):
        arguments = (*weights.values(), *tensors)
        outputs = len(call(*arguments))
        joint = aot_export_joint_simple(call, arguments, trace_joint=True, decompositions=select_decomp_table())
    assert isinstance(joint, GraphModule)
    with V.set_fake_mode(mode), mode:
        compile_fx._recursive_joint_graph_passes(joint)
        forward, backward = min_cut_rematerialization_partition(
            joint, None, num_fwd_outputs=outputs, static_lifetime_input_indices=[*range(len(weights))]
        )
    return forward, backward, outputs


def move_to_gpu(graph: GraphModule, mode: FakeTensorMode) -> None:
    """Let a graph that was traced on the CPU, because autograd has no other device here, be one of the GPU."""
    gpu = torch.device("cuda:0")

    def moved(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=gpu)

    for node in graph.graph.nodes:
        node.meta.pop("tensor_meta", None)
        if "val" in node.meta:
            node.meta["val"] = tree_map_only(Tensor, moved, node.meta["val"])
        node.args = tree_map_only(torch.device, lambda _: gpu, node.args)
        node.kwargs = tree_map_only(torch.device, lambda _: gpu, node.kwargs)
    graph.recompile()


def saved_bytes(forward: GraphModule, outputs: int) -> int:
    """What the forward graph makes for the backward graph, its own inputs left out."""
    [results] = forward.graph.output_node().args
    saved = {node for node in results[outputs:] if node.op != "placeholder"}  # pyright: ignore
    values = [node.meta["val"] for node in saved]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return sum(optimization_hint(tensor.numel()) * tensor.dtype.itemsize for tensor in tensors)


def at_hand(size: Any) -> int:
    """The value of a symbol, or of what is computed from symbols, in the batch that is lowered."""
    return int(size) if isinstance(size, int) or size.is_Integer else V.graph.sizevars.optimization_hint(size)


def traffic_bytes(node: BaseSchedulerNode) -> int:
    """What a Triton kernel reads and writes in memory, counted as the module's docstring says."""
    made = node.get_buffer_names()
    places: dict[tuple[bool, str], dict[Any, int]] = defaultdict(dict)  # (written, buffer) -> first element -> elements
    for written, dependencies in ((False, node.read_writes.reads), (True, node.read_writes.writes)):
        for dependency in dependencies:
            buffer = dependency.name
            if buffer not in V.graph.removed_buffers and (written or buffer not in made):
                first, elements = place(dependency)
                seen = places[written, buffer]
                seen[first] = max(elements, seen.get(first, 0))
    total = 0
    for (_, buffer), elements in places.items():
        reached = min(sum(elements.values()), at_hand(V.graph.get_numel(buffer)))
        total += reached * V.graph.get_dtype(buffer).itemsize
    return total


def place(dependency: Dep) -> tuple[Any, int]:
    """The first element that an index reaches, and how many it does."""
    if not isinstance(dependency, MemoryDep) or dependency.is_indirect():
        return 0, at_hand(V.graph.get_numel(dependency.name))
    index = dependency.index.expand(identity=True)
    index = index.subs({symbol: at_hand(symbol) for symbol in index.free_symbols - {*dependency.var_names}})
    sizes = {name: size for name, size in zip(dependency.var_names, dependency.size, strict=True) if index.has(name)}
    first = index.subs(dict.fromkeys(sizes, 0))
    strides: list[tuple[int, int]] = []
    for name, size in sizes.items():
        stride: Any = index.coeff(name)
        if not stride.is_Integer or stride == 0:  # divided or taken modulo somewhere
            return first, at_hand(dependency.get_numel())
        strides.append((int(stride), at_hand(size)))
    strides.sort()
    elements = strides[-1][1] if strides else 1
    for (stride, size), (next_stride, _) in pairwise(strides):
        # A concatenation counts along all of its result for each of its parts, and so on into the part's next row.
        elements *= min(size, next_stride // stride)
    return first, elements


def lowered(graph: GraphModule, mode: FakeTensorMode, is_backward: bool, options: dict[str, int]) -> dict[str, Any]:
    """Kernels of one graph under inductor's `options`, and the bytes that those of Triton move."""
    move_to_gpu(graph, mode)
    available = mock.patch.object(torch.cuda, "is_available", return_value=True)
    with V.set_fake_mode(mode), mode, available, inductor.patch(options):
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        lowering = GraphLowering(graph, inputs, shape_env=mode.shape_env, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering.codegen()
            return _kernels(lowering.scheduler.nodes)


def _kernels(nodes: list[BaseSchedulerNode]) -> dict[str, Any]:
    found: dict[str, Any] = {"triton_kernels": 0, "gemms": 0, "attention": [], "other": [], "triton_bytes": 0}
    for node in nodes:
        if node.is_extern():
            operation = str(getattr(node.node, "op_overload", None))
            if operation.startswith(GEMMS):
                found["gemms"] += 1
            elif operation != "None":
                found["attention" if "att" in operation else "other"].append(operation)
        elif not node.is_template() and type(node).__name__ != "NopKernelSchedulerNode":
            found["triton_kernels"] += 1
            found["triton_bytes"] += traffic_bytes(node)
    return found


def count(name: str, overrides: list[str], rows: int) -> dict[str, Any]:
    """Counts of each class of block of a config, forward and backward. Call `pretend` first."""
    config = load_config(name, overrides)
    use_kernel("varlen")
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", flash_attention):
        calls = block_calls(meta_model(config), meta_inputs(config, rows))
    blocks: dict[str, Any] = {}
    handed_on = [leaf for leaf in tree_leaves(next(iter(calls.values()))[2]) if isinstance(leaf, Tensor)]
    d_bytes = sum(leaf.numel() * leaf.dtype.itemsize for leaf in handed_on)
    for kind, (block, given, _) in calls.items():
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(duck_shape=False))
        forward, backward, outputs = joint_graphs(block, given, mode)
        figures: dict[str, Any] = {"saved_d": round(saved_bytes(forward, outputs) / d_bytes, 2)}
        for part, graph in (("forward", forward), ("backward", backward)):
            figures[part] = lowered(graph, mode, part == "backward", inductor_options(block))
            figures[part]["triton_d"] = round(figures[part].pop("triton_bytes") / d_bytes, 2)
        blocks[kind] = figures
    tokens = sum(leaf.shape[1] for leaf in handed_on)
    return {"config": name, "overrides": overrides, "rows": rows, "tokens": tokens, "blocks": blocks}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--device", choices=DEVICES, required=True, help="the GPU that is pretended")
    parser.add_argument("--rows", type=int, default=64, help="images (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if not _triton.has_triton_package():
        parser.error("triton is not importable; get it as `python -m benchmarks.lowered --help` says, then try again")
    pretend(DEVICES[arguments.device])
    counts = count(arguments.config, arguments.overrides, arguments.rows)
    write(arguments.output, {"pretended": arguments.device, **counts})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
