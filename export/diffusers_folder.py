"""The folder around exported weights: the config of the same model in diffusers (its twin), what that cannot express,
scheduler, encoders and pipeline."""

import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from data.config import NONE, MoreTextConfig, TextEncoderConfig, TextModelConfig
from data.encoders.autoencoder import Autoencoder, load_autoencoder
from data.encoders.joined import naming_text_encoder
from data.encoders.template import template_of
from data.encoders.text import load_text_encoder, load_tokenizer, stored_text_encoder, tokenizer_subfolder
from data.errors import DataError
from trainer.build.engine import build_sampler
from trainer.config.resolve import resolve
from trainer.config.schema import TrainConfig
from trainer.diffusion.ddpm import BETA_RANGES

from . import pipeline as export_pipeline
from .forms import FLUX, shipped, twin_of
from .pipeline import TEXT_ENCODERS, TOKENIZERS, Template

Encoders = Literal["copy", "reference"]
_STOCK = {"pixart": "PixArtAlphaPipeline", "dit": "DiTPipeline"}
_STOCK_CLASSES = 1000  # the null label that DiTPipeline has in its code
_STOCK_TOKENS = 120  # to which PixArtAlphaPipeline cuts captions
_STOCK_SIZES = (32, 64, 128)  # latents that PixArtAlphaPipeline has sizes for; with micro-conditions the last alone


def _tokenizer_name(tokenizer: Any) -> str:
    """The class that reads the tokenizer's files under transformers 4 as well, where the one of tokenizer.json has a
    name of its own, which transformers 5 takes for the same."""
    name = type(tokenizer).__name__
    if name == "TokenizersBackend":
        return "PreTrainedTokenizerFast"
    return f"{name}Fast" if tokenizer.is_fast and not name.endswith("Fast") else name


def without_parts(config: TrainConfig) -> Iterator[str]:
    """Why no pipeline can be made: which encoders the config does not name."""
    if config.label_classes is None and config.text_encoder.path == NONE:
        more = ", and text_encoder.more=[...] with the path of each" if config.text_encoder.more else ""
        yield f"text_encoder.path is none: add text_encoder.path=FOLDER to the command{more}"
    if config.autoencoder.path == NONE and config.autoencoder.downsample != 1:
        yield "autoencoder.path is none, and the model is one of latents: add autoencoder.path=FOLDER to the command"


def twin_config(config: TrainConfig) -> dict[str, Any]:
    """The arguments of the twin, the class of diffusers that `twin_of` names."""
    model, channels = shipped(config), config.autoencoder.channels
    shared: dict[str, Any] = {
        "patch_size": model.patch_size,
        "in_channels": channels,
        "out_channels": channels * (1 + model.learn_sigma),
        "num_layers": model.depth,
        "attention_head_dim": model.head_dim,
        "num_attention_heads": model.width // model.head_dim,
    }
    if model.kind == "mmdit" and twin_of(model) == FLUX:
        return shared | {
            "in_channels": channels * model.patch_size**2,
            "num_layers": model.depth - model.single_depth,
            "num_single_layers": model.single_depth,
            "joint_attention_dim": config.text_encoder.total_width,
            "pooled_projection_dim": config.text_encoder.total_pooled or config.text_encoder.total_width,
            "guidance_embeds": False,
            "axes_dims_rope": [0, model.head_dim // 2, model.head_dim // 2],
        }
    if model.kind == "mmdit":
        return shared | {
            "sample_size": model.pos_embed_base_size * model.patch_size,
            "joint_attention_dim": config.text_encoder.total_width,
            "caption_projection_dim": model.width,
            "pooled_projection_dim": config.text_encoder.total_pooled or config.text_encoder.total_width,
            "pos_embed_max_size": model.pos_embed_max_size,
            "qk_norm": "rms_norm" if model.qk_norm else None,
        }
    if model.kind == "pixart":
        return shared | {
            "sample_size": model.pos_embed_base_size * model.patch_size,
            "cross_attention_dim": model.width,
            "interpolation_scale": model.pos_embed_interpolation,
            "use_additional_conditions": model.micro_conditions,
            "caption_channels": config.text_encoder.total_width,
            "norm_eps": 1e-6,
        }
    assert model.kind == "dit", model.kind
    return shared | {"sample_size": config.latent_size, "num_embeds_ada_norm": model.num_classes, "norm_eps": 1e-6}


def position_table(config: TrainConfig) -> Tensor:
    """Sin-cos positions [1, n^2, D], float32, as the other code bases store them."""
    model = shipped(config)
    assert model.kind != "uvit"
    largest = model.pos_embed_max_size if model.kind == "mmdit" else None
    base = config.latent_size // model.patch_size if model.kind == "dit" else model.pos_embed_base_size
    scale = model.pos_embed_interpolation if model.kind == "pixart" else 1
    made = PatchEmbed(
        height=base, width=base, patch_size=1, in_channels=1, embed_dim=model.width,
        interpolation_scale=scale, pos_embed_max_size=largest,  # pyright: ignore[reportArgumentType] (a float will do)
    )  # fmt: skip
    assert isinstance(made.pos_embed, Tensor)
    return made.pos_embed


def scheduler(config: TrainConfig) -> Any:
    """The scheduler of diffusers that samples as the config does. Its file holds the range of betas, not a table."""
    resolved = resolve(config, 1)
    if config.sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=resolved.time_shift)
    made = build_sampler(config, resolved).scheduler()  # type: ignore[attr-defined]
    schedule = config.objective.beta_schedule
    first, last = BETA_RANGES[schedule]
    ranges = {"trained_betas": None, "beta_schedule": schedule, "beta_start": first, "beta_end": last}
    return type(made).from_config({**made.config, **ranges})


