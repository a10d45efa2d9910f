"""Several text encoders side by side: their states lie behind each other along the tokens or the features."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
import torch.nn.functional as F

from ..config import TextEncoderConfig
from ..errors import DataError
from .text import Encoded, TextEncoder, load_text_encoder

_KEY = re.compile(r"\btext_encoder\.(?=(path|subfolder|max_length|width|prefix|chat|layers|pad|pooled_width)\b)")


class JoinedTextEncoder:
    """Text encoders whose states the model sees as those of one.

    cfg: says how they are joined. parts: the encoders, in its order. width: E, max_length: L and pooled_width: P, of
    all together. fingerprint, weights: of all together, see TextEncoder.
    """

    def __init__(self, cfg: TextEncoderConfig, parts: tuple[TextEncoder, ...]) -> None:
        self.parts = parts
        self.width, self.max_length, self.pooled_width = cfg.total_width, cfg.total_length, cfg.total_pooled
        self._joins = [one.join for one in cfg.more]

    @property
    def fingerprint(self) -> str:
        """That of all encoders, with how they are joined, and where each is cut."""
        joins = [[part.fingerprint, part.max_length, part.pooled_width] for part in self.parts]
        return hashlib.sha256(json.dumps([joins, self._joins]).encode()).hexdigest()

    @property
    def weights(self) -> str | None:
        """Digest of the weights of all encoders; None where one has none."""
        digests = [part.weights for part in self.parts]
        return None if None in digests else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def encode(self, captions: list[str], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """See TextEncoder.encode."""
        states, mask, _ = self.encode_pooled(captions, length)
        return states, mask

    @torch.no_grad()
    def encode_pooled(self, captions: list[str], length: int | None = None) -> Encoded:
        """b captions -> (states [b, L, E], their mask bool [b, L], pooled vectors [b, P]).

        Padding follows the tokens of all encoders. length: as max_length, the only one.
        """
        assert length in (None, self.max_length), length
        first, *others = (part.encode_pooled(captions) for part in self.parts)
        blocks, pooled = [first[:2]], [first[2]]
        for join, (states, mask, vector) in zip(self._joins, others, strict=True):
            if join == "features":
                blocks[-1] = _along_features(*blocks[-1], states, mask)
            elif join == "tokens":
                blocks.append((states, mask))
            pooled.append(vector)
        if len(blocks) == 1:
            return *blocks[0], torch.cat(pooled, -1)
        states = torch.cat([F.pad(each, (0, self.width - each.shape[-1])) for each, _ in blocks], 1)  # [b, L, E]
        mask = torch.cat([each for _, each in blocks], 1)  # [b, L]
        order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)  # [b, L], tokens first
        return torch.take_along_dim(states, order[..., None], 1), mask.gather(1, order), torch.cat(pooled, -1)


def _along_features(
    states: torch.Tensor, mask: torch.Tensor, more: torch.Tensor, more_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States [b, K, D] and [b, M, F] -> [b, max(K, M), D + F], with the mask of those tokens that either has."""
    length = max(mask.shape[1], more_mask.shape[1])
    joined = [F.pad(each, (0, 0, 0, length - each.shape[1])) for each in (states, more)]
    masks = [F.pad(each, (0, length - each.shape[1])) for each in (mask, more_mask)]
    return torch.cat(joined, -1), masks[0] | masks[1]


AnyTextEncoder: TypeAlias = TextEncoder | JoinedTextEncoder


def join_text_encoders(cfg: TextEncoderConfig, parts: tuple[TextEncoder, ...]) -> AnyTextEncoder:
    """The loaded encoders of a config as one."""
    return JoinedTextEncoder(cfg, parts) if cfg.more else parts[0]


def load_text_encoders(cfg: TextEncoderConfig, device: torch.device | str, dtype: torch.dtype) -> AnyTextEncoder:
    """The text encoder of a config, or all of them as one; see load_text_encoder."""
    parts = []
    for number, one in enumerate(cfg.models):
        with naming_text_encoder(number):
            parts.append(load_text_encoder(one, device, dtype))
    return join_text_encoders(cfg, tuple(parts))


@contextmanager
def naming_text_encoder(number: int) -> Iterator[None]:
    """A block of code whose DataError names the keys of text encoder `number` of a config, 0 the first."""
    try:
        yield
    except DataError as error:
        if number == 0:
            raise
        raise DataError(_KEY.sub(f"text_encoder.more.{number - 1}.", str(error))) from error
