"""How long a step takes: the arithmetic of the passes and of the update, and the network beside it. A model."""

from typing import NamedTuple

from ..build.attention import simulated_kernel
from ..build.engine import build_mup_table
from ..build.float8 import token_linears
from ..build.flops import image_flops
from ..build.meta import meta_inputs, meta_model
from ..config.resolve import Resolved, compiles, keeps_gathered, resolve
from ..config.schema import TrainConfig
from ..errors import ConfigError
from .arithmetic import STREAMED, Passes, PassTime, bytes_alone, count_passes, parameter_bytes, pass_time
from .cluster import CARDS, Cluster
from .muon import UPDATE_BYTES, Matrices, exchanges, matrices_of, polar_seconds
from .network import Network, network

# What published runs of 12 to 14 B reach of this model's roofline: launches, power, jitter between ranks, kernels that
# wait for each other. Fitted to the runs of tests/unit/trainer/estimate/test_step_time.py, each within a quarter.
ACHIEVED = 0.8
_ENCODING = 0.8  # of a card's matrix products, in the text encoder's forward pass (assumed)


class Work:
    """What a step of a config computes. Its passes are counted once for each size of the micro-batch, and hold for all
    of its variants in section `parallel` but for parallel.attention and parallel.precision."""

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._model = config, meta_model(config)
        self._passes: dict[int, Passes] = {}
        self.units = [sum(p.numel() for p in unit.parameters()) for unit in self._model.shard_units()]
        """Parameters of each block."""
        self.parameters = sum(p.numel() for p in self._model.parameters())
        self.muon: list[Matrices] = matrices_of(build_mup_table(config)) if config.optim.kind == "muon" else []
        """What Muon moves."""

    def passes(self, rows: int) -> Passes:
        """The operations of a micro-batch of `rows` images."""
        if rows not in self._passes:
            with simulated_kernel(self._config):
                inputs, attention = meta_inputs(self._config, rows), self._config.parallel.attention
                fp8 = token_linears(self._model) if self._config.parallel.precision == "fp8" else {}
                self._passes[rows] = count_passes(self._model, inputs, attention, [*fp8.values()])
        return self._passes[rows]


class StepTime(NamedTuple):
    """Seconds of a step on each GPU."""

    passes: PassTime
    """Forward and backward, of all micro-batches."""
    encoding_s: float
    """The text encoder's forward pass, where it runs beside the training."""
    update_s: float
    """What moves parameters: casts, copies, norm, clipping, the optimizer and the averages."""
    network: Network
    overlaps: bool
    """Whether gathers and reductions run beside the passes."""

    @property
    def arithmetic_s(self) -> float:
        return sum(self.passes) + self.encoding_s + self.update_s

    @property
    def slower_s(self) -> float:
        """The step where the network hides behind the arithmetic, or the arithmetic behind the network."""
        exposed = self.network.exposed_s
        return max(self.arithmetic_s, self.network.seconds - exposed) + exposed

    @property
    def sum_s(self) -> float:
        """The step where neither hides."""
        return self.arithmetic_s + self.network.seconds

    @property
    def step_s(self) -> float:
        return self.slower_s if self.overlaps else self.sum_s


def micro_batches(config: TrainConfig, gpus: int, rows: int) -> int:
    """Micro-batches of a step on each GPU, at most `rows` samples each."""
    share = -(-config.train.global_batch_size // gpus)
    return -(-share // rows)


def step_time(config: TrainConfig, cluster: Cluster, work: Work, encoding_flops: float = 0.0) -> StepTime:
    """A step of `config`, a variant of that of `work`, on a cluster. encoding_flops: of the text encoder for an image,
    where it runs beside the training. Raises ConfigError where the GPUs do not fit the config."""
    resolved, card, parallel = resolve(config, cluster.gpus), cluster.card, config.parallel
    if parallel.precision == "fp8" and card.fp8_tflops is None:
        raise ConfigError(
            f"parallel.precision fp8 runs on {', '.join(name for name, each in CARDS.items() if each.fp8_tflops)}, not "
            "on this card: name another one, or set parallel.precision=bf16"
        )
    count = micro_batches(config, cluster.gpus, resolved.micro_batch_rows)
    sent = network(config, cluster, resolved, work.units, work.parameters - sum(work.units), count)
    sent = sent.after_gradients(exchanges(work.muon, cluster, resolved.shard))
    overlaps = parallel.prefetch > 0
    if cluster.mfu is not None:
        images = config.train.global_batch_size / cluster.gpus
        seconds = images * (image_flops(config) + encoding_flops) / (card.peak_tflops * 1e12 * cluster.mfu)
        return StepTime(PassTime(seconds, 0.0, 0.0), 0.0, 0.0, sent, overlaps)
    rows = resolved.micro_batch_rows
    one = pass_time(work.passes(rows), card, parallel.activation_checkpointing, compiles(config, on_gpu=True))
    encoding = count * rows * encoding_flops / (_ENCODING * card.matmul_tflops * 1e12)
    moved = _moved(config, resolved, work.parameters, count) * work.parameters
    moved += UPDATE_BYTES * sum(each.numbers for each in work.muon) / resolved.shard
    update = moved / (STREAMED * card.memory_gb_s * 1e9)
    update += polar_seconds(work.muon, config.optim.muon.steps, cluster.gpus, card)
    passes = PassTime(*(count * part / ACHIEVED for part in one))
    return StepTime(passes, encoding / ACHIEVED, update / ACHIEVED, sent, overlaps)


def _moved(config: TrainConfig, resolved: Resolved, parameters: int, count: int) -> float:
    averages, reshard = len(config.ema.decays), not keeps_gathered(config, parameters)
    if resolved.world_size == 1 and not config.parallel.cpu_offload:
        return bytes_alone(count, averages)
    return parameter_bytes(resolved.shard, count, reshard, averages)
