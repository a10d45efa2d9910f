"""TrainConfig: every key of a run, declared once: type, default, range, class and a sentence of help. No torch.

A key's class says what becomes of a change when a run is resumed. It is declared at the key, else at its section:
identity    the change is refused, because another value makes another run;
schedule    the change is refused unless the key is listed in run.allow_change;
runtime     the change is free. Paths are runtime: what lies there is compared by its fingerprint.
A key of class identity that is declared STAGED may be changed by a stage, from a step on.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from data.config import NONE, RUNTIME, STAGED, AutoencoderConfig, DataConfig, TextEncoderConfig
from models.configs import ProjectorConfig
from models.model_config import ModelConfig
from models.registry import DEFAULT_KIND, MODEL_KINDS

IDENTITY: JsonDict = {"class": "identity"}
SCHEDULE: JsonDict = {"class": "schedule"}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def is_name(text: str) -> bool:
    """Whether a text may name a folder and a job: it is no path, no option, and one word in any script."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:+=@-]{0,99}", text) is not None


NAME_FORM = "letters, digits and _ . , : + = @ - (100 at most, the first one a letter, a digit or _)"


class RunConfig(Section):
    """The run folder: its name, what it starts from, and which checkpoints it keeps."""

    name: str | None = None
    """Name of the run folder: letters, digits and _ . , : + = @ -; null takes the name of the config file."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder; false refuses a folder that has a checkpoint."""
    init_from: str | None = None
    """Checkpoint, or snapshot of the EMA weights, whose weights a new run starts from, at step 0: it takes no moments,
    no EMA, no place in the data and no projector of REPA (launch/branch.py goes on with all of them)."""
    allow_change: tuple[str, ...] = ()
    """Keys of class schedule (optim.lr, train.steps, ...) that may differ from those of the run that is resumed."""
    forecast: str | None = None
    """forecast.json of launch/forecast.py, beside whose intervals each validation is shown; null takes the one in the
    run folder, where there is one."""
    keep_last: int = Field(default=3, ge=1)
    """Number of newest checkpoints that are kept, beside the newest one with which a step has been taken since; the
    disk holds one more while the next is written."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this many steps are kept as well; 0 keeps none of them."""
    trust_pickles: bool = False
    """Resume a checkpoint of parallel.engine zero, whose files are pickles and can run code, also if another user owns
    any of them."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.dir) / str(self.name)


def _auto_as_null(value: Any) -> Any:
    return None if value == "auto" else value


class TrainSection(Section):
    """Length, batch and seed of the run, and what happens at which step."""

    steps: int = Field(default=100_000, ge=1, json_schema_extra=SCHEDULE)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(default=256, ge=1, json_schema_extra=STAGED)
    """Samples per optimizer step, over all devices."""
    micro_batch_size: Annotated[float | None, BeforeValidator(_auto_as_null)] = Field(default=None, gt=0)
    """Samples that a device holds at once at 256² pixels (a fourth of them at 512²), from which gradient accumulation
    follows; null, or `auto`, is as many as the memory model finds room for on the GPU (on a CPU the device's whole
    share of the batch)."""
    seed: int = Field(default=0, ge=0, json_schema_extra=IDENTITY)
    """Seed of the initial weights, the order of the data and all noise."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU, which are slower; on a CPU a run is always bit-exact."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl and of the terminal."""
    validate_every: int = Field(default=1000, ge=0)
    """Steps between measurements of the validation loss; 0 measures none."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """Steps between checkpoints; 0 saves the last step alone, which is always saved."""
    checkpoint_async: bool = True
    """Write checkpoints while training continues."""
    ema_snapshot_every: int = Field(default=0, ge=0)
    """Steps between snapshots of the EMA weights alone, which can be sampled from and are kept; 0 writes none."""
    sample_every: int = Field(default=1000, ge=0)
    """Steps between grids of sampled images; 0 draws none."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations of the EMA weights by train.evaluate_suite; 0 makes none."""
    evaluate_suite: str = "demo"
    """Suite of these evaluations: a path, or a name under configs/evaluate/. The run's own precision and autoencoder
    take the place of the suite's."""
    rollback_after: int = Field(default=0, ge=0)
    """After this many skipped steps in a row, go back to the last checkpoint and leave out the samples since; 0 never
    goes back."""
    max_skipped_steps: int = Field(default=100, ge=0)
    """After this many skipped steps in a row, and at a validation that is not finite, the run ends as failed, because
    it has diverged or its data hold NaNs; 0 trains on. It does not finish on 10 skipped steps either."""
    watchdog_factor: float | None = Field(default=20.0, gt=1)
    """A step that takes this many times as long as the median step ends the run with the stacks of all ranks; null
    never ends it."""
    watchdog_min_s: float = Field(default=300.0, gt=0)
    """Seconds that a step may always take before the watchdog ends the run."""


