"""What tuning on the proxy costs, as a share of one run of the target: in true FLOPs and by the paper's formula."""

import math
from dataclasses import dataclass

from ..build.engine import build_mup_table
from ..build.flops import training_flops
from ..config.schema import TrainConfig
from ..config.stages import images_of
from .definition import Published, Search
from .space import Sampler


@dataclass(frozen=True)
class Size:
    """A run: parameters, steps, images and FLOPs of the whole training. batch: of its first stage."""

    name: str
    width: int
    parameters: int
    batch: int
    steps: int
    images: int
    flops: float

    @classmethod
    def of(cls, config: TrainConfig) -> "Size":
        table = build_mup_table(config)
        parameters = sum(math.prod(row.shape) for row in table.rows.values())
        train = config.train
        name, width = str(config.run.name), config.model.width
        images, flops = images_of(config), training_flops(config)
        return cls(name, width, parameters, train.global_batch_size, train.steps, images, flops)


@dataclass(frozen=True)
class Cost:
    """runs: trials x seeds, each to its end (trials that end early cost less)."""

    runs: int
    proxy: Size
    target: Size
    published: Published | None
    sampler: Sampler
    keys: int
    """How many are searched."""

    @property
    def flops(self) -> float:
        return self.runs * self.proxy.flops

    @property
    def flops_share(self) -> float:
        return self.flops / self.target.flops

    @property
    def formula_share(self) -> float:
        """The paper's formula: trials x parameters x images of the proxy over parameters x images of the target."""
        return self._formula(self.proxy.parameters, self.target.parameters)

    @property
    def published_share(self) -> float | None:
        """The formula with a paper's rounded sizes."""
        p = self.published
        return None if p is None else self._formula(p.proxy_parameters, p.target_parameters)

    def _formula(self, proxy_parameters: float, target_parameters: float) -> float:
        return self.runs * proxy_parameters * self.proxy.images / (target_parameters * self.target.images)

    def describe(self) -> str:
        """The account as text."""
        lines = [
            f"search: {self.runs} runs of {_describe(self.proxy)}",
            f"points: {self.sampler} sampler over {self.keys} key{'s' if self.keys > 1 else ''}",
            f"target: one run of {_describe(self.target)}",
            "tuning as a share of one run of the target, trials counted to their end:",
            f"  {self.flops_share:7.2%}  true FLOPs, {self.flops:.3g} of {self.target.flops:.3g} (attention included; "
            "forward and twice that backward; captions at full length)",
            f"  {self.formula_share:7.2%}  trials x parameters x images, exact parameters",
        ]
        if self.published and (share := self.published_share) is not None:
            sizes = f"{self.published.proxy_parameters / 1e9:g} B and {self.published.target_parameters / 1e9:g} B"
            lines.append(f"  {share:7.2%}  the same with the paper's rounded sizes, {sizes}")
        if self.proxy.batch != self.target.batch:
            lines.append(f"The batches differ ({self.proxy.batch} and {self.target.batch}): images count, not steps.")
        if self.published and self.published.note:
            lines.append(self.published.note)
        return "\n".join(lines)


def cost_of(search: Search, proxy: TrainConfig, target: TrainConfig) -> Cost:
    runs, keys = search.trials * search.seeds, len(search.space)
    return Cost(runs, Size.of(proxy), Size.of(target), search.published, search.sampler, keys)


def _describe(size: Size) -> str:
    return (
        f"{size.name}, width {size.width}: {size.parameters / 1e9:.4g} B parameters, {size.steps} steps of {size.batch}"
    )
