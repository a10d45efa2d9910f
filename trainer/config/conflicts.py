"""What is wrong with a config whose keys are each fine alone: keys that do not go together, and what no range says."""

import dataclasses
import itertools
from collections.abc import Iterator

from pydantic import ValidationError

from data.config import NONE, SYNTHETIC, MoreTextConfig

from .keys import key_class, leaf_keys
from .messages import explain
from .resolve import longest_side
from .schema import MuonConfig, TrainConfig
from .yaml_files import nearest


def conflicts(c: TrainConfig) -> Iterator[str]:
    """A sentence for everything that is wrong."""
    yield from _model_conflicts(c)
    yield from _step_conflicts(c)
    yield from _objective_conflicts(c)
    yield from _sampling_conflicts(c)
    yield from _data_conflicts(c)
    yield from _text_conflicts(c)
    yield from _attention_conflicts(c)
    yield from _zero_conflicts(c)
    yield from _muon_conflicts(c)
    if c.parallel.cuda_graph and c.parallel.cpu_offload:
        yield (
            "parallel.cuda_graph does not go with parallel.cpu_offload, which brings weights from the host into other "
            "memory in every step: set one of them to false"
        )
    if c.wandb.project is not None and c.tracking.kind:
        yield "wandb.project and tracking.kind both choose trackers: put wandb into tracking.kind, and leave wandb out"
    yield from _repa_conflicts(c)
    yield from _allow_change_conflicts(c)


def _model_conflicts(c: TrainConfig) -> Iterator[str]:
    """What the model does not fit: the images, the text, and its own muP base."""
    token = c.autoencoder.downsample * c.model.patch_size
    if c.data.resolution % token:
        yield (
            f"data.resolution {c.data.resolution} is not a multiple of {token} "
            "(autoencoder.downsample x model.patch_size)"
        )
    else:
        yield from c.model.conflicts(c.data.resolution, longest_side(c, token), c.text_encoder.total_length)
    downsample = c.autoencoder.downsample
    pixels = getattr(c.model, "pixels_per_latent", downsample)
    if c.model.micro_conditions and pixels != downsample:
        yield (
            f"model.pixels_per_latent {pixels} is not autoencoder.downsample {downsample}, so that sampling would give "
            f"model.micro_conditions other sizes than training: set it to {downsample}"
        )
    if c.mup.base_width % c.model.head_dim:
        yield f"mup.base_width {c.mup.base_width} is not a multiple of model.head_dim {c.model.head_dim}"
    else:
        try:
            dataclasses.replace(c.model, width=c.mup.base_width)
        except ValidationError as error:
            problems = [sentence for _, sentence in explain(error, type(c.model), type(c.model), "model.")]
            yield f"mup.base_width {c.mup.base_width} makes no model: {'; '.join(problems)}"
    if c.mup.base_depth is None and c.mup.depth_alpha != 1:
        yield f"mup.depth_alpha {c.mup.depth_alpha} does nothing without mup.base_depth: set that, or leave it 1"
    if c.mup.base_depth is not None and not c.model.residual:
        yield (
            f"mup.base_depth does not fit model.kind {c.model.kind}, which is not deep by residual branches alone: "
            "no scale of branches makes it independent of depth; leave it null"
        )
    if c.mup.base_depth is not None and c.model.route is not None and c.model.route.fuse == "sprint":
        yield (
            "mup.base_depth does not fit model.route.fuse sprint, whose layer stands in the residual stream itself: "
            "leave one of them out"
        )


def _step_conflicts(c: TrainConfig) -> Iterator[str]:
    """What does not go together in the optimizer's schedule and in the averages."""
    if c.optim.warmup_steps >= c.train.steps:
        yield f"optim.warmup_steps {c.optim.warmup_steps} must be less than train.steps {c.train.steps}"
    if (c.optim.schedule == "wsd") != (c.optim.decay_steps > 0):
        yield "optim.decay_steps goes with optim.schedule wsd, and wsd needs it"
    elif c.optim.schedule == "wsd" and c.optim.warmup_steps + c.optim.decay_steps > c.train.steps:
        yield (
            f"optim.warmup_steps {c.optim.warmup_steps} and optim.decay_steps {c.optim.decay_steps} overlap in "
            f"train.steps {c.train.steps}: their sum must not be more"
        )
    if not all(0 <= b < 1 for b in c.optim.betas):
        yield f"optim.betas must lie in [0, 1), got {list(c.optim.betas)}"
    if not c.ema.decays or not all(0 < d < 1 for d in c.ema.decays) or len(set(c.ema.decays)) < len(c.ema.decays):
        yield f"ema.decays must be different numbers between 0 and 1, got {list(c.ema.decays)}"