class RoleFactors(Section):
    """Factors on the base learning rate of the parameters of a role; the weight decay stays as it is."""

    input: float = Field(default=1.0, gt=0)
    """Factor for weights from a fixed dimension to the width."""
    hidden: float = Field(default=1.0, gt=0)
    """Factor for weights from the width to the width."""
    output: float = Field(default=1.0, gt=0)
    """Factor for weights from the width to a fixed dimension."""
    vector: float = Field(default=1.0, gt=0)
    """Factor for parameters that hold one number per feature: biases, gains and embedding tables."""
    fixed: float = Field(default=1.0, gt=0)
    """Factor for parameters whose shape is the same at every width."""


class ModuleFactors(Section):
    """Factors on the base hyperparameters of some parameters, whichever optimizer they have."""

    lr: float = Field(default=1.0, gt=0)
    """Factor on the learning rate; the weight decay stays as it is."""
    weight_decay: float = Field(default=1.0, ge=0)
    """Factor on the weight decay, of those that decay."""
    init: float = Field(default=1.0, gt=0)
    """Factor on the initial standard deviation, of those that do not start at zero or one."""


class MupConfig(Section):
    """The muP rules by which hyperparameters transfer across widths (docs/mup.md)."""

    parametrization: Literal["mup", "sp"] = "mup"
    """`mup` scales init, multipliers, learning rates and weight decay with the width; `sp` (standard) scales none."""
    base_width: int = Field(default=512, ge=1)
    """Width at which the base hyperparameters hold; a proxy and its target share it."""
    wd_rule: Literal["independent", "sqrt", "coupled"] = "independent"
    """Growth of a hidden weight's decay with m = width / base width: by m (`independent`: learning rate x decay stays
    the same), by sqrt(m), or not at all (`coupled`). Muon's learning rate does not fall with 1 / m, so its decay grows
    by 1, 1 / sqrt(m) and 1 / m."""
    eps_rule: Literal["constant", "width"] = "constant"
    """`constant` leaves optim.eps as it is; `width` divides it by m wherever gradients shrink with 1 / m."""
    base_depth: int | None = Field(default=None, ge=1)
    """Depth at which the base hyperparameters hold: with L = model.depth / base_depth each residual branch is
    multiplied by L^-depth_alpha, and the learning rate of what is in the blocks by L^(depth_alpha - 1) (CompleteP,
    arXiv 2505.01618); null does not scale with the depth."""
    depth_alpha: float = Field(default=1.0, ge=0.5, le=1)
    """Exponent of mup.base_depth: 1 shrinks the branches and leaves learning rates alone, 0.5 shrinks both by
    sqrt(L)."""
    output_multiplier: float = Field(default=1.0, gt=0)
    """Base hyperparameter: factor on the input of the final layer, beside muP's 1 / m."""
    role_lr: RoleFactors = RoleFactors()
    factors: dict[str, ModuleFactors] = {}
    """Base hyperparameters by kind of module (attention, mlp, modulation, text, image, label, time, patch, skip, final,
    as far as the backbone has them) or by pattern of parameter names (blocks.*.image.mlp*); no two may set one factor
    of the same parameter."""


