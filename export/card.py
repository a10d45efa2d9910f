"""README.md of an exported folder: the card that model hubs show, with what is known of the run, and what is not.

What it tells leaves this machine: secrets, and the folders in which files lie here, are taken out of it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData

from data.errors import DataError
from data.redaction import redact, unsigned
from data.templates import render
from trainer.config.keys import flatten, plain
from trainer.config.load import load_config
from trainer.config.schema import RunConfig, TrackingConfig, TrainConfig, WandbConfig
from trainer.config.stages import stage_at
from trainer.config.yaml_files import read
from trainer.errors import ConfigError
from trainer.files import write_atomically
from trainer.monitor.plots import plot_loss
from trainer.monitor.records import METRICS, read_metrics
from trainer.page.curves import is_regular
from trainer.page.run_data import read_prompts, read_sample, samples_of

from .diffusers_folder import Encoders
from .forms import Format

_OWN = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True)  # runs this folder's pipeline.py
pipe(PROMPT).images[0].save("image.png")
```

The pipeline is this folder's own, because {reasons}.
"""
_STOCK_USE = """```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER"{parts})
pipe(PROMPT, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("image.png")
```
"""
_LOWER = "\nThis pipeline of diffusers turns prompts into lower case; `--pipeline own` of the export does not.\n"
_OFFICIAL = """The names are those of the official repository: `load_state_dict` of its model, built with these sizes.
Steps of time count from 0 to 999, as in the official code of DiT; U-ViT counts from 1: give its model n - 1.
"""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")  # as hubs name licences: apache-2.0, openrail++
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_DATA = re.compile(r"(?:hf://datasets/|https?://huggingface\.co/datasets/)([\w.-]+/[\w.-]+)")
_BASE = ("kind", "lr", "betas", "eps", "weight_decay", "decay", "clip_norm", "schedule", "warmup_steps", "decay_steps")
_MOST_ROWS = 10  # of validations in the table
_LEVELS = ("val_loss_t", "val_loss_ema_t")  # the losses at each noise level, one column each
_LOCAL = re.compile(r"\b(?:file|local):", re.IGNORECASE)
# In prose: a file: URL, or what begins with /, ~ or a dot and holds a slash. "images/s" and "1/2" do not, nor do URLs.
_PLACE = re.compile(rf"{_LOCAL.pattern}\S*|(?<![\w/.~}}-])(?:[~.][\w.-]*)?(?:/(?!/)|(?<!:)/)\S*", re.IGNORECASE)
# In a list of overrides: all that holds a slash, from the = on.
_WITH_SLASH = re.compile(r"(?:(?<==)|(?<!\S))[^\s=]*/\S*")
_STUDY = re.compile(r"study: (.+), (.+? with .*)")  # as search/transfer.py writes it
_TABLE_OF_TARGET = "muP table of the target: sha256 "  # as search/transfer.py writes it


class About(NamedTuple):
    """What the card tells beside the checkpoint itself. license: as hubs name it. transferred: a config that
    launch/search.py transfer has written."""

    checkpoint: Path
    license: str | None = None
    transferred: Path | None = None


def check_about(about: About, meta: Mapping[str, Any]) -> None:
    """Raise ConfigError where what the card is to tell is not so."""
    if about.license is not None and _LICENSE.fullmatch(about.license) is None:
        raise ConfigError(f"--license {about.license!r} is no name of a licence: give one as in apache-2.0, or other")
    if about.transferred is not None:
        _origin(about.transferred, meta)


