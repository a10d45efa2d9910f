"""What is asked of the config of any backbone. No torch."""

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol


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

    def conflicts(self, resolution: int, side: int, text_length: int) -> Iterator[str]:
        """What is wrong with images of `resolution` pixels, `side` tokens on the longest side, and captions of
        `text_length` tokens."""
        ...

    def multiply_adds(self, in_channels: int, text_width: int, image_tokens: int, text_tokens: int) -> int:
        """Of one image's forward pass: matrix products and attention; elementwise work is left out."""
        ...