class MuonConfig(Section):
    """Muon's own base hyperparameters (optim.kind muon); the other keys of optim are AdamW's, or of both.

    A step moves a matrix by learning rate x sqrt(fan_out / fan_in) x the polar factor of its momentum.
    """

    lr: float = Field(default=2.0**-8, gt=0)
    """Base learning rate of Muon's matrices; it takes part in the schedule as optim.lr does."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of Muon's matrices: a step multiplies one by 1 - learning rate x weight decay (mup.wd_rule); null is
    optim.weight_decay."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the running mean of the gradient."""
    nesterov: bool = True
    """Take the mean as it will be after the next step, with this step's gradient once more."""
    steps: int = Field(default=5, ge=1, le=20)
    """Newton-Schulz steps by which the polar factor is computed."""
    by_head: bool = Field(default=False, json_schema_extra=IDENTITY)
    """Orthogonalise each attention head of query, key and value on its own, instead of each of these three whole."""
    include: tuple[str, ...] = Field(default=(), json_schema_extra=IDENTITY)
    """More weights from width to width for Muon, by kind of module (modulation, skip, ...) or name pattern
    (blocks.*.modulation.weight); the kinds attention and mlp are Muon's anyway."""
    exclude: tuple[str, ...] = Field(default=(), json_schema_extra=IDENTITY)
    """Weights that AdamW keeps, by kind of module or name pattern; they win over optim.muon.include."""


class OptimConfig(Section):
    """The optimizer and its schedule, as base hyperparameters, which the muP table scales by parameter name."""

    kind: Literal["adamw", "muon"] = Field(default="adamw", json_schema_extra=IDENTITY)
    """`adamw` updates all parameters; `muon` gives the matrices of attention and MLP to Muon, as mup.json lists, and
    AdamW the rest."""
    lr: float = Field(default=2.0**-10, gt=0)
    """Base learning rate of AdamW, with which that of Muon (optim.muon.lr) rises and falls."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the running means of the gradient and of its square, each in [0, 1)."""
    eps: float = Field(default=1e-12, gt=0)
    """Adam's epsilon, which is added to the root of the squared gradient's mean."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay: a step multiplies a weight by 1 - learning rate x weight decay."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which weights decay: `matrices` leaves out biases, gains, tables and position embeddings."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Global norm to which larger gradients are scaled down; null does not clip."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after the warm-up: constant, falling to 0 over the whole run (`linear`, `cosine`), or constant and
    then falling to 0 over the last optim.decay_steps (`wsd`: warm-up, stable, decay)."""
    decay_steps: int = Field(default=0, ge=0)
    """Last steps, over which the learning rate falls to 0 (optim.schedule wsd)."""
    spike_threshold: float | None = Field(default=None, gt=0)
    """A step is skipped when its log gradient norm lies this many running standard deviations above the running mean;
    null skips no step for that reason."""
    muon: MuonConfig = MuonConfig()


class EmaConfig(Section):
    """Exponential moving averages of the weights."""

    decays: tuple[float, ...] = (0.9999,)
    """Decay per step of each average, between 0 and 1; the first average is validated, sampled and exported."""
    warmup: bool = True
    """Use the decay min(decay, (1 + n) / (10 + n)) at update n."""


