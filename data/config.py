"""The sections data, text_encoder and autoencoder of a config. No torch."""

from typing import Literal, NamedTuple, TypeAlias

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.dataclasses import dataclass

from .redaction import holds_secret, quote

SYNTHETIC = "synthetic"
NONE = "none"
BUCKET_STEPS = 16  # sides of buckets are multiples of this part of data.resolution

# Inputs are hidden from pydantic's own messages, because a URL may hold a password.
CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True)
RUNTIME: JsonDict = {"class": "runtime"}  # free to change when a run is resumed (see trainer.config.schema)
STAGED: JsonDict = {"class": "identity", "stage": True}  # changes in mid-run by a stage alone


class Bucket(NamedTuple):
    """What the samples of one step share: height and width in pixels, and the most tokens of a caption."""

    height: int
    width: int
    text_length: int


def secret_in(key: str, value: object) -> str | None:
    """What is wrong with a value that would store a secret with the run; None where it holds none."""
    if not isinstance(value, str) or not holds_secret(value):
        return None
    return (
        f"{key} holds a password, a token or a signed query ({quote(value)}), and the config is stored with the run: "
        "write ${NAME} in its place, which is read from the environment where MUDIT_VARIABLES lists NAME, or use the "
        "store's own variables (AWS_PROFILE)"
    )


def _check_no_secret(key: str, text: str | None) -> None:
    if problem := secret_in(key, text):
        raise ValueError(problem)


@dataclass(frozen=True, config=CONFIG)
class SourceConfig:
    """One of several data sets that a run mixes."""

    shards: str
    """As data.shards, for this data set."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples that come from this data set, relative to the weights of the others."""
    captions: str | None = None
    """As data.captions, for this data set."""

    def __post_init__(self) -> None:
        if self.shards.strip() in ("", SYNTHETIC):
            raise ValueError(f"data.sources: shards must be a folder or .tar files, got {self.shards!r}")
        _check_no_secret("data.sources: shards", self.shards)
        _check_no_secret("data.sources: captions", self.captions)


@dataclass(frozen=True, config=CONFIG)
class ScoreConfig:
    """Bounds of one number that samples have."""

    column: str
    """Name of the number: a column of data.captions, or, without such a file, a field of the sample's .json member."""
    min: float | None = None
    """The least that is kept; null has no bound."""
    max: float | None = None
    """The most that is kept; null has no bound."""


@dataclass(frozen=True, config=CONFIG)
class FilterConfig:
    """Which samples are left out of the index. A sample that it leaves out is not read, and is no unreadable one."""

    has_caption: bool = False
    """Leave out samples that have no caption, or an empty one."""
    min_caption_length: int = Field(default=0, ge=0)
    """Leave out samples of which no caption has as many characters, and those that have none."""
    max_caption_length: int | None = Field(default=None, ge=1)
    """Leave out samples that have a caption of more characters."""
    min_side: int = Field(default=0, ge=0)
    """Leave out images whose shorter side has fewer pixels."""
    max_aspect: float | None = Field(default=None, ge=1)
    """Leave out images whose longer side is more than so many times the shorter one."""
    scores: tuple[ScoreConfig, ...] = ()
    """Leave out samples of which a number is out of its bounds, or missing (`[{column: aesthetic, min: 5}]`)."""


