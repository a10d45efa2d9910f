"""Does the size of a model suit its data? Images per parameter, beside what is best for the run's compute."""

from typing import NamedTuple

from ..build.flops import training_flops
from ..config.schema import TrainConfig
from ..forecast.track import Track

PAPER = "arXiv 2410.08184"


class RightSize(NamedTuple):
    """parameters, images: the best ones for the compute of a run, as `source` has them."""

    source: str
    parameters: float
    images: float

    @property
    def images_per_parameter(self) -> float:
        return self.images / self.parameters


def right_size(config: TrainConfig) -> RightSize:
    """For the compute of a run: of its forecast where it names one, else of the paper.

    The paper finds N = 0.0009 C^0.5681 parameters and D = 186.8535 C^0.4319 image tokens, C in FLOPs. It was
    measured on in-context DiTs of 1 M to 1 B parameters on latents of another autoencoder: an order of magnitude.
    """
    if (track := Track.of(config)) is not None and track.optimum is not None:
        return RightSize(f"the forecast {track.source}", track.optimum[0], track.optimum[1])
    flops = training_flops(config)
    tokens = 186.8535 * flops**0.4319
    return RightSize(PAPER, 0.0009 * flops**0.5681, tokens / config.image_tokens)


def describe_size(found: dict[str, float | str]) -> str:
    """A line of the page, from estimate's `right_size`."""
    own, best = float(found["images_per_parameter"]), float(found["best_images_per_parameter"])
    times, more = (own / best, "more") if own > best else (best / own, "fewer")
    doubt = " (another model and autoencoder: an order of magnitude)" if found["source"] == PAPER else ""
    return (
        f"data: {own:.3g} images per parameter. For this compute {found['source']}{doubt} finds "
        f"{float(found['best_parameters']) / 1e9:.3g} B parameters and {best:.3g} images per parameter best: this run "
        f"has {times:.1f} times {more}"
    )
