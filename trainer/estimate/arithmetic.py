"""What a GPU does in a step, operation by operation, and how long a card takes for it: a roofline.

The model runs forward and backward on the meta device, where tensors have shapes and no memory, and every operation is
noted: matrix products by shape, attention by kernel, all else by the bytes that it reads and writes. Nothing here was
measured on a GPU: it is a model.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .cluster import Card

# Rows, columns and speed of the tiles that a matrix product is cut into (cuBLAS's on Hopper; the speeds are assumed).
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.98), (128, 128, 0.92), (64, 256, 0.92))
# The last, incomplete wave of tiles is shared by all multiprocessors (stream-K): at most this much is lost by it.
_TAIL = 1.10
# Of the data sheet's memory rate: a copy kernel reaches 0.9 (H100: 3.02 of 3.35 TB/s), fused kernels 0.9 of that.
STREAMED = 0.81
LAUNCH_S = 2e-6  # between two kernels, and a kernel's own start
# torch.compile leaves 77 of the 117 reads and writes of a token's features that a block of the 2B config makes in eager
# mode: 77 in the Triton code that inductor writes (benchmarks/lowered.py), 117 by this module.
COMPILED = 77 / 117
# Products of an attention's backward pass over those of its forward pass: the scores are computed once more.
_BACKWARD_PRODUCTS = 2.5
# Bytes a number that is rounded to fp8 costs: read in bf16 and written. Its scale is that of its row, which is found as
# it is read, or that of its column, for which all are read once before (assumed; the compiler may do better).
_BY_ROWS, _BY_COLUMNS = 3, 5
# With 128 features a head or more, kernels reach more (FlashAttention-2 on H100: 0.35 of the peak, arXiv 2407.08608).
_WIDE_HEAD = 1.25

_UNREAD = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "alias", "lift_fresh")


class Product(NamedTuple):
    """A matrix product [m, k] x [k, n] of numbers in bf16 or fp8, into bf16."""

    m: int
    n: int
    k: int
    fp8: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    def seconds(self, card: Card) -> float:
        """The best tiles, in waves over the multiprocessors; or the memory's time."""
        tflops, processors = card.fp8_tflops if self.fp8 else card.matmul_tflops, card.multiprocessors
        assert tflops is not None, "step_time refuses such a card"
        rate = tflops * 1e12
        best = math.inf
        for rows, columns, speed in _TILES:
            tiles = math.ceil(self.m / rows) * math.ceil(self.n / columns)
            waves = math.ceil(tiles / processors) * processors
            best = min(best, min(waves, _TAIL * tiles) * 2 * rows * columns * self.k / (rate * speed))
        moved = (1 if self.fp8 else 2) * (self.m * self.k + self.k * self.n) + 2 * self.m * self.n
        return max(best, moved / (STREAMED * card.memory_gb_s * 1e9)) + LAUNCH_S


class Attention(NamedTuple):
    """A fused attention. flops: of its products, the scores of a backward pass computed once more included."""

    kernel: str
    backward: bool
    head_dim: int
    flops: int

    def seconds(self, card: Card) -> float:
        rates = card.attention_tflops.get(self.kernel, card.attention_tflops["flash"])
        rate = rates[self.backward] * (_WIDE_HEAD if self.head_dim >= 128 else 1.0)
        return self.flops / (rate * 1e12) + LAUNCH_S


class Elementwise(NamedTuple):
    """A kernel that the memory's rate limits. bytes: read and written."""

    bytes: int

    def seconds(self, card: Card) -> float:
        return self.bytes / (STREAMED * card.memory_gb_s * 1e9) + LAUNCH_S


Operation = Product | Attention | Elementwise


class Passes(NamedTuple):
    """The operations of a micro-batch and how often each is made: in the forward pass by the blocks and by the rest of
    the model, and in the backward pass."""

    blocks: Counter[Operation]
    rest: Counter[Operation]
    backward: Counter[Operation]

    def recomputed(self, mode: str) -> Counter[Operation]:
        """What activation checkpointing computes again: the blocks, without what `selective` keeps."""
        if mode == "none":
            return Counter()
        return Counter({op: n for op, n in self.blocks.items() if mode == "full" or isinstance(op, Elementwise)})


