"""Watch runs and studies on a live page: losses, samples, speed, muP health, events, of one or more.

mudit watch runs/demo                       (a run folder, or its name under runs/)
mudit watch runs/a runs/b --port 8001       (laid over each other)
mudit watch runs/demo_search                (a study; a folder of runs stands for the runs in it)

The page follows the folders by itself and changes nothing in them; the runs may be under way, waiting or over. It is
on 127.0.0.1 alone: from your own machine, forward the port as the line says that the command prints. Ctrl-C ends it.
"""

import contextlib
import getpass
import os
import signal
import socket

from data.redaction import message
from launch.common import command, run
from launch.processes import importing
from trainer.errors import ConfigError

HOST = "127.0.0.1"


def main() -> int:
    parser = command(__doc__, config=False, overrides=None)
    parser.add_argument("runs", nargs="*", default=["runs"], metavar="RUN", help="folders of runs and studies")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    arguments = parser.parse_args()
    if not 0 <= arguments.port < 1 << 16:
        raise ConfigError(f"--port {arguments.port}: expected a number from 0 to 65535")
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("start watch without torchrun or srun: one process serves the page")
    with importing():
        from launch.watching.server import serve
        from launch.watching.sources import Sources

    sources = Sources(arguments.runs)
    count = len(sources.look())
    for note in sources.notes:
        print(message(f"warning: {note}"))
    try:
        listening = socket.create_server((HOST, arguments.port))
    except OSError as error:
        raise ConfigError(
            f"--port {arguments.port}: {os.strerror(error.errno or 0)}: give another one, or 0 for one that is free"
        ) from None
    port = listening.getsockname()[1]
    print(f"watching {count} folder{'s' if count > 1 else ''}: http://{HOST}:{port}/")
    print(message(f"from elsewhere:  ssh -L {port}:{HOST}:{port} {_user()}@{socket.gethostname()}"), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with listening, contextlib.suppress(KeyboardInterrupt):
        serve(sources, listening)
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # of a container that has no such user
        return "USER"


if __name__ == "__main__":
    run(main)
