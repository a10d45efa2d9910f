"""Which of two runs do people prefer? Blind side-by-side rating on one local page, and what the votes say.

python launch/rate.py runs/A runs/B --prompts prompts.txt [section.key=value ...]
python launch/rate.py report runs/rate/A_B/votes.db [--json]

The images are made first, from the EMA weights and with equal seeds, and kept in the output folder: the same command
again goes on with them and with the votes. A run may also be a checkpoint, or a folder of images named by the number of
their prompt from 0 (0.png, 00001.jpg). The file has one prompt per line. Keys: left, right, down (both bad), Backspace.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from data.redaction import message
from launch.common import command, run
from trainer.errors import ConfigError


def main() -> int:
    if sys.argv[1:2] == ["report"]:
        return report(sys.argv[2:])
    parser = command(__doc__, config=False)
    parser.epilog = "command within it:\n  {report}  what the votes say; it has a --help of its own"
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt per line")
    parser.add_argument("--output", type=Path, help="folder of images and votes.db; runs/rate/A_B unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the images, and of each rater's order and sides")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("start rate.py without torchrun; images that many GPUs made are rated as folders")
    from launch.rating.images import check_sizes, make_images
    from launch.rating.server import Rating
    from launch.rating.study import read_prompts, settle

    prompts = read_prompts(arguments.prompts)
    folder = arguments.output or Path("runs/rate") / f"{arguments.a.resolve().name}_{arguments.b.resolve().name}"
    study = {"a": str(arguments.a), "b": str(arguments.b), "prompts": prompts, "seed": arguments.seed,
             "overrides": arguments.overrides}  # fmt: skip
    votes = settle(folder / "votes.db", study)
    for name in ("a", "b"):
        make_images(Path(votes.study["sources"][name]), votes.study, folder / name)
    check_sizes(folder, len(prompts))
    try:
        server = Rating((arguments.host, arguments.port), votes, folder, prompts, arguments.seed)
    except OSError as error:
        raise ConfigError(
            f"--host {arguments.host} --port {arguments.port}: {error.strerror}; expected an IPv4 address or name of "
            "this machine"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with server, contextlib.suppress(KeyboardInterrupt):
        host = socket.gethostname() if arguments.host == "0.0.0.0" else arguments.host
        print(f"rate {len(prompts)} pairs: http://{host}:{server.server_port}/?token={server.token}")
        print(f"then:  python launch/rate.py report {folder / 'votes.db'}", flush=True)
        server.serve_forever()
    votes.close()
    return 0


def report(arguments: Sequence[str]) -> int:
    """The command `rate.py report`."""
    parser = command("What the votes of a rating say.", config=False, overrides=None, name="report")
    parser.add_argument("votes", type=Path, metavar="votes.db")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    given = parser.parse_args(arguments)
    from launch.rating.statistics import HEADER, LEGEND, describe, results
    from launch.rating.votes import Votes

    votes = Votes(given.votes)
    study, cast = votes.study, votes.all()
    votes.close()
    found = results(cast)
    raters = len({vote.rater for vote in cast})
    if given.json:
        by_question = {question: dataclasses.asdict(result) for question, result in found.items()}
        print(json.dumps({"a": study["sources"]["a"], "b": study["sources"]["b"], "raters": raters, **by_question}))
        return 0
    print(message(f"a: {study['sources']['a']}\nb: {study['sources']['b']}"))
    print(f"{raters} raters, {len(study['prompts'])} prompts\n")
    print(f"{'':10} {HEADER}")
    for question, result in found.items():
        print(f"{question:10} {describe(result)}")
    print(f"\n{LEGEND}")
    return 0


if __name__ == "__main__":
    run(main)
