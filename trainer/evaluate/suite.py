"""What an evaluation is: every choice that moves a number, as configs/evaluate/NAME.yaml. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from data.files import json_digest

from ..config.keys import plain
from ..config.load import parse, validated
from ..config.schema import GuidanceBy, Section, TrainConfig
from ..config.yaml_files import find_config, nearest, override, read
from ..errors import ConfigError

Metric = Literal[
    "fid", "sfid", "kid", "inception_score", "precision_recall", "clip_score", "geneval", "fd_dinov2", "cmmd",
    "dpg_bench",
]  # fmt: skip
CLASSES, RANDOM_CLASSES = "classes", "random_classes"
ON_FEATURES: frozenset[Metric] = frozenset({"fid", "sfid", "kid", "inception_score", "precision_recall"})
AGAINST_REFERENCE: frozenset[Metric] = frozenset({"fid", "sfid", "kid", "precision_recall", "fd_dinov2", "cmmd"})
# Where something lies on this machine; what it holds goes into the protocol in its place.
_PATHS = (
    "prompts", "reference", "network", "network_sha256", "clip", "detector", "dino", "cmmd_clip", "vqa", "vae",
)  # fmt: skip
# Of the checkpoint's config: where encoders lie (the protocol has the autoencoder's fingerprint), and what moves a
# figure by rounding at most.
_OF_CONFIG = (
    *(f"text_encoder.{key}" for key in ("path", "subfolder", "device", "shard", "more")),
    *(f"autoencoder.{key}" for key in ("path", "subfolder")),
    *(f"parallel.{key}" for key in ("engine", "zero_stage", "shard", "compile")),
    *(f"parallel.{key}" for key in ("reshard_after_forward", "prefetch", "cpu_offload", "cuda_graph")),
)


class FlowSampling(Section):
    """How models are sampled that were trained with objective.kind rectified_flow."""

    sampler: Literal["euler"] = "euler"
    """Sampler, of which there is one."""
    steps: int = Field(ge=1)
    """Sampling steps per image."""


class DiffusionSampling(Section):
    """How models are sampled that were trained with objective.kind ddpm."""

    sampler: Literal["ancestral", "ddim", "dpm_solver", "dpm_solver_sigma_min"]
    """Sampler, as sample.sampler."""
    steps: int = Field(ge=1)
    """Sampling steps per image."""


class SuiteConfig(Section):
    """What is measured, on which images, and against what."""

    metrics: tuple[Metric, ...] = Field(min_length=1)
    """What is measured."""
    prompts: str
    """A .txt, .jsonl or .json file, shards whose captions are the prompts, `classes` (all of them in turn), or
    `random_classes` (one is drawn for each image, as ADM does). For dpg_bench its .csv of prompts and questions."""
    count: int | None = Field(default=None, ge=1)
    """Number of images; null makes images_per_prompt of each prompt."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Images per prompt, where count is null."""
    seed: int = Field(default=0, ge=0)
    """Seed of the noise and of random classes."""
    batch_size: int = Field(default=50, ge=1)
    """Images that are made at once, on any number of processes: equal shapes give equal bits."""
    rectified_flow: FlowSampling | None = None
    """How models of objective.kind rectified_flow are sampled; null refuses them."""
    ddpm: DiffusionSampling | None = None
    """How models of objective.kind ddpm are sampled; null refuses them."""
    guidance: float = Field(ge=0)
    """Scale of the guidance; 1 is no guidance."""
    guidance_by: GuidanceBy = "condition"
    """What guidance leads away from, as sample.guidance_by."""
    guidance_channels: int | None = Field(default=None, ge=1)
    """Number of guided channels, counted from the first; null guides all."""
    resolution: int | None = Field(default=None, ge=1)
    """Side in pixels of the images that the suite is defined for; null takes any."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number type of the computation."""
    vae: str | None = None
    """Autoencoder that decodes; null takes that of the checkpoint's config. Its fingerprint is in the results."""
    image_format: Literal["png", "jpeg"] = "png"
    """How images are stored; they are measured as they are read back."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """Quality of JPEG files."""
    reference: str | None = None
    """Published statistics (.npz with mu and sigma; mu_s and sigma_s for sfid), a folder of images, or shards."""
    reference_count: int | None = Field(default=None, ge=2)
    """Size of a fixed subset of the reference images; null takes all."""
    network: str | None = None
    """TorchScript file of the Inception network."""
    network_sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """SHA-256 that the file must have; null takes only the file that `make setup` installs."""
    resize: Literal["tf1_bilinear", "bilinear", "bicubic"] = "bicubic"
    """How images are resized to the network's 299 pixels: `tf1_bilinear` as ADM, `bilinear` as pytorch-fid, `bicubic`
    as clean-fid."""
    kid_subset_size: int = Field(default=1000, ge=2)
    """Images per subset of the KID."""
    inception_splits: int = Field(default=10, ge=2)
    """Parts over which the Inception score is averaged."""
    neighbours: int = Field(default=3, ge=1)
    """Number k of nearest neighbours of precision and recall."""
    clip: str | None = None
    """Folder or hub id of a CLIP model, which also tells colours for geneval."""
    detector: str | None = None
    """Folder or hub id of a Mask2Former with COCO's classes."""
    dino: str | None = None
    """Folder or hub id of a DINOv2, for fd_dinov2 (the paper's: ViT-L/14)."""
    cmmd_clip: str | None = None
    """Folder or hub id of a CLIP, for cmmd (the paper's: ViT-L/14 at 336 pixels)."""
    vqa: str | None = None
    """Folder or hub id of a BLIP that answers questions, for dpg_bench."""

    @model_validator(mode="after")
    def _check(self) -> "SuiteConfig":
        wanted = set(self.metrics)
        needs = {
            "network": wanted & ON_FEATURES,
            "reference": wanted & AGAINST_REFERENCE,
            "clip": wanted & {"clip_score", "geneval"},
            "detector": wanted & {"geneval"},
            "dino": wanted & {"fd_dinov2"},
            "cmmd_clip": wanted & {"cmmd"},
            "vqa": wanted & {"dpg_bench"},
        }
        problems = [
            f"{key}: {', '.join(sorted(by))} needs one: give {key}=PATH (docs/evaluate.md says what)"
            for key, by in needs.items()
            if by and getattr(self, key) is None
        ]
        if {"geneval", "dpg_bench"} <= wanted:
            problems.append("metrics: geneval and dpg_bench have prompts of their own: make a suite for each")
        if wanted & {"geneval", "dpg_bench"} and self.prompts in (CLASSES, RANDOM_CLASSES):
            problems.append(f"prompts: {self.prompts} has no questions: give the benchmark's file (docs/evaluate.md)")
        if self.rectified_flow is None and self.ddpm is None:
            problems.append("rectified_flow, ddpm: at least one of them must say sampler and steps")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def applied(self, config: TrainConfig, overrides: Sequence[str] = ()) -> TrainConfig:
        """The config of a checkpoint with the suite's way of sampling; ConfigError where they do not fit.

        overrides: of where encoders lie and how the model is sharded.
        """
        sampling = getattr(self, config.objective.kind)
        if sampling is None:
            kind = config.objective.kind
            raise ConfigError(
                f"the suite does not say how to sample a model of objective.kind {kind}: give {kind}.steps=N"
            )
        if self.resolution not in (None, config.data.resolution):
            raise ConfigError(
                f"the suite is for images of {self.resolution} pixels, the checkpoint makes {config.data.resolution}: "
                "use another suite, or override resolution and the reference"
            )
        chosen = [
            f"sample.sampler={sampling.sampler}",
            f"sample.steps={sampling.steps}",
            f"sample.guidance={self.guidance}",
            f"sample.guidance_by={self.guidance_by}",
            f"sample.guidance_channels={'null' if self.guidance_channels is None else self.guidance_channels}",
            f"parallel.precision={self.precision}",
            *([] if self.vae is None else [f"autoencoder.path={self.vae}", "autoencoder.subfolder=null"]),
        ]
        return parse(plain(config), "the checkpoint's config", [*chosen, *overrides])

    def protocol(self, contents: Mapping[str, Any]) -> dict[str, Any]:
        """All choices; `contents` (fingerprints of what lies at the paths) in place of the paths."""
        choices = {key: value for key, value in self.model_dump(mode="json").items() if key not in _PATHS}
        if self.guidance_by == "condition":  # the hash of a suite before there was a choice
            del choices["guidance_by"]
        return {**choices, "contents": dict(contents)}


def digest(identity: object) -> str:
    """SHA-256 of what JSON can hold. Of a protocol: equal where results can be compared."""
    return json_digest(identity)


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(of the suite, of the checkpoint's config); the latter only where they cannot change what is measured."""
    ours: list[str] = []
    theirs: list[str] = []
    for text in overrides:
        key = text.partition("=")[0]
        if key not in _OF_CONFIG and key.partition(".")[0] not in SuiteConfig.model_fields:
            known = [*SuiteConfig.model_fields, *_OF_CONFIG]
            raise ConfigError(f'override "{text}": {key} is no key of a suite{nearest(key, known)}')
        (theirs if key in _OF_CONFIG else ours).append(text)
    return ours, theirs


def load_suite(name: str, overrides: Sequence[str] = ()) -> tuple[str, SuiteConfig]:
    """(name, suite) by path or by name under configs/evaluate/, with overrides `key=value`; raises ConfigError."""
    plain_name = not name.endswith(".yaml") and "/" not in name
    path = find_config(f"evaluate/{name}" if plain_name else name)
    data: Mapping[str, Any] = read(path)
    for text in overrides:
        data = override(data, text)
    return path.stem, validated(SuiteConfig, data, f"{path.name}{' with overrides' if overrides else ''}")
