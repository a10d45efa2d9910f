"""What is asked of the config of any backbone, and the section that all may have: the route of tokens. No torch."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


@dataclass(frozen=True, config=CONFIG)
class RouteConfig:
    """Blocks that see a random part of the image tokens in training (TREAD, arXiv 2501.04765), as those that compute
    least; validation, samples (but for sample.guidance_by) and exports see all tokens."""

    share: float = Field(gt=0, lt=1)
    """Share of the image tokens that skip the blocks of the route, drawn anew for each sample; as many of each."""
    start: int = Field(ge=0)
    """Number of blocks before the route."""
    end: int = Field(ge=1)
    """Number of blocks after which the tokens are back; the last block sees all of them."""
    fuse: Literal["none", "sprint"] = "none"
    """How they come back: as they left (`none`), or all tokens by a linear layer from what they were before the route
    and are after it, where a learned mask token stands for those that skipped it (`sprint`, arXiv 2510.21986)."""

    @property
    def blocks(self) -> range:
        """The blocks of the route, from 0."""
        return range(self.start, self.end)

    def kept(self, image_tokens: int) -> int:
        """How many of an image's tokens go through the route."""
        return max(1, image_tokens - round(self.share * image_tokens))


Route = Annotated[
    RouteConfig | None, Field(description="Blocks that see a part of the image tokens in training; null has none.")
]


class ModelConfig(Protocol):
    """What is asked of the config of any backbone: a frozen dataclass with these keys, facts and methods.

    A fact may be a key of one kind and fixed in another.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def kind(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def mlp_ratio(self) -> int: ...

    @property
    def condition(self) -> str:
        """Whether forward takes a TextCondition ("text"), or a ClassCondition with num_classes labels ("label")."""
        ...

    @property
    def num_classes(self) -> int:
        """0 where the condition is text."""
        ...

    @property
    def learn_sigma(self) -> bool:
        """Whether the variance is predicted beside the noise."""
        ...

    @property
    def micro_conditions(self) -> bool:
        """Whether forward reads the sizes of the images (SizedTextCondition)."""
        ...

    @property
    def residual(self) -> bool:
        """Whether the model is deep by residual branches alone, so that mup.base_depth can scale them."""
        ...

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised before attention, so that their scores are bounded."""
        ...

    @property
    def route(self) -> RouteConfig | None:
        """The blocks that see a part of the image tokens in training; None where all see all."""
        ...

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """What is wrong with images of `resolution` pixels, `side` tokens on the longest side, and captions of
        `text_length` tokens."""
        ...

    def multiply_adds(
        self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int, kept: int | None = None
    ) -> int:
        """Of one image's forward pass: matrix products and attention; elementwise work is left out.

        kept: image tokens that go through the blocks of the route; None: all do.
        """
        ...