def _data_conflicts(c: TrainConfig) -> Iterator[str]:
    """What is wrong with the sources of data and with their buckets."""
    if c.data.sources and c.data.shards != SYNTHETIC:
        yield "data.shards and data.sources exclude each other: name the shards in data.sources"
    lengths = c.data.text_lengths
    if not all(a < b for a, b in itertools.pairwise((0, *lengths))):
        yield f"data.text_lengths must be rising numbers of tokens from 1 on, got {list(lengths)}"
    elif lengths and c.label_classes is not None:
        yield "data.text_lengths needs a model that reads captions: leave it empty for a model of classes"
    elif lengths and lengths[-1] != c.text_encoder.max_length:
        yield (
            f"data.text_lengths must end with text_encoder.max_length {c.text_encoder.max_length}, where captions are "
            f"cut, got {list(lengths)}"
        )


def _text_conflicts(c: TrainConfig) -> Iterator[str]:
    """What is wrong with the text encoders, and with the text around captions."""
    text = c.text_encoder
    for number, one in enumerate(text.models):
        key = f"text_encoder.more.{number - 1}" if number else "text_encoder"
        if one.prefix and one.chat is not None:
            yield f"{key}.prefix and {key}.chat exclude each other: write what the prefix says into the chat"
        if one.pad and (one.prefix or one.chat is not None):
            yield f"{key}.pad does not go with {key}.prefix or chat, whose captions are never padded: set it to false"
        if one.thinking and one.chat is None:
            yield f"{key}.thinking does nothing without {key}.chat: leave it false"
        if isinstance(one, MoreTextConfig):
            if (one.path == NONE) != (text.path == NONE):
                yield f"{key}.path is {one.path} and text_encoder.path {text.path}: name all encoders, or none of them"
            if one.join == "none" and not one.pooled_width:
                yield f"{key}.join is none and its pooled_width 0, so that nothing of it is used: leave it out"
    if text.total_pooled and not getattr(c.model, "pooled_text", False):
        yield (
            f"text_encoder.pooled_width {text.total_pooled} needs a model that reads a pooled vector, and model.kind "
            f"{c.model.kind} reads the states alone: set it to 0"
        )
    if text.more and c.data.text_lengths:
        yield (
            "data.text_lengths does not go with text_encoder.more, whose encoders count a caption's tokens "
            "differently: leave data.text_lengths empty"
        )
    if text.pad and c.data.text_lengths:
        yield "data.text_lengths shortens the padding that text_encoder.pad lets the model see: leave it empty"
    if text.chat is not None and c.data.text_lengths:
        yield (
            "data.text_lengths does not go with text_encoder.chat, whose tokens behind a caption the choice of a "
            "bucket does not count: leave data.text_lengths empty"
        )


def _objective_conflicts(c: TrainConfig) -> Iterator[str]:
    """Keys of rectified flow that another objective, or another prediction, has no use for."""
    default = type(c.objective)()
    for key in ("predict", "uniform_share", "contrastive_weight"):
        if c.objective.kind != "rectified_flow" and getattr(c.objective, key) != getattr(default, key):
            yield (
                f"objective.{key} {getattr(c.objective, key)} needs objective.kind rectified_flow, not "
                f"{c.objective.kind}: leave it {getattr(default, key)}"
            )
    if c.objective.predict != "x" and c.objective.x_clamp != default.x_clamp:
        yield f"objective.x_clamp {c.objective.x_clamp} does nothing without objective.predict x: leave it out"
    batch = c.train.global_batch_size
    if c.objective.contrastive_weight and batch % 2:
        yield (
            f"train.global_batch_size {batch} is odd, and objective.contrastive_weight compares the samples of a batch "
            f"in pairs: set it to {batch + 1}"
        )


def _sampling_conflicts(c: TrainConfig) -> Iterator[str]:
    """Keys of objective and sample that do not go together, or that do not fit the model."""
    kind, sampler = c.objective.kind, c.sampler
    if (sampler == "euler") != (kind == "rectified_flow"):
        fitting = "euler" if kind == "rectified_flow" else "ancestral, ddim, dpm_solver or dpm_solver_sigma_min"
        yield f"sample.sampler {sampler} does not fit objective.kind {kind}: use {fitting}"
    if kind == "rectified_flow" and c.model.learn_sigma:
        yield "model.learn_sigma needs objective.kind ddpm: a rectified flow has no variance to learn"
    if kind == "ddpm":
        # DPM-Solver takes steps + 1 different times out of 1000; DDIM strides evenly over all of them.
        most = 999 if sampler.startswith("dpm_solver") else 1000
        if c.sample.steps > most:
            yield f"sample.steps {c.sample.steps} is more than the {most} of sample.sampler {sampler}"
        elif sampler == "ddim" and 1000 % c.sample.steps:
            yield f"sample.steps {c.sample.steps} must divide 1000 under sample.sampler ddim"
    if c.sample.guidance_by == "route" and c.model.route is None:
        yield "sample.guidance_by route needs a model with model.route, and this one has none: set it to condition"
    channels = c.sample.guidance_channels
    if channels is not None and channels > c.autoencoder.channels:
        yield f"sample.guidance_channels {channels} is more than autoencoder.channels {c.autoencoder.channels}"
    classes = c.label_classes
    wrong = [prompt for prompt in c.sample.prompts if classes and not (prompt.isdecimal() and int(prompt) < classes)]
    if wrong:
        yield f"sample.prompts of a model of classes are numbers from 0 to {classes - 1 if classes else 0}, got {wrong}"