def against_stock(config: TrainConfig, vae: Autoencoder | None) -> Iterator[str]:
    """Why the stock pipeline would fail, or sample otherwise than the model was trained, one reason each."""
    model = shipped(config)
    if model.kind not in _STOCK:
        if twin_of(model) == FLUX:
            stock, clips, other = "FluxPipeline", "a CLIP encoder", "does not guide by guidance_scale"
        else:
            stock, clips, other = "StableDiffusion3Pipeline", "two CLIP encoders", "shifts the last time twice"
        wants = "" if config.text_encoder.total_pooled else f"wants {clips} and "
        pads = all(one.pad for one in config.text_encoder.models)
        yield f"{stock} {other if pads else f'{wants}pads captions, which its transformer does not mask'}"
        return
    stock = _STOCK[model.kind]
    if config.objective.kind != "ddpm":
        yield f"{stock} does not shift the times of a {config.objective.kind} as in training"
    if config.autoencoder.path == NONE:
        yield f"{stock} needs an autoencoder, this is a model of pixels"
    elif vae is not None and (name := type(vae.model).__name__) != "AutoencoderKL":
        yield f"{stock} has an AutoencoderKL, not this model's {name}"
    elif vae is not None and isinstance(vae.shift, Tensor):
        yield f"{stock} ignores the autoencoder's latents_mean and latents_std"
    elif vae is not None and vae.shift:
        yield f"{stock} ignores the autoencoder's shift_factor {vae.shift:g}"
    if config.sample.guidance_channels is not None:
        yield f"{stock} guides all channels, not the first {config.sample.guidance_channels}"
    if config.sampler == "ancestral" and model.learn_sigma:
        yield f"{stock} drops the learned variance"
    if model.kind == "dit" and model.num_classes != _STOCK_CLASSES:
        yield f"{stock} takes label {_STOCK_CLASSES} for no class, this model {model.num_classes}"
    if model.kind == "pixart":
        base, sizes = model.pos_embed_base_size * model.patch_size, _STOCK_SIZES[-model.micro_conditions :]
        if base != config.latent_size or base not in sizes:
            rows = ", ".join(map(str, sizes))
            yield f"{stock} knows latents of {rows} rows for such a model, this one has {config.latent_size}"
        if config.text_encoder.max_length != _STOCK_TOKENS:
            yield f"{stock} cuts captions at {_STOCK_TOKENS} tokens, not at {config.text_encoder.max_length}"
        if not is_plain(config.text_encoder):
            yield f"{stock} takes the last states of one text encoder, for the captions as they are"
        if stored_text_encoder(config.text_encoder)[0] != "T5EncoderModel":
            yield f"{stock} has a T5 encoder, not the one at {config.text_encoder.path}"