class PassTime(NamedTuple):
    """Seconds of a micro-batch by what limits them."""

    products: float
    attention: float
    elementwise: float


def count_passes(model: Any, inputs: Sequence[Any], attention: str = "auto", fp8: Sequence[Any] = ()) -> Passes:
    """The operations of `model(*inputs)`, a backbone on the meta device, and of its backward pass. attention:
    parallel.attention; whether rows are packed is up to the kernel in use (models.attention). fp8: the layers
    (models.layers.TokenLinear) that multiply in it."""
    recorder = _Recorder("flash3" if attention == "flash3" else "flash")
    for layer in fp8:
        layer.multiply = partial(_MultiplyFP8.apply, recorder)
    hooks = []
    for block in model.shard_units():
        hooks.append(block.register_forward_pre_hook(lambda *_: recorder.enter("blocks")))
        hooks.append(block.register_forward_hook(lambda *_: recorder.enter("rest")))
    with recorder, _Fused(recorder, attention if attention in ("efficient", "cudnn") else None):
        prediction, features = model(*inputs)
        loss = prediction.float().square().sum() + (0 if features is None else features.float().square().sum())
        recorder.enter("backward")
        loss.backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return Passes(*(recorder.counts[phase] for phase in ("blocks", "rest", "backward")))


def pass_time(passes: Passes, card: Card, mode: str, compiled: bool) -> PassTime:
    """Seconds of a micro-batch on a card. mode: parallel.activation_checkpointing. compiled: parallel.compile."""
    seconds = dict.fromkeys((Product, Attention, Elementwise), 0.0)
    for counts in (passes.blocks, passes.rest, passes.backward, passes.recomputed(mode)):
        fused = COMPILED if compiled and counts is not passes.rest else 1.0  # blocks are compiled, one at a time
        for op, times in counts.items():
            seconds[type(op)] += times * op.seconds(card) * (fused if isinstance(op, Elementwise) else 1.0)
    return PassTime(*seconds.values())


def products_flops(counts: Counter[Operation]) -> int:
    """FLOPs of matrix products and attention."""
    return sum(times * op.flops for op, times in counts.items() if not isinstance(op, Elementwise))


def parameter_bytes(shard: int, micro_batches: int, reshard: bool, averages: int) -> float:
    """Bytes that a step of FSDP2 reads and writes for each parameter of the whole model beside the passes, on a GPU
    that holds 1 / shard of them: casts and copies of gathering and reducing, accumulation, and the update.

    Where each rank has a whole copy (shard 1) it casts each weight into a temporary and copies it; else it casts its
    shard, and copies what it has gathered out of one buffer and the gradients into one.
    """
    gather = 10 if shard == 1 else 6 + 6 / shard
    reduce = 14 if shard == 1 else 6 + 12 / shard
    rounds = micro_batches if reshard else 1
    accumulate = 12 * (micro_batches - 1) / (shard if reshard else 1)
    return rounds * ((2 if reshard else 1) * gather + reduce) + accumulate + _update_bytes(averages) / shard


def bytes_alone(micro_batches: int, averages: int) -> float:
    """As parameter_bytes, of a GPU alone (trainer.parallel.single): gradients are cast to fp32 and added up, and the
    updated weights cast to bf16."""
    return 6 + 18 * (micro_batches - 1) + _update_bytes(averages) + 6


def _update_bytes(averages: int) -> int:
    return 4 + 8 + 28 + 12 * averages  # norm, clipping, AdamW, averages