def _repa_conflicts(c: TrainConfig) -> Iterator[str]:
    """What does not go with representation alignment (REPA)."""
    o = c.objective
    if not o.repa_weight:
        if o.repa_until is not None:
            yield f"objective.repa_until {o.repa_until} does nothing without objective.repa_weight: leave it null"
        return
    # Both would go on moving the projector by its momentum, and by weight decay.
    if o.repa_until is not None and c.parallel.engine == "zero":
        yield "objective.repa_until needs parallel.engine fsdp2: leave it null under zero"
    if o.repa_until is not None and c.parallel.cuda_graph:
        yield (
            "REPA that ends (objective.repa_until, or a stage with objective.repa_weight 0) does not go with "
            "parallel.cuda_graph: set that to false, or let it go on"
        )
    if not c.model.residual:
        yield (
            f"objective.repa_weight does not fit model.kind {c.model.kind}: its long skips carry the early blocks past "
            "the middle, so that no one block holds what the later ones build on; set it to 0"
        )
    if o.repa_projector == "conv":
        if o.repa_hidden != (usual := type(o)().repa_hidden):
            yield f"objective.repa_hidden {o.repa_hidden} does nothing under repa_projector conv: leave it {usual}"
        if c.model.route is not None and o.repa_layer - 1 in c.model.route.blocks:
            yield (
                f"objective.repa_projector conv needs whole grids of tokens, and block {o.repa_layer} lies in "
                f"model.route: let objective.repa_layer be none of {c.model.route.start + 1} to {c.model.route.end}"
            )
    if o.repa_layer > c.model.depth:
        yield f"objective.repa_layer {o.repa_layer} is more than model.depth {c.model.depth}"


def _attention_conflicts(c: TrainConfig) -> Iterator[str]:
    """Kernels that do not compute in the run's precision, or that are known to be wrong for its model."""
    kernel, precision = c.parallel.attention, c.parallel.precision
    if kernel == "cudnn" and not c.model.qk_norm:
        is_key = "qk_norm" in type(c.model).__dataclass_fields__
        cause = "model.qk_norm false" if is_key else f"model.kind {c.model.kind}"
        yield (
            f"parallel.attention cudnn does not fit {cause}: its gradients are NaN where all scores of a query lie far "
            "below 0, which only normalised queries and keys exclude; use auto"
        )
    able = {"fp64": ("auto",), "fp32": ("auto", "efficient")}
    if precision in able and kernel not in able[precision]:
        yield f"parallel.attention {kernel} does not compute in parallel.precision {precision}: leave it auto"


def _zero_conflicts(c: TrainConfig) -> Iterator[str]:
    """What parallel.engine zero cannot do."""
    parallel = c.parallel
    if parallel.engine != "zero":
        return
    if parallel.precision in ("fp8", "fp64"):
        yield f"parallel.precision {parallel.precision} needs parallel.engine fsdp2: zero has fp32 and bf16"
    if parallel.shard != 0:
        yield "parallel.shard must be 0 under parallel.engine zero, which shards over all ranks; fsdp2 has replicas"
    if parallel.reshard_after_forward is False:
        yield "parallel.reshard_after_forward false is of parallel.engine fsdp2: under zero use parallel.zero_stage 2"
    if parallel.cpu_offload:
        yield "parallel.cpu_offload needs parallel.engine fsdp2"
    if parallel.cuda_graph:
        yield "parallel.cuda_graph needs parallel.engine fsdp2"
    if parallel.compile and parallel.zero_stage == 3:
        yield "parallel.compile does not go with parallel.zero_stage 3: use stage 2, or parallel.engine fsdp2"
    if c.optim.spike_threshold is not None:
        yield "optim.spike_threshold needs parallel.engine fsdp2: leave it null under zero"
    if c.train.rollback_after > 0:
        yield "train.rollback_after needs parallel.engine fsdp2: leave it 0 under zero"
    if c.train.ema_snapshot_every > 0:
        yield "train.ema_snapshot_every needs parallel.engine fsdp2: leave it 0 under zero"


def _muon_conflicts(c: TrainConfig) -> Iterator[str]:
    """Keys of Muon without it, and what it cannot be with."""
    if c.optim.kind == "adamw":
        usual = dict(MuonConfig())
        if given := [f"optim.muon.{name}" for name, value in c.optim.muon if value != usual[name]]:
            yield f"{', '.join(given)} would do nothing under optim.kind adamw: set that to muon, or leave them out"
    elif c.parallel.engine == "zero":
        yield "optim.kind muon needs parallel.engine fsdp2: zero has AdamW alone"


def _allow_change_conflicts(c: TrainConfig) -> Iterator[str]:
    """Entries of run.allow_change that name no key, or one that may never change."""
    known = list(leaf_keys(TrainConfig, type(c.model)))
    for key in c.run.allow_change:
        if key not in known:
            yield f'run.allow_change: "{key}" is no config key{nearest(key, known)}'
        elif key_class(key) == "identity":
            yield f'run.allow_change: "{key}" is what the run is; start another run instead'
