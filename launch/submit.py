"""Submit a run to Slurm: check the config, freeze code and config in the run folder, write the job, call sbatch.

python launch/submit.py --config mmdit_18b_mup.yaml --nodes 32 --gpus-per-node 8 --partition gpu --time 24:00:00 \\
    [--account A] [--qos Q] [--container IMAGE | --apptainer IMAGE.sif] [--mount /data] [--chain N] [--dry-run] \\
    [--cpus-per-gpu N] [--mem SIZE] [--gres NAME] [key=value ...]

A job that is told to stop (by its time limit, or by `scancel --batch --signal=USR1 JOB`) saves and requeues itself.
Where a cluster forbids that, --chain N submits N jobs, each of which starts after the one before. The same command
again goes on with the run. What is frozen lies in runs/NAME/jobs/NNN. --dry-run prints the script and writes nothing.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

from data.errors import DataError
from data.files import parse_json
from launch.common import command, run
from launch.slurm.job import freeze, job_script, new_folder, options_of, settings_of, submit
from launch.slurm.options import add_resources
from trainer.build.flops import image_flops
from trainer.config.load import load_config
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.errors import ConfigError
from trainer.estimate.cluster import CARDS, Cluster
from trainer.forecast.track import Track

MUCH = 10  # times the proxy's compute


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="0: one process per node, on its CPUs")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--time", required=True, help="limit of one job, as sbatch takes it: 24:00:00")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--container", help="image for Pyxis (srun --container-image); the repository is mounted")
    parser.add_argument("--apptainer", metavar="IMAGE", help="image for apptainer exec --nv")
    parser.add_argument(
        "--mount", action="append", default=[], metavar="PATH[:PATH]", help="also mounted in the container: data, ..."
    )
    parser.add_argument("--signal-seconds", type=int, default=300, help="warning before the time limit (default: 300)")
    parser.add_argument("--chain", type=int, default=1, metavar="N", help="N jobs one after another, not requeued")
    parser.add_argument("--card", choices=CARDS, default="h100", help="kind of GPU (default: h100, of 80 GB)")
    add_resources(parser, "0", "0, all that it has")
    parser.add_argument("--dry-run", action="store_true", help="print the script and write nothing")
    a = parser.parse_args()
    if a.nodes < 1 or a.chain < 1:
        raise ConfigError("--nodes and --chain must be at least 1")
    if a.container and a.apptainer:
        raise ConfigError("--container and --apptainer exclude each other")
    config = load_config(a.config, a.overrides)
    # What is frozen lies in the run folder, wherever the job starts.
    placed = config.run.model_copy(update={"dir": str(Path(config.run.dir).resolve())})
    config = config.model_copy(update={"run": placed})
    resolve(config, a.nodes * max(1, a.gpus_per_node))
    warn_without_ladder(config)
    warn_without_forecast(config)
    if a.gpus_per_node:
        warn_of_slowness(config, Cluster(a.nodes * a.gpus_per_node, CARDS[a.card], a.gpus_per_node))

    folder = new_folder(config)
    script = job_script(options_of(a, config, folder), settings_of(a, config, folder))
    if a.dry_run:
        print(script)
        return 0
    freeze(config, folder, script)
    number = None
    for _ in range(a.chain):
        number = submit(folder, number)
        print(f"job {number}: {folder}/slurm-{number}.out")
    return 0


def warn_without_ladder(config: TrainConfig) -> None:
    """Warn of a wide model that has climbed no ladder: it may be wrong in a way that narrower ones would have shown."""
    name = str(config.run.name)
    width, base = config.model.width, config.mup.base_width
    path = Path(config.run.dir) / f"{name}_ladder" / "ladder.json"
    passed = False
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # absent, or damaged
        passed = parse_json(path.read_bytes())["passed"]
    if width > base and not passed:
        print(
            f"warning: no passed ladder in {path}: python launch/ladder.py --config {name}.yaml --widths ... first",
            file=sys.stderr,
        )


def warn_without_forecast(config: TrainConfig) -> None:
    """Warn of a model of more than MUCH times the compute of one of the base width whose loss nobody has forecast."""
    proxy = config.model_copy(update={"model": dataclasses.replace(config.model, width=config.mup.base_width)})
    times = image_flops(config) / image_flops(proxy)
    if Track.of(config) is None and times > MUCH:  # one that is not of this run is refused before it queues
        print(
            f"warning: {times:.0f} times the compute of the proxy, and no forecast of its loss: python "
            f"launch/forecast.py run --config {config.run.name}.yaml ... first, then run.forecast=FILE",
            file=sys.stderr,
        )


def warn_of_slowness(config: TrainConfig, cluster: Cluster) -> None:
    """Warn of settings beside which others are more than 1.3 times faster, by the model of launch/estimate.py.

    Not of a step that would be shorter than 0.1 s at a tenth of the peak: there the host's own time decides, which no
    model has.
    """
    flops = config.train.global_batch_size * image_flops(config)
    if config.parallel.engine != "fsdp2" or 10 * flops / (cluster.gpus * cluster.card.peak_tflops * 1e12) < 0.1:
        return
    from trainer.estimate.plan import faster_plan

    try:
        found = faster_plan(config, cluster)
    except (ConfigError, DataError):  # an encoder that is not here, say: no reason to submit nothing
        return
    if found is not None:
        plan, ratio = found
        print(
            f"warning: on {cluster.gpus} GPUs of this card other settings would be {ratio:.1f} times faster (MODEL; "
            f"launch/estimate.py --plan has more): {' '.join(plan.overrides)}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
