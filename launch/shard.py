"""Build shards from images and captions, the index of existing shards, or check what a run will see of them.

python launch/shard.py --images DIR --output PREFIX          DIR holds NAME.jpg and NAME.txt (or NAME.json)
python launch/shard.py --manifest FILE.jsonl --output PREFIX lines {"image": path, "caption": "..."}
python launch/shard.py index SHARD... [--workers N]          shards, folders, patterns or URLs
python launch/shard.py check SHARDS [--captions F] [--config NAME] [--json] [section.key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from data.config import DataConfig
from data.errors import DataError
from data.redaction import message
from data.shard_index import load_index, rebuild_indexes
from data.storage import open_shards
from data.write_shards import images_in_folder, images_in_manifest, read_samples, write_shards
from launch.common import command, run

if TYPE_CHECKING:
    from trainer.config.schema import TrainConfig


def build_shards(args: argparse.Namespace) -> None:
    """Write the shards that the command line asks for."""
    if (args.images is None) == (args.manifest is None):
        raise DataError("give either --images DIR or --manifest FILE.jsonl (see --help)")
    if args.output is None:
        raise DataError("give --output PREFIX: shards become PREFIX-000000.tar ...")
    if args.resize is not None and args.resize < 1:
        raise DataError(f"--resize must be at least 1 pixel, got {args.resize}")
    skipped: Counter[str] = Counter()
    images = images_in_folder(args.images, skipped) if args.images else images_in_manifest(args.manifest)
    paths = write_shards(read_samples(images, args.resize, skipped), args.output, args.per_shard)
    written = sum(load_index(path).table.num_rows for path in paths)
    print(f"{written} samples in {len(paths)} shards: {paths[0]} ... {paths[-1].name}")
    for reason, count in sorted(skipped.items()):
        print(message(f"skipped {count}: {reason}"))


def index_shards(args: argparse.Namespace) -> None:
    """Build the index of every shard anew. DataError in the end where some have none."""
    if args.workers < 1:
        raise DataError(f"--workers must be at least 1, got {args.workers}")
    shards = [shard for spec in args.shards for shard in open_shards(spec, "SHARD")]
    failed = []
    for line, built in rebuild_indexes(shards, args.cache, args.workers):
        if not built:
            failed.append(line)
        print(message(line if built else f"error: {line}"), flush=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(shards)} shards have no index; the first: {failed[0]}")


def config_of_shards(args: argparse.Namespace) -> TrainConfig:
    """The config of --config, or all defaults, with SHARDS and --captions as its data. Raises ConfigError."""
    from trainer.config.load import load_config, parse

    given = ["data.sources=[]", f"data.shards={json.dumps(args.shards)}"]
    given += [f"data.captions={json.dumps(args.captions)}"] if args.captions else []
    given += args.overrides
    return load_config(args.config, given) if args.config else parse({}, "the command line", given)


def check(words: list[str]) -> int:
    """Print what a run will see of shards. -> 1 where it would be stopped, or would learn no captions."""
    parser = command("Check what a run will see of shards.", config=False, name="check")
    parser.add_argument("shards", metavar="SHARDS", help="as data.shards")
    parser.add_argument("--captions", help="as data.captions")
    parser.add_argument("--config", help="a config, for its text encoder's tokenizer, text lengths, filter, resolution")
    parser.add_argument("--samples", type=int, default=1000, help="random samples to decode (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path(".cache/check.html"), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(words)
    if args.samples < 1:
        raise DataError(f"--samples must be at least 1, got {args.samples}")
    from data.check import check_shards, write_page
    from data.encoders.text import token_counts

    config = config_of_shards(args)
    lengths, text = config.data.text_lengths or (config.text_encoder.max_length,), config.text_encoder
    found = check_shards(config.data, args.samples, lengths, token_counts(text), config.label_classes)
    write_page(args.page, found)
    print(
        json.dumps(found.report | {"problems": found.problems, "page": str(args.page)}, indent=1)
        if args.json
        else message("\n".join([*found.lines, f"pairs: {args.page}", *(f"problem: {p}" for p in found.problems)]))
    )
    return 1 if found.problems else 0


def main() -> int:
    """Parse the command line and run one of the three commands."""
    if sys.argv[1:2] == ["check"]:
        return check(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images with captions beside them")
    parser.add_argument("--manifest", type=Path, help="file of JSON lines, each with an image and its caption")
    parser.add_argument("--output", type=Path, help="prefix of the shards, e.g. shards/train")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default: %(default)s)")
    parser.add_argument("--resize", type=int, help="reduce the shorter side of each image to this many pixels")
    commands = parser.add_subparsers(dest="command", metavar="{index,check}")
    index = commands.add_parser("index", help="build the index of existing shards")
    index.add_argument("shards", nargs="+", help="shards, folders, patterns or URLs")
    index.add_argument("--workers", type=int, default=1, help="shards that are indexed at the same time")
    index.add_argument(
        "--cache", type=Path, default=Path(DataConfig.index_cache), help="folder for the indexes of URLs"
    )
    commands.add_parser("check", help="what a run will see of shards: shard.py check --help")
    args = parser.parse_args()
    if args.command == "index":
        index_shards(args)
    else:
        build_shards(args)
    return 0


if __name__ == "__main__":
    run(main)
