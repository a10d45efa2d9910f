"""What is in a set of shards, as one page: sizes, shapes, captions, near duplicates, holes, random pairs.

mudit data report SHARDS [--config NAME] [--captions F] [--sample N] [--output FILE.html] [section.key=value ...]

Sizes, shapes and numbers of captions are of all samples, by the index; tokens, near duplicates and holes of --sample,
which are decoded by --workers processes. With --config the page shows how its buckets take the images and how
many captions its text encoder cuts; else words are counted. docs/data.md says what near duplicates are.
"""

import json
import os
from pathlib import Path

from data.errors import DataError
from data.redaction import message
from launch.common import add_overwrite, command, keep_files, run
from launch.shard import config_of_shards

PAGE = Path(".cache/data_report.html")


def main() -> int:
    parser = command(__doc__, config=False)
    parser.add_argument("shards", metavar="SHARDS", help="as data.shards")
    parser.add_argument("--captions", help="as data.captions")
    parser.add_argument("--config", help="a config, for its buckets, text encoder's tokenizer, text lengths and filter")
    parser.add_argument("--sample", type=int, default=20_000, help="random samples to decode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of which samples are drawn (default: %(default)s)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes that decode (default: one per core)")
    parser.add_argument("--output", type=Path, help=f"the file to write (default: {PAGE}, each time anew)")
    add_overwrite(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    for option, least in (("sample", 1), ("seed", 0), ("workers", 0)):
        if (value := getattr(args, option)) < least:
            raise DataError(f"--{option} must be at least {least}, got {value}")
    if args.output:
        keep_files(args.overwrite, args.output)
    config = config_of_shards(args)
    from data.encoders.text import token_counts
    from data.report.page import Settings, write_report
    from trainer.config.resolve import buckets_of

    settings = Settings(classes=config.label_classes)
    if args.config:
        settings = Settings(
            Path(args.config).stem,
            buckets_of(config),
            config.train.global_batch_size,
            config.data.text_lengths or (config.text_encoder.max_length,),
            token_counts(config.text_encoder),
            config.label_classes,
        )
    page = args.output or PAGE
    found = write_report(page, config.data, settings, args.sample, args.seed, args.workers)
    counted = f"{found['samples']} samples, {found['decoded']} of them decoded"
    print(json.dumps(found | {"page": str(page)}, indent=1) if args.json else message(f"{counted}: {page}"))
    return 0


if __name__ == "__main__":
    run(main)
