"""pydantic's findings as sentences that name the key, what is expected and what was given."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from data.redaction import one_line, quote
from models.model_config import ModelConfig
from models.registry import MODEL_KINDS

from .keys import declaration
from .yaml_files import nearest

MOST_PROBLEMS = 50  # that one message names
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def range_text(field: FieldInfo) -> str:
    """The range that is declared at a key, as it stands after "must be"; empty where none is."""
    bounds = {
        sign: getattr(item, sign) for item in field.metadata for sign in ("ge", "gt", "le", "lt") if hasattr(item, sign)
    }
    if bounds.keys() == {"ge", "le"}:
        return f"between {bounds['ge']:g} and {bounds['le']:g}"
    words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return " and ".join(f"{words[sign]} {bound:g}" for sign, bound in bounds.items())


def explain(
    error: ValidationError, section: type, model: type[ModelConfig], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(key, sentence) of everything that pydantic found wrong with the data of a section. model: the kind that the
    section `model` is of. prefix: what the names of the section's keys begin with ("model.")."""
    for item in itertools.islice(error.errors(), MOST_PROBLEMS):
        # pydantic puts the kind of the model between `model` and its keys.
        of_model = item["loc"][:1] == ("model",) and item["loc"][1:2] and item["loc"][1] in MODEL_KINDS
        path = ("model", *item["loc"][2:]) if of_model else item["loc"]
        key = prefix + ".".join(one_line(str(part), 100) for part in path)
        field = declaration(section, path, MODEL_KINDS[str(item["loc"][1])] if of_model else model)
        yield key, _sentence(key, item, field)


def _sentence(key: str, item: Mapping[str, Any], field: FieldInfo | None) -> str:
    message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    got = f"got {quote(item['input'])}"
    match item["type"]:
        case "union_tag_invalid":
            kind, known = item["ctx"]["tag"], list(MODEL_KINDS)
            return f"{key}.kind: {quote(kind)} is none of {', '.join(known)}{nearest(kind, known)}"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{key}: unknown key"
        case "missing":
            return f"{key}: must be given"
        case "value_error" | "assertion_error":  # our own, most of which name the key
            return message if message.startswith(key) else f"{key}: {message}"
        case kind if kind in _OUT_OF_RANGE and field is not None:
            null = ", or null" if type(None) in getattr(field.annotation, "__args__", ()) else ""
            return f"{key} must be {range_text(field)}{null}, {got}"
        case _:
            return f"{key}: {message}, {got}" if key else message
