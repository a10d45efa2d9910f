"""How a config runs fastest on a cluster: shard group, recomputation, micro-batch, by the models of memory and time.

Memory is simulated once for each value of parallel.activation_checkpointing (twice where only some shard counts keep
gathered weights) and scaled to every shard count; a value is simulated only where one that computes less again does not
fit.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..build.engine import build_mup_table
from ..config.resolve import keeps_gathered, least_rows, micro_batch_size, resolve
from ..config.schema import TrainConfig
from ..errors import ConfigError
from .cluster import GIB, Cluster
from .memory import Memory, equal_parts
from .muon import state_numbers
from .report import encoder_bytes, smallest_count, text_encoder_flops, timed
from .simulation import Profile, profile
from .step_time import StepTime, Work, micro_batches, step_time

RECOMPUTATION = ("none", "selective", "full")  # of parallel.activation_checkpointing, by what is computed again
_SIMULATED_WORLD = 8  # ranks: enough for shards, and few, since a simulation takes longer with more


class Plan(NamedTuple):
    """A variant of a config that fits. precomputed: text states come with the data, and no encoder is on the GPU.
    memory: bytes of a GPU at the peak."""

    config: TrainConfig
    precomputed: bool
    memory: int
    step: StepTime

    @property
    def overrides(self) -> list[str]:
        """What makes this plan of the config, as arguments of a command."""
        parallel = self.config.parallel
        return [
            f"parallel.shard={parallel.shard}",
            f"parallel.activation_checkpointing={parallel.activation_checkpointing}",
            f"train.micro_batch_size={self.config.train.micro_batch_size:.10g}",
        ]

    def why(self, cluster: Cluster) -> str:
        """What the time of a step follows from, in words."""
        shard, network, arithmetic = self.config.parallel.shard, self.step.network.seconds, self.step.arithmetic_s
        nodes = -(-shard // cluster.gpus_per_node)
        weights = "whole weights on each GPU" if shard == 1 else f"weights sharded over {shard} GPUs"
        place = "" if shard == 1 else " of one node" if nodes == 1 else f" of {nodes} nodes"
        limit = "the network" if network > arithmetic else "arithmetic"
        return f"{weights}{place}; {limit} is the limit ({arithmetic:.3g} s, network {network:.3g} s)"

    def data(self, cluster: Cluster) -> dict[str, Any]:
        """The plan for JSON."""
        rows = resolve(self.config, cluster.gpus).micro_batch_rows
        return {
            "overrides": self.overrides,
            "text": "precomputed" if self.precomputed else "online",
            "micro_batch": rows,
            "micro_batches": micro_batches(self.config, cluster.gpus, rows),
            "replicas": cluster.gpus // self.config.parallel.shard,
            "memory_gib": self.memory / GIB,
            **timed(self.config, cluster, self.step),
            "why": self.why(cluster),
        }


class Planner:
    """Plans of one config on one cluster. Raises ConfigError for engine zero, whose traffic is not modelled."""

    def __init__(self, config: TrainConfig, cluster: Cluster) -> None:
        if config.parallel.engine != "fsdp2":
            raise ConfigError(f"plans are made for parallel.engine fsdp2 alone, got {config.parallel.engine}")
        resolve(config, cluster.gpus)
        self._config, self._cluster, self._work = config, cluster, Work(config)
        self._table, self._encoders = build_mup_table(config), sum(encoder_bytes(config).values())
        self._profiles: dict[tuple[str, bool], Profile] = {}
        """By recomputation, and whether gathered weights are kept."""
        self._share = -(-config.train.global_batch_size // cluster.gpus)

    def best(self, most: int = 5) -> list[Plan]:
        """The fastest plans that fit, the fastest first; of equally fast ones, that with less memory. The fastest with
        online text is always among them, at the end where `most` others are faster."""
        precomputed = (True, False) if self._encoders else (True,)
        plans = [plan for shard in self._shards() for given in precomputed for plan in self._fitting(shard, given)]
        plans.sort(key=lambda plan: (round(plan.step.step_s, 4), plan.memory))
        online = [plan for plan in plans[most:] if not plan.precomputed][:1]
        return plans[:most] + ([] if any(not plan.precomputed for plan in plans[:most]) else online)

    def own(self) -> StepTime:
        """The step of the config as it is, with precomputed text."""
        return step_time(self._config, self._cluster, self._work)

    def bound_s(self) -> float:
        """What no plan is faster than: the step where everything fits. Nothing is simulated for it."""
        return min(
            step_time(self._variant(shard, "none", self._share), self._cluster, self._work).step_s
            for shard in self._shards()
        )

    def what_would_fit(self) -> str:
        """Where no plan fits: what one GPU would hold at least, and how many GPUs would do."""
        memory, gpus = self._memory(0, "full", True), self._cluster.gpus
        least = memory.total(gpus, 1, self._share > 1)
        found = smallest_count(self._config, memory, self._cluster.usable)
        more = "no number of GPUs that the global batch feeds" if found is None else f"{found[0]} GPUs"
        return (
            f"Nothing fits: sharded over all {gpus} GPUs, one sample at a time, all recomputed and text precomputed, a "
            f"GPU holds {least / GIB:.1f} of {self._cluster.usable / GIB:.1f} GiB. Of this card {more} would do."
        )

    def _shards(self) -> Iterator[int]:
        """Sizes of a shard group that lie evenly within nodes or over whole nodes, and hold weights, moments and
        averages in fp32: others need no simulation."""
        gpus, node, config = self._cluster.gpus, self._cluster.gpus_per_node, self._config
        kept = (1 + len(config.ema.decays)) * self._work.parameters + state_numbers(self._table)
        state = 0 if config.parallel.cpu_offload else 4 * kept
        for n in range(1, gpus + 1):
            even = gpus % n == 0 and (node % n == 0 or n % node == 0 or n == gpus)
            if n == gpus or (even and state / n < self._cluster.usable):
                yield n

    def _fitting(self, shard: int, precomputed: bool) -> Iterator[Plan]:
        """A plan for each kind of recomputation with the largest micro-batch that fits; none beyond the first that
        takes the whole share at once."""
        usable = self._cluster.usable
        encoding = 0 if precomputed else text_encoder_flops(self._config)
        for mode in RECOMPUTATION:
            memory = self._memory(shard, mode, precomputed)
            rows = memory.fitting_rows(shard, self._share, usable)
            if rows < (least := least_rows(self._config)):
                continue
            variant = self._variant(shard, mode, max(least, equal_parts(self._share, rows)))
            total = memory.total(shard, resolve(variant, self._cluster.gpus).micro_batch_rows, rows < self._share)
            yield Plan(variant, precomputed, total, step_time(variant, self._cluster, self._work, encoding))
            if rows == self._share:
                return

    def _variant(self, shard: int, mode: str, rows: int) -> TrainConfig:
        config = self._config
        parallel = config.parallel.model_copy(update={"shard": shard, "activation_checkpointing": mode})
        train = config.train.model_copy(update={"micro_batch_size": micro_batch_size(config, rows)})
        return config.model_copy(update={"parallel": parallel, "train": train})

    def _memory(self, shard: int, mode: str, precomputed: bool) -> Memory:
        variant = self._variant(shard, mode, self._share)
        keeps = keeps_gathered(variant, self._work.parameters)
        if (mode, keeps) not in self._profiles:
            parallel = variant.parallel.model_copy(update={"shard": 0, "reshard_after_forward": not keeps})
            simulated = variant.model_copy(update={"parallel": parallel})
            self._profiles[mode, keeps] = profile(simulated, min(self._cluster.gpus, _SIMULATED_WORLD))
        encoders = 0 if precomputed else self._encoders
        return Memory(self._profiles[mode, keeps], self._table, encoders, variant.parallel)


def describe_plans(plans: list[Plan], cluster: Cluster) -> str:
    """The page that a person reads."""
    lines = [f"The fastest of what fits on {cluster.gpus} GPUs of {cluster.card.memory_gb:g} GB (MODEL, not measured):"]
    for number, plan in enumerate(plans, 1):
        found = plan.data(cluster)
        lines += [
            "",
            f"{number}. {found['step_s']:.3g} s per step, {found['mfu']:.0%} MFU, {found['days']:.1f} days, "
            f"${found['dollars']:,.0f}; {found['memory_gib']:.1f} GiB; text {found['text']}; "
            f"micro-batch {found['micro_batch']} x {found['micro_batches']}",
            "   " + " ".join(found["overrides"]),
            "   " + found["why"],
        ]
    if any(plan.precomputed for plan in plans):
        lines += ["", "text precomputed: by python launch/precompute.py, then data.shards names what it wrote"]
    return "\n".join(lines)


def faster_plan(config: TrainConfig, cluster: Cluster, ratio: float = 1.3) -> tuple[Plan, float] | None:
    """The best plan with precomputed text and how much faster it is than the config with it, where that is more than
    `ratio` times."""
    planner = Planner(config, cluster)
    own = planner.own().step_s
    if own <= ratio * planner.bound_s():
        return None
    best = next((plan for plan in planner.best(most=1) if plan.precomputed), None)
    return (best, own / best.step.step_s) if best is not None and own > ratio * best.step.step_s else None
