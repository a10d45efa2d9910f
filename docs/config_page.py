"""docs/config.md from the declarations of the keys: python -m docs.config_page > docs/config.md (no torch)."""

import argparse

from trainer.config.help import KeyHelp, SectionHelp, section_help, sections
from trainer.evaluate.suite import SuiteConfig

HEAD = """# The keys of a config

Written by `make schema` from the declarations in trainer/config/schema.py, data/config.py and models/configs.py; a test
holds it current. `python launch/train.py --help-config [SECTION]` prints the same.

The class of a key says what becomes of a change when a run is resumed: of **identity** it is refused, because another
value makes another run; of **schedule** it is refused unless the key is listed in `run.allow_change`; of **runtime** it
is free.
"""
SUITE = """
# The keys of an evaluation suite

Suites are the files of configs/evaluate; trainer/evaluate/suite.py declares their keys (see evaluate.md).
"""


def table(section: SectionHelp) -> str:
    """A section as a heading, its help and a table of its keys; without a column that would be empty."""
    classes = any(key.key_class for key in section.keys)
    head = ["key", "type", "default", "range", *(["class"] if classes else []), "what it does"]
    lines = [_row(head), "|" + "---|" * len(head), *(_row(_cells(key, classes)) for key in section.keys)]
    return f"\n## {section.title}\n\n{section.help}\n\n" + "\n".join(lines) + "\n"


def _cells(key: KeyHelp, classes: bool) -> list[str]:
    return [f"`{key.name}`", key.type, key.default, key.range, *([key.key_class] if classes else []), key.help]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def document() -> str:
    suite = section_help("suite", SuiteConfig)
    return HEAD + "".join(table(section) for section in sections()) + SUITE + table(suite)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(document(), end="")


if __name__ == "__main__":
    main()
