"""What a step needs, known before a job is queued: the real engine takes a step on fake tensors in a simulated world.

The process group answers at once and moves nothing, and fake tensors have shapes but no memory, so that one CPU can
stand for a rank among hundreds. Every operation of that rank is seen: bytes that are held, FLOPs, bytes received over
the network. (torch's FSDPMemTracker is no more public than what is used here, and knows one number of ranks at a time.)
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.attention.varlen  # has torch.ops.torch_attn made
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data.batch import Batch
from data.config import SYNTHETIC

from ..build.attention import simulated_kernel
from ..build.engine import build_alignment, build_engine, build_mup_table, build_objective, build_route
from ..config.resolve import resolve
from ..config.schema import TrainConfig
from ..ema import EMA
from ..input.encoding import Encoders
from ..monitor.mup_health import Health, WatchedParameter
from ..parallel.engine import Engine
from ..parallel.mesh import World
from ..parallel.precision import without_fp8
from ..step import Objective, micro_batch_losses

STATE, GRADIENTS, UPDATE = "state", "gradients", "update"
ACTIVATIONS, GATHERED, ACCUMULATED = "activations", "gather buffers", "accumulated gradients"
SHARDED = (GRADIENTS, UPDATE)  # kinds that shrink with the number of ranks, beside the state
MOST_ROWS = 4096  # the largest micro-batch that is considered
# DeepSpeed's defaults, as counts of numbers: gradients reduced at once, and weights that stage 3 keeps gathered.
ZERO_BUCKET, ZERO_GATHERED = 500_000_000, 1_000_000_000
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Traffic(NamedTuple):
    """Collectives of one kind: how many, and the bytes that a rank receives by them."""

    calls: int
    bytes: int


class Rank(FakeTensorMode):
    """Fake tensors, and an account of what is done with them.

    live: bytes that are held now, by kind. peaks: for each amount of bytes of the SHARDED kinds, what was held when the
    other kinds were largest. The peak for another number of ranks follows from them: there the sharded kinds have
    shrunk, and the others have not.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.kind = STATE
        self.live: Counter[str] = Counter()
        self._storages: dict[weakref.ref[torch.UntypedStorage], tuple[str, int]] = {}
        self._depth = 0
        self.reset()

    def reset(self) -> None:
        """Forget peaks, FLOPs and traffic; what is held stays in the account."""
        self.peaks: dict[int, Counter[str]] = {}
        self.flops: Counter[str] = Counter()
        self.traffic: dict[str, Traffic] = {}

    def __enter__(self) -> "Rank":
        # DTensor enters this mode again to work out the shapes of whole tensors, which exist on no rank.
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if _on_meta(kwargs.get("device"), tensors):
            # They have no memory anyway, and FSDP could not move a parameter that was faked already.
            return func(*args, **kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is NotImplemented or self._depth > 1:
            return out
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        for tensor in made:
            self.see(tensor.untyped_storage())
        packet = func._overloadpacket
        if packet._qualified_op_name.startswith(("c10d::", "_c10d_functional::")):
            self._count_collective(packet._qualified_op_name.partition("::")[2], tensors, made)
        elif packet in flop_registry or packet in _ATTENTION_FLOPS:
            count = _ATTENTION_FLOPS.get(packet) or flop_registry[packet]
            # In a backward pass autograd records only while a checkpointed block is computed again.
            phase = ("recompute" if torch.is_grad_enabled() else "backward") if _in_backward() else "forward"
            self.flops[phase] += count(*args, **kwargs, out_val=out)
        return out

    def see(self, storage: torch.UntypedStorage, kind: str | None = None) -> None:
        """Account for a storage that is new, or whose size or kind has changed."""
        key = weakref.ref(storage, self._drop)
        old_kind, old_size = self._storages.pop(key, (self.kind, 0))
        kind, size = kind or old_kind, storage.nbytes()
        self.live[old_kind] -= old_size
        self.live[kind] += size
        self._storages[key] = kind, size
        if size > old_size:
            sharded = sum(self.live[each] for each in SHARDED)
            if self.live.total() > self.peaks.get(sharded, Counter()).total():
                self.peaks[sharded] = Counter(self.live)

    def _drop(self, key: weakref.ref[torch.UntypedStorage]) -> None:
        kind, size = self._storages.pop(key)
        self.live[kind] -= size

    def relabel(self, old: str, new: str) -> None:
        """Whatever is held of kind `old` counts as kind `new` from now on."""
        self._storages = {k: (new if kind == old else kind, size) for k, (kind, size) in self._storages.items()}
        self.live[new] += self.live.pop(old, 0)

    def _count_collective(self, name: str, tensors: list[Tensor], made: list[FakeTensor]) -> None:
        if name == "_allgather_base_":
            whole, part = tensors
            self.see(whole.untyped_storage(), GATHERED)
        elif name == "_reduce_scatter_base_":
            part, whole = tensors
            self.see(whole.untyped_storage(), GATHERED)
            self.see(part.untyped_storage(), GRADIENTS)
        else:
            return  # all-reduces of a few numbers; those of replicas are added by their arithmetic
        calls, received = self.traffic.get(name, Traffic(0, 0))
        self.traffic[name] = Traffic(calls + 1, received + whole.nbytes - part.nbytes)


def _on_meta(device: Any, tensors: list[Tensor]) -> bool:
    if device is not None:
        return torch.device(device).type == "meta"
    return bool(tensors) and all(not isinstance(t, FakeTensor) and t.is_meta for t in tensors)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products of every query with every key: [B, H, N, K] and [B, H, L, K]."""
    batch, heads, n, dim = query.shape
    return 4 * batch * heads * n * key.shape[2] * dim


def _packed(query: Any, key: Any, value: Any, *rest: Any) -> int:
    """As _attention, of rows that are full: query [B N, H, K], key [B L, H, K], L keys in each."""
    _, _, _, most_keys, *_ = rest  # after where sequences begin, and the most queries
    return 4 * query.numel() * most_keys


_ATTENTION_FLOPS = {
    _ATTENTION: _attention,
    # Four products. True FLOPs leave out the scores, which the kernel computes a second time.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *rest, **kwargs: (
        2 * _attention(*rest, **kwargs)
    ),
    torch.ops.torch_attn._varlen_attn: lambda *inputs, **_: _packed(*inputs),
    torch.ops.torch_attn._varlen_attn_backward: lambda _, q, k, v, out, lse, *rest, **__: 2 * _packed(q, k, v, *rest),
}


class _FusedRMSNorm(torch.autograd.Function):
    """As a GPU's kernel does it, which keeps its input and one number per row. On the CPU the norm is taken apart into
    operations that keep three copies in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextmanager
def simulated_world(size: int, shard: int, rank: int = 0) -> Iterator[tuple[World, Rank]]:
    """One rank of a world that does not exist; every tensor that is made in this context has a shape and no memory."""
    account, resize, rms_norm = Rank(), torch.UntypedStorage.resize_, F.rms_norm
    flash = torch.backends.cuda.flash_sdp_enabled()

    def resized(storage: torch.UntypedStorage, nbytes: int) -> Any:
        result = resize(storage, nbytes)
        account.see(storage, GATHERED)  # by resizing, FSDP2 takes and frees the memory of gathered weights
        return result

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size // shard, shard), mesh_dim_names=("replicate", "shard"))
        group = dist.group.WORLD
        assert group is not None
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
        F.rms_norm = lambda x, shape, weight, eps=None: _FusedRMSNorm.apply(x, weight)
        torch.backends.cuda.enable_flash_sdp(True)  # a GPU's attention, also where a run on this CPU has turned it off
        with account:
            yield World(rank, size, torch.device("cpu"), group, group, mesh), account
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        F.rms_norm = rms_norm
        torch.backends.cuda.enable_flash_sdp(flash)
        dist.destroy_process_group()


@dataclass(frozen=True)
class Step:
    """What one optimizer step of a rank has shown. rows: samples per micro-batch. flops: of one micro-batch, by phase
    (forward, backward, recompute). peaks, traffic: see Rank."""

    rows: int
    peaks: dict[int, Counter[str]]
    flops: Counter[str]
    traffic: dict[str, Traffic]


@dataclass(frozen=True)
class Profile:
    """One of `shard` ranks, simulated: bytes of its state, its steps at two sizes of the micro-batch, and a step of two
    micro-batches of the smaller size, which keeps the first one's gradients (`accumulating`)."""

    shard: int
    parameters: int
    optimizer: int
    ema: int
    other: int
    steps: tuple[Step, Step]
    accumulating: Step


def profile(config: TrainConfig, world_size: int, rank: int = 0) -> Profile:
    """Simulate a rank: a second or two for small models, half a minute for 18B. Raises ConfigError where the world size
    does not fit the config."""
    config = simulated_config(config)
    resolved = resolve(config, world_size)
    table, objective = build_mup_table(config), build_objective(config, resolved)
    # An objective makes some tables once per process: they must not be made of fake tensors.
    objective.draw(torch.zeros(1, config.autoencoder.channels, 1, 1), torch.zeros(1, dtype=torch.int64))
    with simulated_world(world_size, resolved.shard, rank) as (world, account), simulated_kernel(config) as kernel:
        engine = build_engine(config, table, world, kernel)
        # On one GPU the model has a bf16 copy of the weights, which is no DTensor.
        copies = [p for p in engine.model.parameters() if not isinstance(p, DTensor) and p.dtype == torch.bfloat16]
        parameters = _nbytes([*engine.master_shards().values(), *copies])
        other = _nbytes(engine.model.buffers())
        optimizer = account.live[STATE] - parameters - other
        ema = EMA(engine.master_shards(), config.ema.decays, config.ema.warmup)
        averages = account.live[STATE] - optimizer - parameters - other
        health = Health({name: WatchedParameter(row.role, config.optim.eps) for name, row in table.rows.items()}, 1)

        def step(rows: int, micro_batches: int) -> Step:
            return _step(config, objective, account, world, engine, ema, health, rows, micro_batches)

        rows = resolved.micro_batch_rows
        small, large = (rows // 2, rows) if rows > 1 else (1, 2)
        accumulating = step(small, 2)  # comes first, because its first micro-batch makes what is made once and kept
        steps = step(small, 1), step(large, 1)
        return Profile(resolved.shard, parameters, optimizer, averages, other, steps, accumulating)


def simulated_config(config: TrainConfig) -> TrainConfig:
    """The config as a GPU would run it, in bf16 unless it says otherwise, on data that need no file. fp8 keeps for the
    backward pass what bf16 does."""
    precision = without_fp8(config.parallel.precision or "bf16")
    parallel = config.parallel.model_copy(update={"engine": "fsdp2", "precision": precision, "compile": False})
    data = type(config.data)(**{**vars(config.data), "shards": SYNTHETIC, "sources": ()})
    return config.model_copy(update={"parallel": parallel, "data": data})


def _step(
    config: TrainConfig,
    objective: Objective,
    account: Rank,
    world: World,
    engine: Engine,
    ema: EMA,
    health: Health,
    rows: int,
    micro_batches: int,
) -> Step:
    """A step as trainer.loop.train_step takes it, at a log step."""
    encoders = Encoders(config, world)
    alignment, route = build_alignment(config, encoders), build_route(config)
    account.reset()
    for number in range(micro_batches):
        account.kind = ACTIVATIONS
        account.flops.clear()
        batch = _batch(config, rows)
        encoded = encoders.encode(batch)
        features = alignment and alignment.features(batch)
        losses = micro_batch_losses(engine.model, objective, alignment, encoded, features, route)
        engine.backward(losses.total, last=number == micro_batches - 1)
        del batch, encoded, features, losses
        account.relabel(ACTIVATIONS, ACCUMULATED if number < micro_batches - 1 else GRADIENTS)
    account.kind, flops = UPDATE, Counter(account.flops)
    result = engine.step(config.optim.lr, health)
    ema.update(0, result.skipped)
    del result
    account.relabel(UPDATE, STATE)  # a few sums stay until the next step: so all steps begin with the same account
    return Step(rows, account.peaks, flops, account.traffic)


def _batch(config: TrainConfig, rows: int) -> Batch:
    """A micro-batch of the configured shape, all captions at their full length."""
    side, text = config.latent_size, config.text_encoder
    size = text.total_length, text.total_width
    captioned = config.label_classes is None
    return Batch.empty(
        torch.zeros(rows, dtype=torch.int64),
        latents=torch.empty(rows, config.autoencoder.channels, side, side),
        text_states=torch.empty(rows, *size, dtype=torch.bfloat16) if captioned else None,
        text_mask=torch.ones(rows, size[0], dtype=torch.bool) if captioned else None,
        read=rows,
        sizes=None,
    )


def _nbytes(tensors: Any) -> int:
    """Bytes of the tensors' storages: a shard may lie in a padded one."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