class ObjectiveConfig(Section):
    """What the model learns to predict, and at which times."""

    kind: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    """`rectified_flow` learns the velocity between noise and image, `ddpm` the noise of 1000 diffusion steps."""
    predict: Literal["velocity", "x"] = "velocity"
    """What a rectified_flow's model puts out: the velocity, or the clean image `x`, whose loss is that of the velocity
    all the same (JiT, arXiv 2511.13720)."""
    x_clamp: float = Field(default=0.05, gt=0, lt=1)
    """Least time by which the error of x is divided in training, where the velocity's error is its error / time."""
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    """Noise schedule of ddpm: `linear` as Ho et al., `scaled_linear` as Stable Diffusion."""
    timestep_mean: float = Field(default=0.0, json_schema_extra=STAGED)
    """Mean of the logit of rectified_flow's training times, before the shift."""
    timestep_std: float = Field(default=1.0, gt=0, json_schema_extra=STAGED)
    """Standard deviation of the logit of rectified_flow's training times."""
    uniform_share: float = Field(default=0.0, ge=0, le=1, json_schema_extra=STAGED)
    """Share of samples whose training time is uniform between 0 and 1, and not shifted."""
    contrastive_weight: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=STAGED)
    """Weight of the distance to the velocity of another sample of the batch, which is subtracted from rectified_flow's
    loss (contrastive flow matching, arXiv 2506.05350); 0 turns it off."""
    shift_base_tokens: int = Field(default=256, ge=1, json_schema_extra=STAGED)
    """Number of image tokens at which times are not shifted; others are by s = sqrt(image tokens / this number)."""
    repa_weight: float = Field(default=0.0, ge=0, json_schema_extra=STAGED)
    """Weight of the alignment with a frozen image encoder (REPA, arXiv 2410.06940); 0 turns it off."""
    repa_until: int | None = Field(default=None, ge=1, json_schema_extra=SCHEDULE)
    """Updates that have the alignment; later ones encode no features and leave the projector as it is; null gives it to
    all."""
    repa_layer: int = Field(default=8, ge=1)
    """Number of blocks after which tokens are aligned."""
    repa_encoder: str = Field(default=NONE, json_schema_extra=RUNTIME)
    """Folder or hub id of the DINOv2 or DINOv3 (a ViT) to align with; `none` for synthetic data and precomputed
    features."""
    repa_width: int = Field(default=768, ge=1)
    """Features of the image encoder."""
    repa_projector: Literal["mlp", "conv"] = "mlp"
    """From tokens to features of the encoder: REPA's three linear layers (`mlp`), or iREPA's convolution over 3 x 3
    tokens (`conv`, arXiv 2512.10794)."""
    repa_spatial_norm: float | None = Field(default=None, ge=0, le=1)
    """Share of their mean over the image's tokens that is taken off the encoder's features, which are then divided by
    their standard deviation over them (iREPA, with 0.6 on latents and 0.8 on pixels); null leaves them as they are."""
    repa_hidden: int = Field(default=2048, ge=1)
    """Features of the inner layers of the projector between the model and the image encoder."""


class ParallelConfig(Section):
    """How the model is spread over devices, in which precision it computes, and what memory is saved."""

    engine: Literal["fsdp2", "zero"] = "fsdp2"
    """`fsdp2` is PyTorch's own sharding, `zero` DeepSpeed's."""
    zero_stage: Literal[1, 2, 3] = 2
    """What engine zero shards: the optimizer state (1), the gradients too (2), the weights too (3)."""
    shard: int = Field(default=0, ge=0)
    """Ranks that share one copy of the weights; 0 means all. There are world size / shard replicas (HSDP)."""
    precision: Literal["bf16", "fp8", "fp32", "fp64"] | None = None
    """Number type of the computation over fp32 master weights; null is bf16 on a GPU and fp32 on a CPU. fp8 (needs
    torchao; H100 or newer) is bf16 whose blocks multiply their tokens in fp8. fp64 is for tests."""
    compile: bool | None = None
    """Compile each block; null does so on a GPU in training. A block that the compiler fails on runs eagerly, with a
    warning; shapes that would need more and more graphs end the run."""
    attention: Literal["auto", "varlen", "efficient", "cudnn", "flash3"] = "auto"
    """Attention kernel of a GPU: FlashAttention 2 (`varlen`) or 3 (`flash3`, where installed) on packed text, torch's
    memory-efficient one or cuDNN's with a mask; `auto` is varlen in bf16. One that fails is replaced, and the run says
    so."""
    cuda_graph: bool = False
    """Record the passes of a micro-batch as a CUDA graph, one for each bucket, which the GPU then runs without the host
    (engine fsdp2, one process): for models so small that the GPU waits for the host."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is kept for the backward pass: all activations (`none`), the blocks' inputs alone (`full`), or those and the
    outputs of matrix products and of attention (`selective`)."""
    reshard_after_forward: bool | None = None
    """Free the gathered weights between forward and backward (engine fsdp2); false, as ZeRO-2, is for small models;
    null is false for models of at most 3 B parameters and where parallel.shard is 1."""
    prefetch: int = Field(default=1, ge=0)
    """Blocks whose weights are gathered ahead of their use (engine fsdp2); 0 leaves it to the engine."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory (engine fsdp2)."""


