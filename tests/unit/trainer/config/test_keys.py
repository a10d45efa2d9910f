"""What is declared at each key: class, range and help."""

import typing

import pytest
from annotated_types import Ge, Gt, Le, Lt

from models.registry import MODEL_KINDS
from trainer.config.keys import KeyClass, declaration, flatten, key_class, leaf_keys
from trainer.config.schema import TrainConfig
from trainer.evaluate.suite import SuiteConfig

KEYS = [(kind, key) for kind, model in MODEL_KINDS.items() for key in leaf_keys(TrainConfig, model)]

# Decision 10, by key: a new key must be given a class here as well, on purpose. A key that is listed by its own name is
# an exception from its section.
SCHEDULE = {"train.steps", "optim.", "ema."}
RUNTIME = {"run.", "parallel.", "validation.", "sample.", "tracking.", "wandb."}
RUNTIME |= {"train.micro_batch_size", "train.deterministic"}
RUNTIME |= {f"train.{name}_every" for name in ("log", "validate", "checkpoint", "sample", "ema_snapshot")}
RUNTIME |= {"train.evaluate_every", "train.evaluate_suite"}
RUNTIME |= {
    f"train.{key}"
    for key in ("checkpoint_async", "rollback_after", "max_skipped_steps", "watchdog_factor", "watchdog_min_s")
}
RUNTIME |= {"data.shards", "data.val_shards", "data.num_workers", "data.max_bad_share", "data.sources"}
RUNTIME |= {f"data.{key}" for key in ("captions", "index_cache", "prefetch_mib", "timeout_s", "retries")}
RUNTIME |= {"data.cache_dir", "data.cache_gib", "data.caption_key"}
RUNTIME |= {f"{part}.{key}" for part in ("text_encoder", "autoencoder") for key in ("path", "subfolder")}
RUNTIME |= {"text_encoder.device", "text_encoder.shard"}
RUNTIME |= {"objective.repa_encoder", "stages"}
SCHEDULE |= {"objective.repa_until"}
IDENTITY = {"model.", "mup.", "train.seed", "train.global_batch_size"}
IDENTITY |= {"optim.kind", "optim.muon.by_head", "optim.muon.include", "optim.muon.exclude"}
IDENTITY |= {f"data.{key}" for key in ("resolution", "crop", "flip", "epochs", "max_image_pixels", "label_dropout")}
IDENTITY |= {f"data.{key}" for key in ("buckets", "max_aspect", "text_lengths", "characters_per_token")}
IDENTITY |= {
    f"data.filter.{key}"
    for key in ("has_caption", "min_caption_length", "max_caption_length", "min_side", "max_aspect", "scores")
}
IDENTITY |= {"data.caption_fields", "data.first_step"}
IDENTITY |= {f"objective.{key}" for key in ("kind", "beta_schedule", "timestep_mean", "timestep_std")}
IDENTITY |= {
    f"objective.{key}" for key in ("shift_base_tokens", "repa_weight", "repa_layer", "repa_width", "repa_hidden")
}
IDENTITY |= {"objective.repa_projector", "objective.repa_spatial_norm"}
IDENTITY |= {f"objective.{key}" for key in ("predict", "x_clamp", "uniform_share", "contrastive_weight")}
IDENTITY |= {f"text_encoder.{key}" for key in ("max_length", "dropout", "width")}
IDENTITY |= {f"text_encoder.{key}" for key in ("prefix", "chat", "thinking", "layers", "pad", "pooled_width", "more")}
IDENTITY |= {f"autoencoder.{key}" for key in ("channels", "downsample")}


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_every_key_has_its_class(kind: str, key: str) -> None:
    """That of commit 0db30ff, which kept them in a dictionary beside the keys."""
    classes = (("schedule", SCHEDULE), ("runtime", RUNTIME), ("identity", IDENTITY))
    own = [name for name, keys in classes if key in keys]
    here = own or [name for name, keys in classes if f"{key.partition('.')[0]}." in keys]
    assert here == [key_class(key)], key
    assert key_class(key) in typing.get_args(KeyClass)


def test_a_key_that_is_no_more_has_the_class_of_its_section() -> None:
    """A checkpoint of older code may hold it."""
    assert key_class("optim.gone") == "schedule"
    assert key_class("model.gone.deep") == "identity"


# Numbers that may be anything, and lists, whose numbers trainer.config.conflicts checks.
WITHOUT_RANGE = {"objective.timestep_mean", "optim.betas", "ema.decays", "data.text_lengths", "text_encoder.layers"}


def is_number(annotation: object) -> bool:
    return annotation in (int, float) or any(map(is_number, typing.get_args(annotation)))


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_every_key_has_its_help_and_its_range(kind: str, key: str) -> None:
    field = declaration(TrainConfig, key.split("."), MODEL_KINDS[kind])
    assert field is not None
    assert field.description, key
    assert field.description.rstrip().endswith("."), "a sentence"
    has_range = any(isinstance(item, Ge | Gt | Le | Lt) for item in field.metadata)
    assert has_range == (is_number(field.annotation) and key not in WITHOUT_RANGE)


def test_every_section_has_its_help() -> None:
    sections = [field.annotation for name, field in TrainConfig.model_fields.items() if name != "model"]
    for section in (*sections, *MODEL_KINDS.values(), TrainConfig, SuiteConfig):
        assert (section.__doc__ or "").partition("\n")[0].endswith((".", ",")), section


def test_flatten() -> None:
    assert flatten({"optim": {"lr": 1, "b": {}}, "c": {"d": {"e": [2]}}}) == {"optim.lr": 1, "c.d.e": [2]}