@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """Which samples a run trains on, and how they are read."""

    shards: str = Field(default=SYNTHETIC, json_schema_extra=RUNTIME)
    """A folder of .tar files, the path of one, or a pattern of paths with commas, braces or wildcards
    (`dir/train-{000000..000004}.tar`); `synthetic` generates samples. Paths may be URLs (s3://, https://, ...), which
    are read in ranges; ${NAME} stands for an environment variable that MUDIT_VARIABLES lists. Shards that
    launch/precompute.py wrote hold latents, text states and features in place of images and captions."""
    val_shards: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Shards that the run is validated on, written as data.shards; null validates on the training shards."""
    resolution: int = Field(default=256, ge=1, json_schema_extra=STAGED)
    """Side of the square images in pixels; images of other shapes have about the same area."""
    buckets: Literal["none", "aspect"] = Field(default="none", json_schema_extra=STAGED)
    """`none` crops all images to squares; `aspect` crops each to the nearest of several aspect ratios."""
    max_aspect: float = Field(default=2.0, ge=1, le=8, json_schema_extra=STAGED)
    """Longer side divided by shorter side of the longest bucket (data.buckets aspect)."""
    text_lengths: tuple[int, ...] = Field(default=(), json_schema_extra=STAGED)
    """Rising caption lengths in tokens, each of which makes buckets of its own; the last one must equal
    text_encoder.max_length. Empty: all captions are padded to text_encoder.max_length."""
    characters_per_token: float = Field(default=1.0, gt=0, json_schema_extra=STAGED)
    """Characters per token by which a caption's length is estimated when its bucket is chosen. At 1 no caption is cut
    that text_encoder.max_length would not cut; a larger number gives shorter padding."""
    num_workers: int = Field(default=2, ge=0, json_schema_extra=RUNTIME)
    """Reader processes per rank; 0 reads in the training process."""
    crop: Literal["random", "center"] = Field(default="random", json_schema_extra=STAGED)
    """Where the largest part of the wanted shape is cut from a training image. Latents and validation images are always
    cut from the centre."""
    flip: float = Field(default=0.5, ge=0, le=1, json_schema_extra=STAGED)
    """Probability that an image is flipped horizontally. The caption stays, so one that says "left" becomes wrong."""
    label_dropout: float = Field(default=0.1, ge=0, le=1, json_schema_extra=STAGED)
    """Probability that a class label is replaced by "no class", for models that are conditioned on classes."""
    epochs: int | None = Field(default=None, ge=1)
    """How often the data set is read; null repeats it without end."""
    first_step: int = Field(default=0, ge=0)
    """Step at which the order of these data begins, with the first epoch: launch/branch.py --new-data sets it where a
    run goes on with other data, such as a set that has grown."""
    max_bad_share: float = Field(default=0.01, ge=0, le=1, json_schema_extra=RUNTIME)
    """Share of the samples read that may be unreadable. Above it, from ten of them on, the run saves and stops, and
    launch/precompute.py stops."""
    max_image_pixels: int = Field(default=100_000_000, ge=1)
    """Images of more pixels count as unreadable and are not decoded; one takes up to 10 bytes of memory per pixel."""
    sources: tuple[SourceConfig, ...] = Field(default=(), json_schema_extra=RUNTIME)
    """Several data sets, each with its weight, in place of data.shards."""
    filter: FilterConfig = Field(default=FilterConfig(), json_schema_extra=STAGED)
    """Samples that are left out when the shards, data.val_shards too, are indexed."""
    captions: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """.jsonl or .parquet files of captions by image, for shards (data.val_shards too) that hold no captions: a path, a
    folder, or a pattern of paths with commas, braces or wildcards."""
    caption_fields: tuple[str, ...] = Field(default=(), json_schema_extra=STAGED)
    """Where a sample's caption is, the first that is there and not empty: fields of its .json member or of
    data.captions, or plain members (`llava` is KEY.llava). Empty: KEY.txt, else `captions` or `caption`."""
    caption_key: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Field or column of data.captions that names the image; null takes the first of key, image_id, image, __key__."""
    index_cache: str = Field(default=".cache/index", json_schema_extra=RUNTIME)
    """Folder for packed indexes, for indexes of URLs, and for those of shards whose own folder is read-only."""
    prefetch_mib: int = Field(default=1024, ge=1, json_schema_extra=RUNTIME)
    """MiB of memory that one reader process may fill with bytes read ahead from URLs."""
    timeout_s: float = Field(default=60.0, gt=0, json_schema_extra=RUNTIME)
    """Seconds after which a read of a URL is given up and repeated."""
    retries: int = Field(default=4, ge=0, json_schema_extra=RUNTIME)
    """How often a failed read of a URL is repeated before its samples count as unreadable."""
    cache_dir: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Folder that keeps what was read from URLs; null keeps nothing."""
    cache_gib: float = Field(default=100.0, gt=0, json_schema_extra=RUNTIME)
    """GiB that data.cache_dir may hold; the blocks unused for longest are deleted first."""

    def __post_init__(self) -> None:
        if not self.shards.strip():
            raise ValueError(f"data.shards must be a folder, .tar files or 'synthetic', got {self.shards!r}")
        for key, text in (("shards", self.shards), ("val_shards", self.val_shards), ("captions", self.captions)):
            _check_no_secret(f"data.{key}", text)

    @property
    def synthetic(self) -> bool:
        """Whether samples are generated instead of read."""
        return self.shards == SYNTHETIC and not self.sources

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources that are read: `sources`, or the one that `shards` names."""
        own = () if self.shards == SYNTHETIC else (SourceConfig(self.shards, captions=self.captions),)
        return self.sources or own

    def bucket_sizes(self, multiple: int) -> list[tuple[int, int]]:
        """(height, width) in pixels of the images, the square first, then by rising aspect ratio.

        multiple: pixels along one side of a token. Areas are near resolution²: the shorter side falls in steps of about
        resolution / 16, rounded to `multiple`, and the longer side is the multiple of that step which comes nearest.
        At 256 a step is 16 pixels: 256 x 256, 240 x 272, 224 x 288, 208 x 320, 192 x 336, and the same upright.
        """
        sizes = [(self.resolution, self.resolution)]
        if self.buckets == "none":
            return sizes
        step = multiple * max(1, round(self.resolution / BUCKET_STEPS / multiple))
        for short in range(self.resolution - step, 0, -step):
            long = step * round(self.resolution**2 / short / step)
            if long > self.max_aspect * short:
                break
            sizes += [(short, long), (long, short)]
        return sizes


