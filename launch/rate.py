"""Which of two runs do people prefer? Blind side-by-side rating on one local page, and what the votes say.

python launch/rate.py runs/A runs/B --prompts prompts.txt [section.key=value ...]
python launch/rate.py report runs/rate/A_B/votes.db [--json]

The images are made beforehand from the EMA weights, with equal seeds, and kept in the output folder: the same command
again goes on with them and with the votes. A run may also be a checkpoint, or a folder of images named by the number of
their prompt from 0 (0.png, 00001.jpg). The file has one prompt a line. Keys: left, right, down (both bad), Backspace.
"""

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.errors import DataError, SampleError
from data.files import temporary_beside
from data.images import IMAGE_EXTENSIONS, image_size, load_rgb
from launch.common import run
from launch.rating.server import Rating
from launch.rating.votes import BOTH_BAD, Result, Votes, results
from launch.sample import inference
from trainer.checkpoint.find import find_checkpoint
from trainer.errors import ConfigError

CHUNK = 32  # images that are made together, and between which the making can stop and go on
_MOST_PIXELS = 2**26


def main() -> int:
    if sys.argv[1:2] == ["report"]:
        return report(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="RUN_A")
    parser.add_argument("b", type=Path, metavar="RUN_B")
    parser.add_argument("--prompts", type=Path, required=True, help="text file, one prompt a line")
    parser.add_argument("--output", type=Path, help="folder of images and votes.db; runs/rate/A_B unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the images, and of each rater's order and sides")
    parser.add_argument("--host", default="127.0.0.1", help="any but a loopback address asks raters for a token")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of both, e.g. sample.guidance=3")
    arguments = parser.parse_intermixed_args()
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("start rate.py without torchrun; images that many GPUs made are rated as folders")
    open_to_others = not is_loopback(arguments.host)
    prompts = read_prompts(arguments.prompts)
    folder = arguments.output or Path("runs/rate") / f"{arguments.a.resolve().name}_{arguments.b.resolve().name}"
    study = {"a": str(arguments.a), "b": str(arguments.b), "prompts": prompts, "seed": arguments.seed,
             "overrides": arguments.overrides}  # fmt: skip
    votes = settle(folder / "votes.db", study)
    for name in ("a", "b"):
        make_images(Path(votes.study["sources"][name]), votes.study, folder / name)
    check_sizes(folder, len(prompts))
    token = votes.study["token"] if open_to_others else None
    try:
        server = Rating((arguments.host, arguments.port), votes, folder, prompts, arguments.seed, token)
    except OSError as error:
        raise ConfigError(f"--host {arguments.host} --port {arguments.port}: {error.strerror}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with server, contextlib.suppress(KeyboardInterrupt):
        host = socket.gethostname() if arguments.host == "0.0.0.0" else arguments.host
        print(f"rate {len(prompts)} pairs: http://{host}:{server.server_port}/{f'?token={token}' if token else ''}")
        print(f"then:  python launch/rate.py report {folder / 'votes.db'}", flush=True)
        server.serve_forever()
    votes.close()
    return 0


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError as error:
        raise ConfigError(f"--host {host}: expected an IPv4 address or name of this machine ({error})") from None


def read_prompts(path: Path) -> list[str]:
    """The lines of the file; blank lines at its end do not count."""
    try:
        prompts = path.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} cannot be read: {error}") from None
    blank = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if blank:
        raise DataError(f"--prompts {path}: expected a prompt on each line, line {blank[0]} is blank")
    return prompts


def settle(path: Path, study: dict[str, Any]) -> Votes:
    """The votes of a new study, or of the one that was begun there, with its checkpoints and its token.

    Raises ConfigError where that one compares something else: its votes are on other images.
    """
    if not path.is_file():
        sources = {name: str(find_source(Path(study[name]))) for name in ("a", "b")}
        return Votes.create(path, study | {"sources": sources, "token": secrets.token_urlsafe(16)})
    votes = Votes(path)
    if changed := [key for key in study if study[key] != votes.study[key]]:
        raise ConfigError(
            f"{path} was begun with another {' and '.join(changed)}, and its votes are on those images: "
            "give what was given then, or another --output"
        )
    return votes


# --------------------------------------------------------------------------------------------------------- the images


def find_source(path: Path) -> Path:
    """A folder of images, or the checkpoint that is meant."""
    return path if numbered_images(path) else find_checkpoint(path)