class _Recorder(TorchDispatchMode):
    """Notes every operation under the phase that was entered last. packed: the kernel of attention over packed rows."""

    def __init__(self, packed: str) -> None:
        super().__init__()
        self._packed = packed
        self.counts: dict[str, Counter[Operation]] = {}
        self.enter("rest")

    def enter(self, phase: str) -> None:
        self.phase = self.counts.setdefault(phase, Counter())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in ("_varlen_attn", "_varlen_attn_backward"):
            backward = name == "_varlen_attn_backward"
            query, most_keys = args[backward], args[9 if backward else 6]  # of full rows: most_keys in each
            self.attend(self._packed, backward, query, most_keys)
        elif name in ("mm", "addmm"):
            left, right = args[-2:]
            self.phase[Product(left.shape[0], right.shape[1], left.shape[1])] += 1
        elif name == "convolution":
            places, features = out.numel() // out.shape[1], out.shape[1]
            self.phase[Product(places, features, args[1][0].numel())] += 1
        elif name == "convolution_backward":
            gradient, _, weight = args[:3]
            places, features, neighbours = gradient.numel() // len(weight), len(weight), weight[0].numel()
            self.phase[Product(places, neighbours, features)] += 1
            self.phase[Product(features, neighbours, places)] += 1
        elif name not in _UNREAD and not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
            if moved := sum(_bytes(each) for each in tensors):
                self.phase[Elementwise(moved)] += 1
        return out

    def attend(self, kernel: str, backward: bool, query: Tensor, keys: int) -> None:
        """Note attention of queries [..., K] to `keys` keys each."""
        flops = 4 * query.numel() * keys
        flops = round(_BACKWARD_PRODUCTS * flops) if backward else flops
        self.phase[Attention(kernel, backward, query.shape[-1], flops)] += 1

    def rounded(self, rows: int, columns: int) -> None:
        """Note numbers that are rounded to fp8: so many with the scales of their rows, or of their columns."""
        self.phase[Elementwise(_BY_ROWS * rows + _BY_COLUMNS * columns)] += 1


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor: an expanded one is read once."""
    return math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride) * tensor.itemsize


class _Fused(TorchFunctionMode):
    """Attention and RMSNorm as a GPU runs them, each one kernel. The meta device takes both apart. kernel: of attention
    that is not packed, None for torch's choice."""

    def __init__(self, recorder: _Recorder, kernel: str | None) -> None:
        super().__init__()
        self._recorder, self._kernel = recorder, kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            # torch's flash kernel refuses a mask ("Flash Attention does not support non-null attn_mask").
            kernel = self._kernel or ("flash" if mask is None else "efficient")
            return _Attend.apply(self._recorder, kernel, *args[:3])
        if func is F.rms_norm:
            return _Normalise.apply(self._recorder, args[0], kwargs["weight"])  # as nn.RMSNorm passes it
        return func(*args, **kwargs)


class _Attend(torch.autograd.Function):
    """q [B, H, N, K], k and v [B, H, L, K] -> [B, H, N, K]."""

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.recorder, ctx.kernel = recorder, kernel
        recorder.attend(kernel, False, q, k.shape[-2])
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        ctx.recorder.attend(ctx.kernel, True, q, k.shape[-2])
        return None, None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _MultiplyFP8(torch.autograd.Function):
    """input [..., K], weight [N, K], bias [N] or None -> [..., N], in fp8 as trainer.parallel.float8 does it."""

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (n, k), tokens = weight.shape, input.numel() // input.shape[-1]
        ctx.save_for_backward(input, weight, *([] if bias is None else [bias]))
        ctx.recorder = recorder
        recorder.rounded(input.numel() + weight.numel(), 0)
        recorder.phase[Product(tokens, n, k, fp8=True)] += 1
        out = input.new_empty(*input.shape[:-1], n)
        if bias is not None:
            recorder.phase[Elementwise(2 * _bytes(out))] += 1
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (input, weight, *bias), recorder = ctx.saved_tensors, ctx.recorder
        (n, k), tokens = weight.shape, input.numel() // input.shape[-1]
        recorder.rounded(tokens * n, weight.numel() + tokens * n + input.numel())
        recorder.phase[Product(tokens, k, n, fp8=True)] += 1
        recorder.phase[Product(n, k, tokens, fp8=True)] += 1
        if bias:
            recorder.phase[Elementwise(_bytes(gradients[0]))] += 1
        of_bias = torch.empty_like(bias[0]) if bias else None
        return None, torch.empty_like(input), torch.empty_like(weight), of_bias


class _Normalise(torch.autograd.Function):
    """x [..., K], weight [K] -> [..., K]."""

    @staticmethod
    def forward(ctx: Any, recorder: _Recorder, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recorder = recorder
        recorder.phase[Elementwise(2 * _bytes(x))] += 1
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.recorder.phase[Elementwise(3 * _bytes(x))] += 1
        return None, torch.empty_like(x), torch.empty_like(weight)