def write_card(
    folder: Path,
    config: TrainConfig,
    meta: Mapping[str, Any],
    about: About,
    form: Format,
    weights: str,
    reasons: list[str],
    encoders: Encoders,
) -> None:
    """Write README.md, and the pictures that it shows. reasons: why the pipeline is our own."""
    run = _run_folder(about.checkpoint)
    logged = read_metrics(run) if run is not None and is_regular(run / METRICS) else []
    records = [record for record in logged if record["step"] <= meta["step"]]
    if records:
        plot_loss(records, folder / "loss.png")
    grid, prompts = _grid(run, meta["step"], folder / "samples.png")
    columns, rows = _validations(records)
    settings = config.model_copy(update={"run": RunConfig(), "wandb": WandbConfig(), "tracking": TrackingConfig()})
    text = render(
        Path(__file__).with_name("templates") / "card.md",
        front=_front_matter(config, about, form).to_yaml().strip(),
        name=meta["config"].get("run", {}).get("name") or config.model.kind,
        kind="text-to-image" if config.label_classes is None else "class-conditional",
        parametrization=meta["mup"]["settings"]["parametrization"],
        parameters=sum(math.prod(row["shape"]) for row in meta["mup"]["rows"].values()),
        images=_images(meta),
        sources=_sources(config),
        base=_base(config),
        transferred=_origin(about.transferred, meta) if about.transferred else "",
        use=_use(config, form, reasons, encoders),
        yaml=yaml.safe_dump(public(plain(settings)), sort_keys=False),
        curve=bool(records),
        license=about.license,
        weights=weights,
        meta=meta,
        config=config,
        columns=columns,
        rows=rows,
        grid=grid,
        prompts=prompts,
    )
    write_atomically(folder / "README.md", re.sub(r"\n{3,}", "\n\n", text))


