"""TrainConfig: every key of a run, frozen and strict, without torch."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from data.config import NONE, AutoencoderConfig, DataConfig, TextEncoderConfig
from models.configs import DEFAULT_KIND, MODEL_KINDS, ModelConfig, ProjectorConfig


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    name: str | None = None
    """Name of the run folder; the config file's name unless given."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    resume: bool = True
    """Go on from the newest complete checkpoint of the run folder. False refuses a folder that has any."""
    init_from: str | None = None
    """Checkpoint, or snapshot of the EMA weights, that a new run starts from."""
    allow_change: tuple[str, ...] = ()
    """Schedule keys (optim.lr, train.steps, ...) that may differ from the run that is resumed."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints that are kept; the disk holds one more while the next is written."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of so many steps are kept as well; 0: none."""


class TrainSection(Section):
    steps: int = Field(default=100_000, ge=1)
    global_batch_size: int = Field(default=256, ge=1)
    micro_batch_size: float | None = Field(default=None, gt=0)
    """The most samples a device holds at 256² area (at 512² a fourth of them); accumulation follows from it.
    None: the whole share at once."""
    seed: int = Field(default=0, ge=0)
    deterministic: bool = False
    """Deterministic algorithms on a GPU (slower); on CPU a run is always bit-exact."""
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=1000, ge=0)
    """0: never, as for the other intervals."""
    checkpoint_every: int = Field(default=1000, ge=0)
    """The last step is always saved."""
    checkpoint_async: bool = True
    """Write checkpoints while training goes on."""
    ema_snapshot_every: int = Field(default=0, ge=0)
    """Write the EMA weights alone, to be sampled from and kept; 0: never."""
    sample_every: int = Field(default=1000, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    """Measure images of the EMA weights by a small suite; 0: never."""
    evaluate_suite: str = "demo"
    """Which: a path, or a name under configs/evaluate/. The run's own precision and autoencoder are used."""
    rollback_after: int = Field(default=0, ge=0)
    """After so many skipped steps in a row go back to the last checkpoint and past the samples between; 0: never."""
    watchdog_factor: float | None = Field(default=20.0, gt=1)
    """A step that takes this many times the median one ends the run with the stacks of all ranks; null: never."""
    watchdog_min_s: float = Field(default=300.0, gt=0)
    """The least time after which a step counts as hung."""


class RoleFactors(Section):
    """Factors on the base learning rate of the parameters of a role; the weight decay stays."""

    input: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=1.0, gt=0)
    output: float = Field(default=1.0, gt=0)
    vector: float = Field(default=1.0, gt=0)
    fixed: float = Field(default=1.0, gt=0)


class MupConfig(Section):
    parametrization: Literal["mup", "sp"] = "mup"
    base_width: int = Field(default=512, ge=1)
    """Width at which the base hyperparameters hold; a proxy and its target share it."""
    wd_rule: Literal["independent", "sqrt", "coupled"] = "independent"
    eps_rule: Literal["constant", "width"] = "constant"
    base_depth: int | None = Field(default=None, ge=1)
    """Depth at which the base hyperparameters hold: each residual branch is multiplied by base_depth / model.depth
    (CompleteP, alpha = 1). null: depth is not scaled."""
    output_multiplier: float = Field(default=1.0, gt=0)
    """Base hyperparameter: factor on the input of the final layer, beside muP's 1 / m."""
    role_lr: RoleFactors = RoleFactors()


class OptimConfig(Section):
    lr: float = Field(default=2.0**-10, gt=0)
    """Base learning rate: the muP table scales it by name."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-12, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null: no clipping."""
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    decay_steps: int = Field(default=0, ge=0)
    """wsd: the last steps, over which the lr falls to 0."""
    spike_threshold: float | None = Field(default=None, gt=0)
    """A step whose log gradient norm lies this many running standard deviations above the running mean is skipped;
    null: none is."""


class EmaConfig(Section):
    decays: tuple[float, ...] = (0.9999,)
    """The first one is validated, sampled and exported."""
    warmup: bool = True
    """Decay min(decay, (1 + n) / (10 + n)) at update n."""


