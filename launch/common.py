"""What every command shares: one message for a user's mistake, exit code 2, no traceback."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from data.config import DataError
from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.loop import BadDataError


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit: 0 success, 1 a check falls short, 2 bad input."""
    try:
        code = main() or 0
    except (ConfigError, DataError, CheckpointError) as error:
        code = _report(str(error), 2)
    except BadDataError as error:
        code = _report(str(error), 1)
    sys.stdout.flush()
    sys.exit(code)


def _report(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # Rank 0 nearly always has the same message; torchrun ends this process before it would repeat it.
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code
