"""The estimate of a run of several stages: each is priced as a run of its own, and together they are the run."""

from typing import Any

from ..config.schema import TrainConfig
from ..config.stages import stages_of
from .cluster import Cluster
from .report import describe, estimate, size_of_data


def estimate_stages(config: TrainConfig, cluster: Cluster) -> dict[str, Any]:
    """The estimates of all stages, as data for JSON: `stages`, each with its first and last step, and `run`, of all of
    them. Raises ConfigError where the number of GPUs does not fit one of them."""
    found = []
    for stage in stages_of(config):
        figures = estimate(stage.alone(), cluster)
        figures["right_size"] = size_of_data(config, figures["parameters"])
        found.append({"first_step": stage.first_step, "last_step": stage.last_step, **figures})
    times = ("time", "time_cached")
    peaks = {key: max(range(len(found)), key=lambda i, key=key: found[i][key]["total"]) for key in _MEMORY}
    return {
        "stages": found,
        "run": {
            **{time: {key: sum(each[time][key] for each in found) for key in ("days", "dollars")} for time in times},
            "peak_stage": {key: number + 1 for key, number in peaks.items()},
            **{key: found[number][key] for key, number in peaks.items()},
        },
    }


_MEMORY = ("memory_gib", "memory_cached_gib")


def describe_stages(found: dict[str, Any], cluster: Cluster) -> str:
    """The page that a person reads, from what `estimate_stages` returned."""
    stages, run = found["stages"], found["run"]
    pages = [
        f"=== stage {number} of {len(stages)}: steps {each['first_step']} to {each['last_step']}\n\n"
        + describe(each, cluster)
        for number, each in enumerate(stages, 1)
    ]
    totals = [
        f"encoders {name}: {run[time]['days']:.1f} days, ${run[time]['dollars']:,.0f} (MODEL); memory peaks in stage "
        f"{run['peak_stage'][memory]}: {run[memory]['total']:.1f} of {run[memory]['usable']:.1f} GiB"
        for name, time, memory in (("online", "time", _MEMORY[0]), ("cached", "time_cached", _MEMORY[1]))
    ]
    return "\n\n".join([*pages, "\n".join(["=== all stages", "", *totals])])