def write_folder(config: TrainConfig, folder: Path, encoders: Encoders, own: bool) -> list[str]:
    """Write everything of a diffusers folder but the transformer's weights and the card.

    own: write our pipeline in any case. Returns why the pipeline is our own; an empty list where it is the stock one.
    """
    twin = twin_of(shipped(config))
    transformer = {"_class_name": twin, "_diffusers_version": version("diffusers")}
    (folder / "transformer").mkdir()
    _write_json(folder / "transformer" / "config.json", transformer | twin_config(config))
    made = scheduler(config)
    made.save_pretrained(folder / "scheduler")
    loaded = load_autoencoder(config.autoencoder, "cpu", torch.float32)
    vae = loaded if isinstance(loaded, Autoencoder) else None
    parts, settings = _write_encoders(config, folder, vae, encoders)
    index: dict[str, Any] = {
        "transformer": ["diffusers", twin],
        "scheduler": ["diffusers", type(made).__name__],
        **parts,
    }
    reasons = list(against_stock(config, vae)) or (["it was asked for"] if own else [])
    if not reasons:
        if config.model.kind == "dit":  # whose stock pipeline takes labels
            del index["text_encoder"], index["tokenizer"]
        _write_json(folder / "model_index.json", {"_class_name": _STOCK[config.model.kind], **_head(), **index})
        return []
    if encoders == "reference":
        index |= {part: [None, None] for part in parts}
    settings |= {
        "latent_size": config.latent_size,
        "pixels_per_latent": getattr(config.model, "pixels_per_latent", config.autoencoder.downsample),
        "max_length": config.text_encoder.max_length,
        "steps": config.sample.steps,
        "guidance": config.sample.guidance,
        "guidance_channels": config.sample.guidance_channels,
    }
    index = {"_class_name": ["pipeline", export_pipeline.MuDiTPipeline.__name__], **_head(), **index}
    _write_json(folder / "model_index.json", index | settings)
    shutil.copyfile(export_pipeline.__file__, folder / "pipeline.py")
    return reasons


def _write_encoders(
    config: TrainConfig, folder: Path, vae: Autoencoder | None, encoders: Encoders
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the encoders, or note where they lie: ({part: [library, class]} of model_index.json, what else our pipeline
    is to know of them)."""
    parts: dict[str, Any] = {part: [None, None] for part in ("vae", "text_encoder", "tokenizer")}
    settings: dict[str, Any] = {}
    if vae is not None:
        name = type(vae.model).__name__
        parts["vae"] = ["diffusers", name]
        if encoders == "copy":
            vae.model.save_pretrained(folder / "vae")
        else:
            settings["vae_source"] = [config.autoencoder.path, config.autoencoder.subfolder, name]
    text = config.text_encoder
    if config.label_classes is not None:
        return parts, settings
    forms = []
    for number, one in enumerate(text.models):
        name, tokenizer = TEXT_ENCODERS[number], TOKENIZERS[number]
        with naming_text_encoder(number):
            form = _text_form(one)
            if encoders == "copy":
                classes = _copy_text_encoder(one, folder / name, folder / tokenizer)
            else:
                form["source"] = _source(one)
                classes = form["source"][0], "T5TokenizerFast"
        parts |= {part: ["transformers", kind] for part, kind in zip((name, tokenizer), classes, strict=True)}
        forms.append(form)
    if not is_plain(text):
        settings["text_forms"] = forms
    elif encoders == "reference":
        settings["text_encoder_source"] = forms[0]["source"]
    return parts, settings


def is_plain(text: TextEncoderConfig) -> bool:
    """Whether there is one text encoder, which reads the captions as they are and whose last states are taken."""
    keys = ("prefix", "chat", "layers", "pad", "pooled_width", "more")
    return all(getattr(text, key) == getattr(TextEncoderConfig, key) for key in keys)


def _text_form(cfg: TextModelConfig) -> dict[str, Any]:
    """The fields of pipeline.TextForm that are not its defaults, but for the source."""
    form: dict[str, Any] = {"max_length": cfg.max_length}
    form |= {"layers": list(cfg.layers)} if cfg.layers else {}
    form |= {"pad": True} if cfg.pad else {}
    form |= {"pooled": True} if cfg.pooled_width else {}
    form |= {"join": cfg.join} if isinstance(cfg, MoreTextConfig) and cfg.join != "tokens" else {}
    if cfg.prefix or cfg.chat is not None:
        template = template_of(cfg, load_tokenizer(cfg))
        assert template is not None
        form["template"] = [getattr(template, name) for name in Template._fields]
    return form


def _source(cfg: TextModelConfig) -> list[str | None]:
    """TextForm.source. Raises DataError where no class of transformers reads the encoder alone from there."""
    name, _ = stored_text_encoder(cfg)
    if name is None:
        raise DataError(
            f"text_encoder.path: {cfg.path!r} holds a model of text and images, of which transformers does not load "
            "the text encoder alone: leave out --encoders reference, so that it is copied"
        )
    return [name, cfg.path, cfg.subfolder, tokenizer_subfolder(cfg)]


def _copy_text_encoder(cfg: TextModelConfig, folder: Path, tokenizer_folder: Path) -> tuple[str, str]:
    """Write an encoder in the precision in which it is stored, but never in float16, where T5 overflows, and its
    tokenizer. -> their classes in transformers."""
    _, stored = stored_text_encoder(cfg)
    text = load_text_encoder(cfg, "cpu", torch.bfloat16 if stored == torch.float16 else stored)
    text.save(folder, tokenizer_folder)
    return type(text.model).__name__, _tokenizer_name(text.tokenizer)


def _head() -> dict[str, str]:
    return {"_diffusers_version": version("diffusers")}


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
