"""The text around a caption that a language model reads: a prefix, or the chat template of its tokenizer.

Its tokens are found by writing it around captions that have nothing in common: what all of them begin and end with is
the template, with the tokenizer's own marks. Nothing about a model is assumed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ..config import TextModelConfig
from ..errors import DataError

_MARK = "\ue000"  # of Unicode's private use: stands for the caption while a chat is written
# They differ in their first and last characters, so that no token at the edge of the template is taken for a part of it
# that some captions join.
_CAPTIONS = ("", "a red apple", "Two dogs.", "7 x 3", "(none)", "\u732b", "\u00e9t\u00e9 ")


@dataclass(frozen=True)
class Template:
    """Text around captions.

    before, after: its texts. first, last: its tokens there, with those that the tokenizer adds. special: whether the
    tokenizer adds its own marks (a chat template writes them itself).
    """

    tokenizer: Any
    before: str
    after: str
    first: list[int]
    last: list[int]
    special: bool

    def tokens(self, captions: list[str], length: int) -> list[list[int]]:
        """The tokens of each caption within the template. The caption is cut, never the template, so that at most
        `length` tokens are left behind `first`."""
        texts = [f"{self.before}{caption}{self.after}" for caption in captions]
        read = self.tokenizer(texts, add_special_tokens=self.special)["input_ids"]
        start, rows = len(self.first), []
        for caption, ids in zip(captions, read, strict=True):
            end = len(ids) - len(self.last)
            own = ids[start:end]
            if end < start or ids[:start] != self.first or ids[end:] != self.last:
                # The caption's edge has become one token with the template's, as a line break may: it stays apart.
                own = self.tokenizer(caption, add_special_tokens=False)["input_ids"]
            rows.append([*self.first, *own[: max(0, length - len(self.last))], *self.last])
        return rows


def template_of(cfg: TextModelConfig, tokenizer: Any) -> Template | None:
    """The template of a config; None where it has none. Raises DataError where the tokenizer has no chat template, the
    template does not hold the caption once, or text_encoder.max_length leaves no room for one."""
    if cfg.chat is None and not cfg.prefix:
        return None
    before, after = (cfg.prefix, "") if cfg.chat is None else _chat(cfg, cfg.chat, tokenizer)
    special = cfg.chat is None
    rows = tokenizer([f"{before}{caption}{after}" for caption in _CAPTIONS], add_special_tokens=special)["input_ids"]
    first = _shared(rows)
    last = _shared([row[len(first) :][::-1] for row in rows])[::-1]
    if len(last) >= cfg.max_length:
        raise DataError(
            f"text_encoder.max_length is {cfg.max_length}, but the chat template writes {len(last)} tokens behind each "
            f"caption: set at least {len(last) + 1}"
        )
    return Template(tokenizer, before, after, first, last, special)


def _shared(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return [column[0] for column in columns]


def _chat(cfg: TextModelConfig, system: str, tokenizer: Any) -> tuple[str, str]:
    """The chat's text before and after the caption."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": _MARK})
    try:
        written = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=cfg.thinking
        )
    except Exception as error:  # there is none, or it refuses the messages with an error of its own
        raise DataError(
            f"text_encoder.chat: the tokenizer of {cfg.path!r} cannot write a chat ({str(error).strip()[:200]!r}): "
            'name an instruction-tuned model, set chat to "" where it takes no system text, or use text_encoder.prefix'
        ) from error
    before, *rest = written.split(_MARK)
    if len(rest) != 1 or (system and system.strip() not in before):
        raise DataError(
            f"text_encoder.chat: the chat template of {cfg.path!r} does not write the system text and then the caption "
            f"once ({written[:200]!r}): use text_encoder.prefix"
        )
    return before, rest[0]
