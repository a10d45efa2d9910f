"""What a run does beside training: validation, sample grids and evaluations, of the live and the EMA weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError

from ..evaluate.evaluation import prepare
from ..evaluate.generate import save_grid
from ..evaluate.metrics import MetricError
from ..evaluate.suite import load_suite
from ..evaluate.val_loss import validation
from ..files import write_atomically
from ..input.training_data import validation_bank
from ..parallel.engine import Engine
from ..parallel.precision import precision_of, without_fp8
from .engine import build_objective
from .inference import image_generator, sample_images
from .inputs import Inputs

Averaged = Callable[[], AbstractContextManager[None]]


class SideJobs(NamedTuple):
    """See Run."""

    validate: Callable[[], dict[str, float]]
    write_grid: Callable[[Path], None]
    evaluate: Callable[[], dict[str, Any]]


def build_side_jobs(inputs: Inputs, engine: Engine, with_averages: Averaged, notes: list[str]) -> SideJobs:
    """Validation, sample grids and evaluation; what they need is read now. with_averages: a context in which the
    engine's model has the EMA weights."""
    config, encoders = inputs.config, inputs.encoders
    bank = []
    if config.train.validate_every:
        bank = validation_bank(inputs.data.validation(), encoders.encode, config.data, inputs.world, notes)
    objective = build_objective(config, inputs.resolved)
    side_jobs = SideJobs(
        validate=partial(validation, engine.model, objective, bank, with_averages),
        write_grid=_grid_writer(inputs, engine, with_averages),
        evaluate=_evaluator(inputs, engine, with_averages),
    )
    if encoders.without_images and config.train.sample_every:
        notes.append(f"no sample grids: {encoders.without_images}")
    return side_jobs


def _grid_writer(inputs: Inputs, engine: Engine, with_averages: Averaged) -> Callable[[Path], None]:
    config, world = inputs.config, inputs.world
    generate = image_generator(config, engine, inputs.encoders, inputs.resolved)
    prompts = list(config.sample.prompts[: config.sample.count])
    if not prompts and config.train.sample_every and not inputs.encoders.without_images:
        prompts = inputs.data.validation_prompts(config.sample.count)
        if not prompts:
            raise DataError("no validation sample has a prompt for the sample grids: give sample.prompts")

    def write_grid(path: Path) -> None:
        with with_averages():
            images = sample_images(generate, world, prompts)
        if world.rank == 0:
            save_grid(images, path)
            write_atomically(path.parent / "prompts.txt", "".join(f"{prompt}\n" for prompt in prompts))

    return write_grid


def _evaluator(inputs: Inputs, engine: Engine, with_averages: Averaged) -> Callable[[], dict[str, Any]]:
    """Figures of train.evaluate_suite as metrics names them."""
    config, world, encoders = inputs.config, inputs.world, inputs.encoders
    if not config.train.evaluate_every:
        return dict
    if encoders.without_images:
        raise DataError(f"train.evaluate_every needs images: {encoders.without_images}")
    _, suite = load_suite(config.train.evaluate_suite)
    precision = without_fp8(precision_of(config.parallel.precision, world.device))
    suite = suite.model_copy(update={"vae": None, "precision": precision})
    generate = image_generator(suite.applied(config), engine, encoders, inputs.resolved)
    evaluation = prepare(suite, config.data.resolution, config.label_classes, world.device, world.control)

    def evaluate() -> dict[str, Any]:
        try:
            with with_averages():
                images = {batch: evaluation.make(generate, batch) for batch, _ in evaluation.own_batches()}
            figures = evaluation.measure(lambda batch: evaluation.as_kept(images[batch]))
            return {f"val_{key}": score.value for key, score in figures.items()}
        except MetricError as error:  # constant images early, NaN after a divergence: no reason to stop
            return {"evaluation_error": str(error)} if world.rank == 0 else {}

    return evaluate
