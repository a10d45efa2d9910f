"""The least that meta.json of a checkpoint must say."""

from typing import Any


def meta_of(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "config": {"ema": {"decays": [0.9999]}},
        "mup": {"sha256": "0" * 64, "settings": {"parametrization": "mup"}, "rows": {}},
        "fingerprints": {},
        **more,
    }
