"""launch/train.py with a fault of the disk, for the tests: python -m tests.faults.disk_train FAULT ARGUMENTS.

none: none.
slow: a checkpoint's files are written and stay incomplete for SLOW_S seconds, in the thread that writes them.
no_room_check: a full disk is met in the middle of writing.
"""

import runpy
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from trainer.parallel import dcp

SLOW_S = 100.0  # of the second save, in which the test kills


def main() -> None:
    fault = sys.argv.pop(1)
    if fault == "slow":
        write = dcp.save_tensors

        def save_tensors(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
            write(folder, tensors, group)
            if folder.name == ".step_00000008.tmp":
                time.sleep(SLOW_S)

        dcp.save_tensors = save_tensors
    if fault == "no_room_check":
        dcp.check_room = lambda folder, needed: None
    runpy.run_path("launch/train.py", run_name="__main__")


if __name__ == "__main__":
    main()