class ObjectiveConfig(Section):
    kind: Literal["rectified_flow", "ddpm"] = "rectified_flow"
    beta_schedule: Literal["linear", "scaled_linear"] = "linear"
    """ddpm: linear as Ho et al., scaled_linear as Stable Diffusion."""
    timestep_mean: float = 0.0
    timestep_std: float = Field(default=1.0, gt=0)
    shift_base_tokens: int = Field(default=256, ge=1)
    """Times are shifted by s = sqrt(image tokens / shift_base_tokens)."""
    repa_weight: float = Field(default=0.0, ge=0)
    """Weight of the alignment with a frozen image encoder (REPA, arXiv 2410.06940); 0: none."""
    repa_layer: int = Field(default=8, ge=1)
    """The tokens after so many blocks are aligned."""
    repa_encoder: str = NONE
    """Folder or hub id of a DINOv2; synthetic data and precomputed features need none."""
    repa_width: int = Field(default=768, ge=1)
    """Features of the encoder."""
    repa_hidden: int = Field(default=2048, ge=1)
    """Features of the projector's inner layers."""


class ParallelConfig(Section):
    engine: Literal["fsdp2", "zero"] = "fsdp2"
    zero_stage: Literal[1, 2, 3] = 2
    """engine zero: what is sharded; 1: optimizer state, 2: and gradients, 3: and weights."""
    shard: int = Field(default=0, ge=0)
    """Ranks that share one copy of the weights; 0: all. Replicas = world size / shard (HSDP)."""
    precision: Literal["bf16", "fp32", "fp64"] | None = None
    """Compute type over fp32 master weights; None: bf16 on a GPU, fp32 on a CPU. fp64 is for tests."""
    compile: bool = False
    """Compile each block; a shape that would make it fall back to eager ends the run."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """full: only the blocks' inputs are kept for the backward pass; selective: the outputs of matrix products and of
    attention as well."""
    reshard_after_forward: bool = True
    """engine fsdp2: free the gathered weights between forward and backward; false (as ZeRO-2) for small models."""
    prefetch: int = Field(default=1, ge=0)
    """engine fsdp2: blocks whose weights are gathered ahead of use; 0 leaves it to the engine."""
    cpu_offload: bool = False
    """engine fsdp2: weights, gradients and optimizer state live in the host's memory."""


class ValidationConfig(Section):
    samples: int = Field(default=256, ge=1)
    """Images of the fixed bank, each at 8 equidistant times."""


class SampleConfig(Section):
    prompts: tuple[str, ...] = ()
    """Prompts of the grids, of a model of classes their numbers; none: those of the first validation samples."""
    count: int = Field(default=16, ge=1)
    sampler: Literal["euler", "ancestral", "ddim", "dpm_solver"] | None = None
    """euler for rectified_flow, the others for ddpm; null: euler, or dpm_solver."""
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=4.0, ge=0)
    """Classifier-free guidance; 1 is none."""
    guidance_channels: int | None = Field(default=None, ge=1)
    """Guided channels, counted from the first; null: all. Some published models guide 3 of 4 latent channels."""


class WandbConfig(Section):
    project: str | None = None
    mode: Literal["offline", "online", "disabled"] = "offline"


def _with_kind(model: Any) -> Any:
    """A model section that does not name its kind is of the default one."""
    return {"kind": DEFAULT_KIND, **model} if isinstance(model, Mapping) else model


class TrainConfig(Section):
    """One run. `python -m trainer.config.schema` prints the JSON schema that editors use."""

    run: RunConfig = RunConfig()
    train: TrainSection = TrainSection()
    model: Annotated[ModelConfig, Field(discriminator="kind"), BeforeValidator(_with_kind)] = MODEL_KINDS[
        DEFAULT_KIND
    ]()
    mup: MupConfig = MupConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    validation: ValidationConfig = ValidationConfig()
    sample: SampleConfig = SampleConfig()
    wandb: WandbConfig = WandbConfig()

    @property
    def latent_size(self) -> int:
        """Rows (and columns) of a latent."""
        return self.data.resolution // self.autoencoder.downsample

    @property
    def image_tokens(self) -> int:
        return (self.latent_size // self.model.patch_size) ** 2

    @property
    def label_classes(self) -> int | None:
        """Classes of a model that is conditioned on labels; None of one that reads captions."""
        return self.model.num_classes if self.model.condition == "label" else None

    @property
    def projector(self) -> ProjectorConfig | None:
        """What the model has for REPA; None where that is off."""
        o = self.objective
        return ProjectorConfig(o.repa_hidden, o.repa_width) if o.repa_weight else None

    @property
    def sampler(self) -> Literal["euler", "ancestral", "ddim", "dpm_solver"]:
        return self.sample.sampler or ("euler" if self.objective.kind == "rectified_flow" else "dpm_solver")


if __name__ == "__main__":
    print(json.dumps(TrainConfig.model_json_schema(), indent=1))
