"""The tests that make their cases by chance (broken tars, images and checkpoints, orders of samples), with many new
cases; and a whole epoch of SA-1B's size.

python -m benchmarks.fuzz --factor 50 --output benchmarks/results/fuzz.json
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.machine import write
from tests.helpers.forked import environment
from tests.helpers.paths import ROOT

EPOCH = "tests/unit/data/test_order.py::test_an_epoch_at_the_batch_of_a_cluster_reads_each_sample_once"
CHECKS = {"cases by chance": ("-m", "hypothesis", "tests/unit"), "epoch of SA-1B": (EPOCH,)}


def run(factor: int, *tests: str) -> list[dict[str, Any]]:
    """Name, seconds and outcome of each test, with the cases by kind where it counts them; what is wrong is printed."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "junit_family=xunit1", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT, env={**environment(), "FUZZ_FACTOR": str(factor)}, check=False)
        cases = ElementTree.parse(report).iter("testcase")
    return [
        {
            "test": f"{case.get('classname')}.{case.get('name')}",
            "seconds": round(float(case.get("time", 0)), 1),
            "passed": all(case.find(wrong) is None for wrong in ("failure", "error")),
            "cases": {
                str(each.get("name")): int(each.get("value", 0))
                for each in case.iter("property")
                if not str(each.get("name")).startswith("hypothesis-")
            },
        }
        for case in cases
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=50, help="times as many cases as in CI")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.factor < 2:
        parser.error(f"--factor must be at least 2, got {arguments.factor}: 1 is what CI runs")
    results = {name: run(arguments.factor, *tests) for name, tests in CHECKS.items()}
    passed = all(tests and all(test["passed"] for test in tests) for tests in results.values())
    write(arguments.output, {"passed": passed, "factor": arguments.factor, **results})
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