@dataclass(frozen=True, config=CONFIG)
class MoreTextConfig:
    """One more text encoder beside the first."""

    path: str = Field(default=NONE, json_schema_extra=RUNTIME)
    """As text_encoder.path, of this encoder."""
    subfolder: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """As text_encoder.subfolder, of this encoder."""
    max_length: int = Field(default=256, ge=1)
    """As text_encoder.max_length, of this encoder."""
    width: int = Field(default=4096, ge=1)
    """As text_encoder.width, of this encoder."""
    prefix: str = ""
    """As text_encoder.prefix, of this encoder."""
    chat: str | None = None
    """As text_encoder.chat, of this encoder."""
    thinking: bool = False
    """As text_encoder.thinking, of this encoder."""
    layers: tuple[int, ...] = ()
    """As text_encoder.layers, of this encoder."""
    pad: bool = False
    """As text_encoder.pad, of this encoder."""
    pooled_width: int = Field(default=0, ge=0)
    """As text_encoder.pooled_width, of this encoder."""
    join: Literal["tokens", "features", "none"] = "tokens"
    """Where its states go: behind the tokens of the encoders before it, behind the features of the one before it, or
    nowhere (its pooled vector alone is taken). What is narrower or shorter is filled up with zeros."""


@dataclass(frozen=True, config=CONFIG)
class TextEncoderConfig:
    """The frozen text encoder, or several side by side."""

    path: str = Field(default=NONE, json_schema_extra=RUNTIME)
    """A local folder or a hub id; `none` where text states come with the data."""
    subfolder: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Folder below text_encoder.path, as in a diffusers pipeline (`text_encoder_3`)."""
    max_length: int = Field(default=256, ge=1, json_schema_extra=STAGED)
    """Tokens per caption, those that the chat template writes behind it among them; longer captions are cut."""
    width: int = Field(default=4096, ge=1)
    """Features of a text state, which are compared with those of the encoder that is loaded: its hidden size, times the
    number of text_encoder.layers where more than one is chosen."""
    dropout: float = Field(default=0.1, ge=0, le=1, json_schema_extra=STAGED)
    """Probability that a caption is replaced by the empty one before it is encoded."""
    device: Literal["cpu"] | None = Field(default=None, json_schema_extra=RUNTIME)
    """`cpu` keeps the encoder in the host's memory and computes there; null puts it beside the model."""
    shard: bool = Field(default=False, json_schema_extra=RUNTIME)
    """Shard the encoder over the processes of a node, each of which otherwise holds a whole copy."""
    prefix: str = ""
    """Text before each caption, which a language model reads and of which no state is kept."""
    chat: str | None = None
    """System text of a chat: the tokenizer's chat template is written around each caption, which is the user's message,
    and the answer is begun; what stands before the caption is cut from the states. "" writes no system message; null
    uses no template."""
    thinking: bool = False
    """Leave the answer's thinking on, where the chat template can turn it off."""
    layers: tuple[int, ...] = ()
    """Layers whose states are taken, numbered as transformers' hidden_states (0 is the embedding, -1 the last); several
    lie behind each other along the features. Empty takes the last one."""
    pad: bool = False
    """Let encoder and model see the padding, as Stable Diffusion 3 does: every caption then has max_length tokens, none
    of which is masked."""
    pooled_width: int = Field(default=0, ge=0)
    """Features of CLIP's pooled vector, where it is taken: those of all encoders together then condition the model in
    place of the mean of the states. 0 takes none."""
    more: tuple[MoreTextConfig, ...] = ()
    """More text encoders, each a section with the keys of the first and `join`; Stable Diffusion 3 has three."""

    @property
    def models(self) -> tuple["TextModelConfig", ...]:
        """All text encoders, the first one first."""
        return (self, *self.more)

    def _blocks(self) -> list[list["TextModelConfig"]]:
        """Encoders whose states share tokens, in the order of the tokens."""
        blocks: list[list[TextModelConfig]] = [[self]]
        for one in self.more:
            if one.join == "features":
                blocks[-1].append(one)
            elif one.join == "tokens":
                blocks.append([one])
        return blocks

    @property
    def total_width(self) -> int:
        """Features of a text state that the model sees."""
        return max(sum(one.width for one in block) for block in self._blocks())

    @property
    def total_length(self) -> int:
        """Most tokens of a caption that the model sees."""
        return sum(max(one.max_length for one in block) for block in self._blocks())

    @property
    def total_pooled(self) -> int:
        """Features of the pooled vector that the model sees; 0 where it takes the mean of the states."""
        return sum(one.pooled_width for one in self.models)


TextModelConfig: TypeAlias = TextEncoderConfig | MoreTextConfig
"""Where one text encoder lies, what it reads, and which of its states are taken."""


@dataclass(frozen=True, config=CONFIG)
class AutoencoderConfig:
    """The frozen image autoencoder."""

    path: str = Field(default=NONE, json_schema_extra=RUNTIME)
    """A local folder or hub id of an autoencoder of diffusers: AutoencoderKL (SD 1 to 3, FLUX.1), AutoencoderKLFlux2,
    AutoencoderDC or AutoencoderKLQwenImage; `none` trains on pixels (channels 3, downsample 1), on synthetic latents,
    or on latents that come with the data."""
    subfolder: str | None = Field(default=None, json_schema_extra=RUNTIME)
    """Folder below autoencoder.path, as in a diffusers pipeline (`vae`)."""
    channels: int = Field(default=16, ge=1)
    """Channels of a latent, which are compared with those of the autoencoder that is loaded (FLUX.2: 128)."""
    downsample: int = Field(default=8, ge=1)
    """Pixels along one side of a latent's cell, which is compared with that of the autoencoder that is loaded (FLUX.2:
    16)."""
