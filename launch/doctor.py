"""Look whether this machine can run muDiT: a line for each thing, with what to do where it falls short.

mudit doctor [--config mmdit_2b_mup.yaml [section.key=value ...]] [--folder runs] [--json]

Looked at: Python, torch and its driver, GPUs, NVLink, network adapters, processors, /dev/shm, ulimits, disk, compilers,
encoders, hub, Slurm. Exits 1 where one falls short; a note is of what only some runs need. --config: its encoders must
be here, and its run.dir is the folder. Rates between nodes are measured by `mudit preflight`.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

from data.redaction import message
from launch.common import command, run
from launch.fetch import encoder_paths
from launch.processes import importing
from trainer.config.load import load_config


def main() -> int:
    parser = command(__doc__, config=False)
    parser.add_argument("--config", help="a path, or a name under configs/: look for its encoders and its run.dir")
    parser.add_argument("--folder", type=Path, help="whose disk is measured (default: runs, or run.dir)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.overrides and arguments.config is None:
        parser.error("overrides need --config")
    config = arguments.config and load_config(arguments.config, arguments.overrides)
    with importing():
        from launch.machine import services, system
        from launch.machine.finding import Finding, looked_at

    def of_torch(name: str) -> Callable[[], Finding]:
        def look() -> Finding:
            with importing():  # a torch that cannot be imported is a finding
                from launch.machine import accelerators
            return getattr(accelerators, name)()

        return look

    folder = arguments.folder or Path(config.run.dir if config else "runs")
    looks: dict[str, Callable[[], Finding]] = {
        "Python": system.python,
        "torch": of_torch("torch_and_driver"),
        "GPUs": of_torch("gpus"),
        "NVLink": of_torch("nvlink"),
        "adapters": of_torch("adapters"),
        "processors": system.processors,
        "/dev/shm": system.shared_memory,
        "ulimits": system.limits,
        "disk": functools.partial(system.disk, folder),
        "compilers": system.compiler,
        "encoders": functools.partial(services.encoders, encoder_paths(config) if config else None),
        "hub": services.hub,
        "Slurm": services.slurm,
    }
    found = []
    for what, look in looks.items():
        found.append(looked_at(what, look))
        if not arguments.json:
            print(message(found[-1].line()), flush=True)
    short = [finding.what for finding in found if finding.state == "short"]
    if arguments.json:
        print(message(json.dumps({"passed": not short, "findings": [each._asdict() for each in found]}, indent=1)))
    elif short:
        print(f"falls short: {', '.join(short)}")
    return 1 if short else 0


if __name__ == "__main__":
    run(main)