def public(value: Any, key: str = "") -> Any:
    """A value of a config, or a part of one, as anyone may read it: without secrets and folders of this machine."""
    if isinstance(value, Mapping):
        return {name: public(part, str(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [public(part, key) for part in value]
    if not isinstance(value, str) or key in ("prompts", "prefix"):
        return redact(value) if isinstance(value, str) else value
    if "::" in value:  # as fsspec chains places
        return "::".join(public(part, key) for part in value.split("::"))
    if "://" in value and not _LOCAL.search(value):
        return redact(unsigned(value))
    is_path = "/" in value and not (key == "path" and is_hub_id(value))
    return redact(_last(value) if is_path else value)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def is_hub_id(path: str) -> bool:
    """Whether the path of an encoder names one on a hub, and not a folder here."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def _run_folder(checkpoint: Path) -> Path | None:
    """The run folder that holds a checkpoint or a snapshot of averages; None where it was imported or moved."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / "mup.json").is_file() else None


def _front_matter(config: TrainConfig, about: About, form: Format) -> ModelCardData:
    text = config.label_classes is None
    named = " ".join(str(value) for value in flatten(plain(config)["data"]).values())
    return ModelCardData(
        license=about.license,
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        library_name="diffusers" if form == "diffusers" else None,
        tags=["diffusion", "mup", config.model.kind, *([] if text else ["class-conditional"])],
        datasets=sorted({*_HUB_DATA.findall(named)}) or None,
    )


def _images(meta: Mapping[str, Any]) -> int | None:
    try:
        return stage_at(TrainConfig.model_validate(meta["config"]), meta["step"]).images(meta["step"])
    except ValueError:  # of an older version
        return None


def _sources(config: TrainConfig) -> list[str]:
    data = config.data
    named = [(str(public(source.shards)), f", weight {source.weight:g}") for source in data.sources]
    if not named and data.shards:
        named = [(str(public(data.shards)), "")]
    return [f"`{shards}`{weight}" for shards, weight in named]


def _base(config: TrainConfig) -> dict[str, str]:
    flat = flatten(plain(config))
    keys = [f"optim.{key}" for key in _BASE] + ["train.global_batch_size", "train.steps"]
    keys += [key for key in flat if key.startswith("mup.") and flat[key] not in (None, {}, 1.0)]
    return {key: str(flat[key]) for key in keys if key in flat}


def _origin(transferred: Path, meta: Mapping[str, Any]) -> str:
    """The account at the head of a transferred config, without folders. Raises ConfigError where it is no such file, or
    that of another model or of other values."""
    try:
        lines = transferred.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--transferred {transferred} cannot be read: {error}") from None
    head = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    tables = [line.removeprefix(_TABLE_OF_TARGET) for line in head if line.startswith(_TABLE_OF_TARGET)]
    if not tables:
        raise ConfigError(f"--transferred {transferred} is no config that launch/search.py transfer has written")
    if tables != [meta["mup"]["sha256"]]:
        raise ConfigError(f"--transferred {transferred} is of another model: its muP table is not the checkpoint's")
    own, run = flatten(plain(load_config(str(transferred)))), flatten(meta["config"])
    given = flatten({key: part for key, part in read(transferred).items() if key in ("optim", "mup")})
    if other := [f"{key} {own[key]}, {run.get(key)} in the run" for key in given if own.get(key) != run.get(key)]:
        raise ConfigError(f"--transferred {transferred} has other values: {'; '.join(other)}")
    return _told("\n".join(head))


def _told(account: str) -> str:
    """A transfer's account as anyone may read it. It is prose, in which a slash alone makes no path."""
    if study := _STUDY.search(account):
        folder, proxy = study[1], _WITH_SLASH.sub(lambda found: str(public(found[0])), study[2])
        account = account.replace(study[0], f"study: {folder}, {proxy}")
        account = account.replace(folder, _last(folder)) if "/" in folder else account
    words = re.sub(r"\S*://\S*", lambda found: str(public(found[0])), account)
    return redact(_PLACE.sub(lambda found: _last(found[0]), words))


def _validations(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of what was measured, the last one among the rows."""
    measured = [record for record in records if any(key.startswith("val_loss") for key in record)]
    kept = measured[:: -max(1, math.ceil(len(measured) / _MOST_ROWS))][::-1]
    keys = {key: None for record in kept for key, value in record.items() if isinstance(value, float)}
    columns = [key for key in keys if key.startswith("val_") and not key.startswith(_LEVELS)]
    rows = [[str(record["step"]), *(_figure(record.get(key)) for key in columns)] for record in kept]
    return ["step", *columns], rows


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _grid(run: Path | None, step: int, to: Path) -> tuple[int | None, list[str]]:
    """Copy the newest grid of samples up to a step that is a picture in the run folder itself: (its step, its prompts).
    What a link there leads to is not the run's, and would be published with the folder."""
    if run is None:
        return None, []
    for found in sorted((at for at, _ in samples_of(run) if at <= step), reverse=True):
        try:
            picture = read_sample(run, found)
        except (OSError, DataError):  # damaged: the one before it is shown, by its step
            continue
        to.write_bytes(picture)
        return found, [prompt.replace("`", "'") for prompt in read_prompts(run)]
    return None, []


def _use(config: TrainConfig, form: Format, reasons: list[str], encoders: Encoders) -> str:
    """How the folder is sampled."""
    text = config.label_classes is None
    prompt = '"a red apple"' if text else "[7]"
    if form == "official":
        return _OFFICIAL
    if reasons:
        told = "; ".join(reasons).replace(config.text_encoder.path, public(config.text_encoder.path, "path"))
        return _OWN.replace("PROMPT", prompt).format(reasons=told)
    parts = ", ".join(["", *(["vae=..."] if encoders == "reference" else [])])
    parts += ", text_encoder=..., tokenizer=..." if text and encoders == "reference" else ""
    use = _STOCK_USE.replace("PROMPT", prompt).format(
        parts=parts, steps=config.sample.steps, guidance=config.sample.guidance
    )
    use += _LOWER if text else ""
    if encoders == "reference":
        vae, encoder = (public(section.path, "path") for section in (config.autoencoder, config.text_encoder))
        use += f"\nLoad the autoencoder from `{vae}`"
        use += f", the text encoder from `{encoder}`.\n" if text else ".\n"
    return use