class ValidationConfig(Section):
    """The validation loss."""

    samples: int = Field(default=256, ge=1)
    """Images of the fixed validation set, each of which is measured at 8 equidistant times."""


GuidanceBy = Literal["condition", "route"]


class SampleConfig(Section):
    """The grids of sampled images."""

    prompts: tuple[str, ...] = ()
    """Prompts of the grids, or class numbers for a model of classes; empty takes those of the first validation
    samples."""
    count: int = Field(default=16, ge=1)
    """Most images of a grid."""
    sampler: Literal["euler", "ancestral", "ddim", "dpm_solver", "dpm_solver_sigma_min"] | None = None
    """`euler` is for rectified_flow, the others are for ddpm; null takes euler or dpm_solver. `dpm_solver_sigma_min`
    ends at timestep 0 by a step of second order, as the solver's own code."""
    steps: int = Field(default=50, ge=1)
    """Sampling steps per image."""
    guidance: float = Field(default=4.0, ge=0)
    """Scale of the guidance; 1 is no guidance."""
    guidance_by: GuidanceBy = "condition"
    """What guidance leads away from: the prediction without caption or class (`condition`: classifier-free guidance),
    or that of a pass with it through model.route as in training (`route`, arXiv 2601.01608)."""
    guidance_channels: int | None = Field(default=None, ge=1)
    """Number of guided channels, counted from the first; null guides all. Some published models guide 3 of 4 latent
    channels."""


TrackerKind = Literal["wandb", "tensorboard", "trackio"]


def _trackers(value: Any) -> Any:
    """none and one name are lists too."""
    return [] if value in ("none", None) else [value] if isinstance(value, str) else value


class TrackingConfig(Section):
    """Trackers, beside metrics.jsonl (docs/training.md)."""

    kind: Annotated[
        tuple[TrackerKind, ...],
        BeforeValidator(_trackers, json_schema_input_type=Literal["none"] | TrackerKind | list[TrackerKind]),
    ] = ()
    """`wandb`, `tensorboard` or `trackio`, a list of several, or `none`."""
    project: str = Field(default="mudit", min_length=1)
    """Project at wandb and trackio."""
    mode: Literal["offline", "online"] = "offline"
    """Of wandb: `offline` logs to the run folder, to be uploaded later; `online` uploads at once, and is `offline`
    where key or network are missing. The others are files on this machine in either case."""


class WandbConfig(Section):
    """Weights & Biases as configs chose it before `tracking`, which new ones use."""

    project: str | None = None
    """Project to log to, as tracking.kind=wandb with tracking.project; null leaves it to tracking.kind."""
    mode: Literal["offline", "online", "disabled"] = "offline"
    """As tracking.mode; `disabled` does nothing."""


class StageConfig(Section):
    """A stage: keys of the config that change from a step on (docs/stages.md). The first stage gives `until` alone."""

    until: int | None = Field(default=None, ge=1)
    """Step at which the stage ends and the next one begins; null, for the last one alone, is train.steps."""
    train: dict[str, Any] = {}
    """Keys of `train` that change when the stage begins: train.global_batch_size, train.micro_batch_size, intervals."""
    optim: dict[str, Any] = {}
    """Keys of `optim`. With optim.schedule, optim.warmup_steps or optim.decay_steps among them the stage begins a
    learning-rate schedule of its own."""
    model: dict[str, Any] = {}
    """Keys of `model` that place image tokens: model.pos_embed_base_size, model.pos_embed_interpolation."""
    objective: dict[str, Any] = {}
    """Keys of `objective`: times, shift, and the weights of its terms (objective.repa_weight 0 ends the alignment)."""
    parallel: dict[str, Any] = {}
    """Keys of `parallel`, such as parallel.activation_checkpointing for larger images."""
    data: dict[str, Any] = {}
    """Keys of `data`: data.resolution, data.buckets, data.sources and their weights, ..."""
    text_encoder: dict[str, Any] = {}
    """Keys of `text_encoder`: text_encoder.max_length and text_encoder.dropout."""
    validation: dict[str, Any] = {}
    """Keys of `validation`."""
    sample: dict[str, Any] = {}
    """Keys of `sample`."""


