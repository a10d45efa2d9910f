"""What a rating compares: its prompts and runs, which are fixed when it is begun."""

import secrets
from pathlib import Path
from typing import Any

from data.errors import DataError
from launch.rating.images import find_source
from launch.rating.votes import Votes
from trainer.errors import ConfigError


def read_prompts(path: Path) -> list[str]:
    """The lines of the file, without blank lines at its end. DataError where another line is blank."""
    try:
        prompts = path.read_text(encoding="utf-8").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path} cannot be read: {error}") from None
    blank = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if blank:
        raise DataError(f"--prompts {path}: expected a prompt on each line, line {blank[0]} is blank")
    return prompts


def settle(path: Path, study: dict[str, Any]) -> Votes:
    """The votes of a new study, or of the one that was begun at this path, with its checkpoints and its token.

    Raises ConfigError where that study compares something else: its votes are on other images.
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