def numbered_images(folder: Path) -> dict[int, Path]:
    """{number: file}."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*")):
        if not path.stem.isdecimal() or path.suffix.lower().removeprefix(".") not in IMAGE_EXTENSIONS:
            continue
        if (other := found.setdefault(int(path.stem), path)) != path:
            raise DataError(f"{other} and {path} have the same number: expected one image a prompt")
    return found


def make_images(source: Path, study: dict[str, Any], folder: Path) -> None:
    """folder/00000.png ...: an image a prompt, those that are not there yet.

    All are written anew, so that neither name nor format tells where an image is from. A chunk's noise comes from
    (study's seed + its first number): the same for both runs, wherever the making was stopped.
    """
    prompts: list[str] = study["prompts"]
    folder.mkdir(exist_ok=True)
    missing = [number for number in range(len(prompts)) if not (folder / f"{number:05d}.png").is_file()]
    if not missing:
        return
    if given := numbered_images(source):
        if absent := [number for number in missing if number not in given]:
            raise DataError(
                f"{source} has no image {absent[0]}: expected one for each of {len(prompts)} prompts, from 0"
            )
        for number in missing:
            try:
                image = load_rgb(given[number].read_bytes(), _MOST_PIXELS)
            except SampleError as error:
                raise DataError(f"{given[number]}: {error}") from None
            write_image(np.asarray(image), folder / f"{number:05d}.png")
        return
    with inference(source, study["overrides"]) as model:
        for start in sorted({number // CHUNK * CHUNK for number in missing}):
            chunk = prompts[start : start + CHUNK]
            for number, image in enumerate(model.images(chunk, study["seed"] + start), start):
                write_image(image, folder / f"{number:05d}.png")
            print(f"{source}: {start + len(chunk)} of {len(prompts)} images", flush=True)


def write_image(pixels: np.ndarray, path: Path) -> None:
    """uint8 [H, W, 3]; whole or not at all."""
    with temporary_beside(path) as beside:
        Image.fromarray(pixels).save(beside, format="PNG")


def check_sizes(folder: Path, prompts: int) -> None:
    """Images of different size would be known apart."""
    for number in range(prompts):
        a, b = (image_size((folder / run / f"{number:05d}.png").read_bytes()) for run in ("a", "b"))
        if a != b:
            raise DataError(
                f"image {number} has {a[0]} x {a[1]} pixels in RUN_A and {b[0]} x {b[1]} in RUN_B, which tells them "
                "apart: give folders of images of one size, and another --output"
            )


# --------------------------------------------------------------------------------------------------------- the result


def report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="rate.py report", description="what the votes of a rating say")
    parser.add_argument("votes", type=Path, metavar="votes.db")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    votes = Votes(given.votes)
    study, cast = votes.study, votes.all()
    votes.close()
    found = results(cast)
    raters = len({vote.rater for vote in cast})
    if given.json:
        by_question = {question: dataclasses.asdict(result) for question, result in found.items()}
        print(json.dumps({"a": study["sources"]["a"], "b": study["sources"]["b"], "raters": raters, **by_question}))
        return 0
    print(f"a: {study['sources']['a']}\nb: {study['sources']['b']}\n{raters} raters, {len(study['prompts'])} prompts\n")
    print(f"{'':10} {'a':>5} {'b':>5} {'both bad':>9}  {'b wins [95 %]':22} {'kappa':>6} {'left':>5}")
    for question, result in found.items():
        print(f"{question:10} {row(result)}")
    print(
        "\nb wins: its share of the votes for either image, mean over prompts; Wilson's interval, a prompt being one "
        "observation.\nkappa: Fleiss', on the prompts that several raters judged. left: share of votes for the left "
        "image."
    )
    return 0


def row(result: Result) -> str:
    counts = result.votes
    rate = "no votes for either"
    if result.win_rate is not None:
        rate = f"{result.win_rate:.1%} [{result.low:.1%}, {result.high:.1%}]"
    kappa = "-" if result.kappa is None else f"{result.kappa:.2f}"
    left = "-" if result.left is None else f"{result.left:.0%}"
    return f"{counts['a']:5} {counts['b']:5} {counts[BOTH_BAD]:9}  {rate:22} {kappa:>6} {left:>5}"


if __name__ == "__main__":
    run(main)
