"""The zero engine: DeepSpeed's ZeRO stage 1, 2 and 3, prepared by accelerate, over torch's AdamW by name.

Stage 1 shards the optimizer's state, 2 the gradients as well, 3 the weights as well. DeepSpeed flattens each
optimizer group, and a rank owns a range of it: its master weights (fp32) are pieces of parameters, cut anywhere.

DeepSpeed reads the gradients' norm back in every step (a host sync, unlike fsdp2) and leaves out a step whose norm
is not finite.
"""

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ..errors import CheckpointError
from .dcp import load_tensors
from .engine import StepResult, Watch, exchange
from .mesh import World

Stage = Literal[1, 2, 3]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_TAG = "zero"  # DeepSpeed's folder inside a checkpoint


class Piece(NamedTuple):
    """This rank's part of one parameter: `numel` numbers (0: none) from `start` of the flattened parameter, which
    lie at `offset` of flat master tensor `flat`."""

    flat: int
    offset: int
    start: int
    numel: int


class ZeroEngine:
    """See engine.Engine. One engine at a time lives in a process: accelerate's state is global.

    model: on the meta device. initial: parameter name -> its whole initial value (fp32), called for one name at a
    time. groups: optimizer groups for the named parameters.

    Memory while it is built: the weights in the compute type (stage 3: this rank's part and one module), then the
    masters and one whole parameter in fp32.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        precision: Literal["bf16", "fp32"],
        stage: Stage,
        fill_buffers: Callable[[], None],
        initial: Callable[[str], Tensor],
        groups: Callable[[dict[str, Tensor]], list[dict[str, Any]]],
        betas: tuple[float, float],
        clip_norm: float | None,
    ) -> None:
        self._world, self._stage, self._clip_norm = world, stage, clip_norm
        deepspeed = _import_deepspeed()
        # The accelerator comes first: it hands the process group that we have to DeepSpeed.
        accelerator = _accelerator(_settings(stage, precision, clip_norm), precision, world)
        assert accelerator.distributed_type == DistributedType.DEEPSPEED, accelerator.distributed_type
        assert (accelerator.num_processes, accelerator.is_main_process) == (world.size, world.rank == 0)

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for module in reversed(list(model.modules())):  # children before their parents
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
            module.to_empty(device=world.device, recurse=False)
            if stage == 3:
                deepspeed.zero.Init(module=module, dtype=dtype)
        fill_buffers()
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        optimizer = torch.optim.AdamW(groups(self._parameters), betas=betas, fused=True)
        group_count = len(optimizer.param_groups)
        with _quiet():
            self._engine, _ = accelerator.prepare(model, optimizer)
        self.model: nn.Module = self._engine
        self._zero: Any = self._engine.optimizer  # the wrapper that shards
        self._adam = optimizer
        self._check_prepared(stage, group_count)

        self._pieces, self._group_of = self._layout()
        # Masters were made from the compute type: written anew, the same numbers as fsdp2's. The state that AdamW
        # makes at its first step is made now, so that a checkpoint can be read into it.
        with torch.no_grad():
            for flat in self._flats:
                flat.zero_()
                moments = {moment: torch.zeros_like(flat) for moment in _MOMENTS}
                optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
            for name, shard in self.master_shards().items():
                shard.copy_(self.cut(name, initial(name)))
        self._follow()

    def _check_prepared(self, stage: Stage, group_count: int) -> None:
        """What DeepSpeed and accelerate change without a word."""
        engine = self._engine
        assert self._zero.optimizer is self._adam, "DeepSpeed has replaced the optimizer"
        assert len(self._adam.param_groups) == group_count, "DeepSpeed has dropped optimizer groups"
        assert engine.zero_optimization_stage() == stage
        assert engine.dp_world_size == self._world.size
        assert engine.gradient_accumulation_steps() == 1
        assert engine.lr_scheduler is None
        clip_norm = self._clip_norm or 0.0
        assert engine.gradient_clipping() == self._zero.clip_grad == clip_norm, "the clipping norm is not the config's"
        assert engine.communication_data_type == torch.float32
        assert all(flat.dtype == torch.float32 for flat in self._flats)

    @property
    def _flats(self) -> list[Tensor]:
        """This rank's flat master tensors: one for each optimizer group, in stage 3 one or several."""
        for attribute in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._zero, attribute):  # stage 1 and 2; stage 1 in bf16
                return getattr(self._zero, attribute)
        return self._zero.fp32_partitioned_groups_flat

    def _layout(self) -> tuple[dict[str, Piece], dict[str, int]]:
        """(this rank's piece, the number of the optimizer group) of every parameter, by name, in the model's order."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        zero = self._zero
        sharded = self._stage == 3
        members = zero.fp16_groups if sharded else getattr(zero, "bit16_groups", None) or zero.bf16_groups
        pieces: dict[str, Piece] = {}
        group_of: dict[str, int] = {}
        for flat, parameters in enumerate(members):
            for parameter in parameters:
                name = names[id(parameter)]
                if sharded:
                    _, offset, part = zero.grad_position[zero.get_param_id(parameter)]
                    start = min(self._world.rank * part, parameter.ds_numel)
                    # The last part is padded.
                    pieces[name] = Piece(flat, offset, start, min(part, parameter.ds_numel - start))
                    group_of[name] = zero.sub_group_to_group_id[flat]
                    continue
                mapping = parameter._hp_mapping
                pieces[name] = Piece(flat, 0, 0, 0)
                if mapping is not None:
                    inside, of = mapping.hp_fragment_address, mapping.lp_fragment_address
                    pieces[name] = Piece(flat, inside.start, of.start, of.numel)
                group_of[name] = flat
                assert self._adam.param_groups[flat]["params"] == [self._flats[flat]], "groups have changed places"
        return {name: pieces[name] for name in self._parameters}, group_of

    def backward(self, loss: Tensor, last: bool) -> None:
        # Set in every micro-batch: DeepSpeed's own count of them is off. The loss carries W / B already.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float, watch: Watch | None = None, max_norm: Tensor | None = None) -> StepResult:
        assert max_norm is None, "optim.spike_threshold is refused with this engine"
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if watch is not None:
            watch.before(self.master_shards(), self._clipped_gradients())
        self._engine.step()
        if watch is not None:
            watch.after(self.master_shards())
        device = self._world.device
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        clipped = torch.zeros_like(norm) if self._clip_norm is None else (norm > self._clip_norm).float()
        skipped = torch.zeros_like(norm) if self._engine.was_step_applied() else torch.ones_like(norm)
        return StepResult(norm, skipped, clipped)

    def _clipped_gradients(self) -> dict[str, Tensor]:
        """Copies of this rank's gradients, clipped as DeepSpeed will clip them."""
        gradients: dict[str, Tensor] = {}
        for name, piece in self._pieces.items():
            parameter = self._parameters[name]
            if piece.numel == 0:
                gradients[name] = torch.zeros(0, device=self._world.device)
            elif self._stage == 3:
                gradients[name] = self._zero.get_local_fp32_grad_for_param(parameter)[: piece.numel]
            else:
                fragment = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
                whole = fragment.numel() > piece.numel  # stage 1 in bf16 keeps whole gradients
                gradients[name] = fragment[piece.start : piece.start + piece.numel] if whole else fragment
        if self._clip_norm is None:
            return gradients
        square = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()
        dist.all_reduce(square)
        scale = (self._clip_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        return {name: gradient * scale for name, gradient in gradients.items()}

    def optimizer_settings(self) -> dict[str, tuple[float, float, float]]:
        settings = [(group["lr"], group["weight_decay"], group["eps"]) for group in self._adam.param_groups]
        return {name: settings[self._group_of[name]] for name in self._parameters}

    def master_shards(self) -> dict[str, Tensor]:
        return {name: state["model"] for name, state in self.state().items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        kept: dict[str, dict[str, Tensor]] = {}
        flats = [{"model": flat.detach(), **self._adam.state.get(flat, {})} for flat in self._flats]
        for name, (flat, offset, _, numel) in self._pieces.items():
            kept[name] = {
                key: tensor if tensor.ndim == 0 else tensor[offset : offset + numel]
                for key, tensor in flats[flat].items()
            }
        return kept

    def cut(self, name: str, full: Tensor) -> Tensor:
        _, _, start, numel = self._pieces[name]
        return full.flatten()[start : start + numel]

    def whole(self, name: str, shard: Tensor) -> Tensor:
        parameter = self._parameters[name]
        full = torch.zeros(getattr(parameter, "ds_shape", parameter.shape), dtype=shard.dtype, device=shard.device)
        self.cut(name, full).copy_(shard)
        dist.all_reduce(full)
        return full

    def full(self, name: str) -> Tensor:
        return self.whole(name, self.master_shards()[name])

    @contextmanager
    def swapped(self, shards: Mapping[str, Tensor]) -> Iterator[None]:
        self._swap(shards)
        try:
            yield
        finally:
            self._swap(shards)

    @torch.no_grad()
    def _swap(self, shards: Mapping[str, Tensor]) -> None:
        exchange(self.master_shards(), shards)
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        """Make the weights that are computed with anew from the masters."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()  # drops what is gathered
        for number in range(len(self._flats)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()  # gathers the small weights that stay gathered

    def save(self, folder: Path, extra: Mapping[str, Tensor], averages_only: bool = False) -> Future[None]:
        """DeepSpeed's own files, and `extra` in a file of each rank. They fit one world size and one stage.

        Written before it returns.
        """
        assert not averages_only, "train.ema_snapshot_every is refused with this engine"
        done: Future[None] = Future()
        try:
            self._write(folder, extra)
            done.set_result(None)
        except Exception as error:  # the future's, so that the other ranks are told in their turn
            done.set_exception(error)
        return done

    def _write(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        with _quiet():
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        torch.save(dict(extra), folder / self._extra_name)
        for name in (self._extra_name, f"{_TAG}/*pp_rank_{self._world.rank}_*", f"{_TAG}/mp_rank_00_*"):
            for path in folder.glob(name):  # what this rank wrote, and what rank 0 wrote for all
                with open(path, "rb") as file:
                    os.fsync(file.fileno())

    def load(self, folder: Path, extra: Mapping[str, Tensor]) -> None:
        """Read in place what `save` wrote at this world size and stage.

        DeepSpeed's files are pickles, which run code when they are read: give this none but the folders of your runs.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._adam.param_groups]
        where = [flat.data_ptr() for flat in self._flats]
        try:
            with _quiet():
                found, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
            if found is None:
                raise CheckpointError(f"{folder} has no files of DeepSpeed in {_TAG}/; use another checkpoint")
            kept = torch.load(folder / self._extra_name, map_location=self._world.device, weights_only=True)
            for key, tensor in extra.items():
                tensor.copy_(kept[key])
        except (OSError, EOFError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder} cannot be read: {reason}; use another checkpoint, or remove it") from None
        # The checkpoint's settings came with its state, and the clipping norm: those of the config hold.
        for group, planned in zip(self._adam.param_groups, settings, strict=True):
            group.update(planned)
        self._zero.clip_grad = self._clip_norm or 0.0
        assert where == [flat.data_ptr() for flat in self._flats], "masters have moved; the EMA would not see them"
        self._follow()

    @property
    def _extra_name(self) -> str:
        return f"extra_{self._world.rank:05d}.pt"

    @torch.no_grad()
    def load_weights(self, folder: Path, group: str = "model", names: Collection[str] | None = None) -> None:
        """From a checkpoint of the fsdp2 engine (any world size); one of zero must be converted first."""
        layout = [Replicate(), Shard(0)]
        sharded: dict[str, Any] = {}
        wanted = self._parameters.keys() if names is None else names
        for name in wanted:
            parameter = self._parameters[name]
            empty = torch.zeros(getattr(parameter, "ds_shape", parameter.shape), device=self._world.device)
            sharded[f"{group}/{name}"] = distribute_tensor(empty, self._world.mesh, layout, src_data_rank=None)
        load_tensors(folder, sharded, self._world.checkpoint)
        shards = self.master_shards()
        for name in wanted:
            shards[name].copy_(self.cut(name, sharded[f"{group}/{name}"].full_tensor()))
        self._follow()


def _settings(stage: Stage, precision: str, clip_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's config. Whatever is left out here it, or accelerate, would choose."""
    return {
        # Of no effect but to be there: the loop accumulates, and the loss carries the batch's weight.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,  # unset, accelerate makes it 1
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": False},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _accelerator(settings: dict[str, Any], precision: str, world: World) -> Accelerator:
    # zero3_init_flag would shard every model of transformers that is loaded from here on: the text encoder.
    plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    # Without a backend by name every process of a CPU takes itself for the main one.
    backend = InitProcessGroupKwargs(backend="nccl" if world.device.type == "cuda" else "gloo")
    mixed_precision = "bf16" if precision == "bf16" else "no"
    with _quiet():
        return Accelerator(deepspeed_plugin=plugin, mixed_precision=mixed_precision, kwargs_handlers=[backend])


def _import_deepspeed() -> Any:
    """Imported by those who use it (2 s, and it looks for a compiler); its choice of device is made at import."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name, of_one_process in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, of_one_process)  # what torchrun sets, read by accelerate and DeepSpeed
    with _quiet():
        import deepspeed
        import deepspeed.ops

    # DeepSpeed calls collectives by names that torch is about to change; a line in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A reduction through shared memory, for inference: compiled for half a minute at first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