if TYPE_CHECKING:
    AnyModel = ModelConfig
else:  # pydantic tells the kinds of the registry apart by their key `kind`
    AnyModel = Union[tuple(MODEL_KINDS.values())]  # noqa: UP007 (of as many classes as there are)


def _with_kind(model: Any) -> Any:
    """A model section that does not name its kind is of the default one."""
    return {"kind": DEFAULT_KIND, **model} if isinstance(model, Mapping) else model


class TrainConfig(Section):
    """One run."""

    run: RunConfig = Field(default=RunConfig(), json_schema_extra=RUNTIME)
    train: TrainSection = Field(default=TrainSection(), json_schema_extra=RUNTIME)
    model: Annotated[AnyModel, Field(discriminator="kind"), BeforeValidator(_with_kind)] = Field(
        default=MODEL_KINDS[DEFAULT_KIND](), json_schema_extra=IDENTITY
    )
    mup: MupConfig = Field(default=MupConfig(), json_schema_extra=IDENTITY)
    optim: OptimConfig = Field(default=OptimConfig(), json_schema_extra=SCHEDULE)
    ema: EmaConfig = Field(default=EmaConfig(), json_schema_extra=SCHEDULE)
    objective: ObjectiveConfig = Field(default=ObjectiveConfig(), json_schema_extra=IDENTITY)
    parallel: ParallelConfig = Field(default=ParallelConfig(), json_schema_extra=RUNTIME)
    data: DataConfig = Field(default=DataConfig(), json_schema_extra=IDENTITY)
    text_encoder: TextEncoderConfig = Field(default=TextEncoderConfig(), json_schema_extra=IDENTITY)
    autoencoder: AutoencoderConfig = Field(default=AutoencoderConfig(), json_schema_extra=IDENTITY)
    validation: ValidationConfig = Field(default=ValidationConfig(), json_schema_extra=RUNTIME)
    sample: SampleConfig = Field(default=SampleConfig(), json_schema_extra=RUNTIME)
    tracking: TrackingConfig = Field(default=TrackingConfig(), json_schema_extra=RUNTIME)
    wandb: WandbConfig = Field(default=WandbConfig(), json_schema_extra=RUNTIME)
    stages: tuple[StageConfig, ...] = Field(default=(), json_schema_extra=RUNTIME)
    """Stages of the run, one after the other, each with the keys that change when it begins."""

    @property
    def latent_size(self) -> int:
        """Rows (and columns) of the latent of a square image."""
        return self.data.resolution // self.autoencoder.downsample

    @property
    def image_tokens(self) -> int:
        """Tokens of a square image."""
        return (self.latent_size // self.model.patch_size) ** 2

    @property
    def label_classes(self) -> int | None:
        """Number of classes of a model that is conditioned on labels; None for one that reads captions."""
        return self.model.num_classes if self.model.condition == "label" else None

    @property
    def projector(self) -> ProjectorConfig | None:
        """The projector that the model has for REPA; None where REPA is off."""
        o = self.objective
        return ProjectorConfig(o.repa_hidden, o.repa_width, o.repa_projector) if o.repa_weight else None

    @property
    def tracked(self) -> tuple[tuple[TrackerKind, ...], str, str]:
        """(trackers, project, mode), be they chosen by `tracking` or, in older configs, by `wandb`."""
        if self.wandb.project is None:
            return self.tracking.kind, self.tracking.project, self.tracking.mode
        return () if self.wandb.mode == "disabled" else ("wandb",), self.wandb.project, self.wandb.mode

    @property
    def sampler(self) -> Literal["euler", "ancestral", "ddim", "dpm_solver", "dpm_solver_sigma_min"]:
        """sample.sampler, or the objective's own where that is null."""
        return self.sample.sampler or ("euler" if self.objective.kind == "rectified_flow" else "dpm_solver")


if __name__ == "__main__":
    print(json.dumps(TrainConfig.model_json_schema(), indent=1))
