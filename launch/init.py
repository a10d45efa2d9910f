"""Write a first config: five questions (data, GPUs, hours, resolution, text encoder), and the estimate of the answers.

mudit init                                                              asks
mudit init --data 'shards/train-*.tar' --gpus 8 --hours 24 --resolution 512 --encoder sd3 --output first.yaml

The model is the largest of the shipped MMDiTs (or --base NAME) that suits the compute and fits into memory; the steps
are those that the hours hold. --card: the kind of GPU, where nvidia-smi does not tell. --gpus 0: the demo's model, for
a machine without a GPU. Then, from any folder: mudit train --config FILE.
"""

import sys
from pathlib import Path

from data.config import SYNTHETIC, DataConfig
from launch.common import add_overwrite, command, keep_files, run
from launch.machine.finding import answer
from launch.processes import importing
from launch.questions import Question, answered, anywhere, argument, count, positive, whole
from trainer.config.yaml_files import CONFIG_DIR
from trainer.estimate.cluster import CARDS, Cluster

BASES = ("mmdit_18b_mup", "mmdit_2b_mup", "mmdit_0.7b_mup", "mmdit_0.18b_mup")
SMALL = "mmdit_demo_mup"
MINILM = CONFIG_DIR.parent / ".cache" / "minilm"  # a small text encoder, which make setup brings
NONE = "No GPU is seen here (nvidia-smi)"


def main() -> int:
    here = cards_here()
    questions = [
        Question("data", "shards: a folder, a pattern, URLs, or synthetic", anywhere, (SYNTHETIC, SYNTHETIC)),
        Question("gpus", "how many GPUs; 0 trains on this machine's processors", count, (len(here), len(here))),
        Question("hours", "how many hours they are yours", positive, (24, 1)),
        Question("resolution", "pixels of an image's side", whole, (DataConfig.resolution, 32)),
        Question("encoder", "text encoder: sd3 (its T5-XXL), or a folder", anywhere, ("sd3", str(MINILM))),
    ]
    parser = command(__doc__, config=False, overrides=None)
    for question in questions:
        parser.add_argument(f"--{question.name}", type=argument(question.kind), help=question.asks)
    parser.add_argument("--card", choices=CARDS, default=next(filter(None, here), "h100"), help="default: %(default)s")
    parser.add_argument("--gpus-per-node", type=argument(whole), default=8, help="default: 8")
    parser.add_argument("--base", help="the shipped config that yours extends (default: chosen)")
    parser.add_argument("--output", type=Path, default=Path("first.yaml"), help="default: %(default)s")
    add_overwrite(parser)
    a = parser.parse_args()
    keep_files(a.overwrite, a.output)
    given = {question.name: getattr(a, question.name) for question in questions}
    if given["gpus"] is None and not here and sys.stdin.isatty():
        print(f"{NONE}: 0 of them train a small model here; a number plans for a machine that has so many.")
    answers = answered(questions, given)
    with importing():
        from trainer.estimate.proposal import Wish, propose, propose_small

    wish = Wish(**answers)
    if wish.gpus:
        cluster = Cluster(wish.gpus, CARDS[a.card], a.gpus_per_node)
        found = propose(wish, cluster, [a.base] if a.base else BASES, a.output.stem)
    else:
        found = propose_small(wish, a.base or SMALL, a.output.stem)
    a.output.parent.mkdir(parents=True, exist_ok=True)
    a.output.write_text(found.text)
    print(found.page)
    if wish.gpus > len(here):
        print(f"\n{NONE if not here else f'This machine has {len(here)} GPUs'}: train it where there are {wish.gpus}.")
    fetch = f"  mudit fetch --config {a.output}\n" if wish.gpus else ""
    print(f"\n{a.output} extends {found.base}. Next:\n  mudit doctor --config {a.output}")
    print(f"{fetch}  mudit train --config {a.output}")
    return 0


def cards_here() -> list[str | None]:
    """For each GPU of this machine its name in CARDS, None for one that is not there."""
    names = (answer("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()
    return [next((card for card in CARDS if card.upper() in name.upper()), None) for name in names]


if __name__ == "__main__":
    run(main)
