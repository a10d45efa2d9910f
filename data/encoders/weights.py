"""Weights that a library loads: none of the model's may be missing, and none of the file's without a place.

The libraries fill what is missing with random numbers and leave out what they do not know, with a warning at most.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import DataError
from .loading import load_error

# Of a model's weights that are in the file, but not in the part of it that is used: heads of what it was trained for,
# the image's half of CLIP, and buffers that older versions stored.
SPARE = (
    r"(model\.)?(decoder|lm_head|cls|classifier|mlm_head|vision_model|visual_projection|text_projection|logit_scale)\b",
    r"(model\.)?(visual|vision_tower|multi_modal_projector)\b",
    r"(.*\.)?(position_ids|inv_freq|embed_tokens\.weight)$",
)
# Of a model's weights that are not in the file: they are not in the way of the tokens' states.
ABSENT = (r"(.*\.)?pooler\.", r"embeddings\.mask_token$")


def load_whole(model_class: Any, key: str, path: str, subfolder: str | None = None, **options: Any) -> Any:
    """model_class.from_pretrained of transformers, where every weight finds its place and is a finite number.

    Names may stand behind a prefix that the file adds (a wrapper's "module." or "_orig_mod.", ComfyUI's) or lacks (a
    module that was saved without the one that holds it). key: of the config, which names the path. Raises DataError
    where the files cannot be read, or weights are missing, unexpected, of other shapes or not finite.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"subfolder": subfolder} if subfolder else {}
    try:
        model, found = model_class.from_pretrained(path, trust_remote_code=False, **options)
        if renaming := _renaming(found["missing_keys"], found["unexpected_keys"]):
            model, found = model_class.from_pretrained(path, trust_remote_code=False, key_mapping=renaming, **options)
    except Exception as error:  # the libraries raise errors of any kind where a file is damaged
        raise load_error(key, path, subfolder, error) from error
    check_whole(model, found, key, str(Path(path, subfolder or "")))
    return model


def check_whole(model: nn.Module, found: Mapping[str, Any], key: str, path: str) -> None:
    """Raise DataError where weights of a model have no place or are not finite. found: what its library tells of
    loading it from `path`."""
    missing = _without(found["missing_keys"], ABSENT)
    unexpected = _without(found["unexpected_keys"], SPARE)
    # (name, shape of the file, shape of the model)
    shapes = [f"{name} is {list(file)} and not {list(model)}" for name, file, model in found["mismatched_keys"]]
    whole = not (missing or shapes)
    infinite = [n for n, weight in model.named_parameters() if whole and not bool(weight.isfinite().all())]
    problems = [
        f"{len(names)} weights {what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for names, what in (
            (missing, "of the model are not there"),
            (unexpected, "there are not the model's"),
            (shapes, "have another shape"),
            (infinite, "are not finite numbers"),
        )
        if names
    ]
    if problems:
        raise DataError(
            f"{key}: the weights in {path!r} are not those of its config.json, or are damaged ({'; '.join(problems)}): "
            "take both files from one place, of one model, under the names that the library gives them"
        )


def _without(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    return sorted(name for name in names if not any(re.match(pattern, name) for pattern in patterns))


def _renaming(missing: Collection[str], unexpected: Collection[str]) -> dict[str, str]:
    """Patterns that turn the file's names into the model's, where a prefix is all that sets them apart; else {}."""
    for name in sorted(_without(missing, ABSENT))[:1]:
        for other in sorted(unexpected):
            if other.endswith(f".{name}"):
                return {f"^{re.escape(other.removesuffix(name))}": ""}
            if name.endswith(f".{other}"):
                return {"^": name.removesuffix(other)}
    return {}
