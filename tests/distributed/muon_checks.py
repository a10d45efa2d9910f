"""What Muon must keep on shards, checked on every rank; run by test_muon.py, JSON on stdout."""

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.build.engine import build_mup_table
from trainer.config.schema import TrainConfig
from trainer.parallel.engine import Engine
from trainer.parallel.mesh import World, init_world
from trainer.parallel.polar import polar_factor

from .engine_checks import (
    configured,
    made,
    non_finite_step_changes_nothing,
    run_steps,
    save_and_load,
    swapped_weights_are_used_and_given_back,
    tell,
)

MUON = ("optim.kind=muon", "optim.muon.lr=0.01", "optim.muon.weight_decay=2", "mup.wd_rule=sqrt")


class Moves:
    """A Watch: how far a step of Muon ends, in units of lr, from where it would by the table's (lr, decay, scale), and
    from where it would with another lr, decay or scale; on whole weights, momenta and gradients."""

    def __init__(self, config: TrainConfig, engine: Engine) -> None:
        self._muon, self._engine = config.optim.muon, engine
        self._rows = {name: row for name, row in build_mup_table(config).rows.items() if row.optimizer == "muon"}
        self._ends: dict[str, list[Tensor]] = {}
        self.wrong: list[str] = []

    def before(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        muon, state = self._muon, self._engine.state()
        for name, row in self._rows.items():
            start, gradient, old = (
                self._engine.whole(name, shard).double().clone()
                for shard in (weights[name], gradients[name], state[name]["momentum"])
            )
            momentum = muon.momentum * old + (1 - muon.momentum) * gradient
            ahead = muon.momentum * momentum + (1 - muon.momentum) * gradient
            polar = torch.cat([*polar_factor(torch.stack(ahead.chunk(row.matrices)), muon.steps)])
            assert muon.weight_decay is not None
            lr, decay = muon.lr * row.lr, muon.weight_decay * row.weight_decay
            ways = (
                (lr, decay, row.scale),
                (2 * lr, decay, row.scale),
                (lr, 2 * decay, row.scale),
                (lr, decay, 1.01 * row.scale),
            )
            self._ends[name] = [start - a * (w * start + scale * polar) for a, w, scale in ways]

    def after(self, weights: Mapping[str, Tensor]) -> None:
        for name, ends in self._ends.items():
            end = self._engine.whole(name, weights[name])
            own, *others = (float((end - one).abs().max()) / self._muon.lr for one in ends)
            if own > 1e-4 or min(others) < 1e-3:
                self.wrong.append(f"{name}: {own:.2g} {others}")


def one_step_moves_as_the_table_says(world: World) -> list[str]:
    """Measured, not asked, at a second step, when there is a momentum."""
    config = configured("parallel.precision=fp32", *MUON)
    engine = made(config, world)
    run_steps(config, engine, world, 1)
    moves = Moves(config, engine)
    run_steps(config, engine, world, 1, watch=moves)
    return moves.wrong


def another_setting_is_seen(world: World) -> dict[str, int]:
    """How many of Muon's weights the check above finds where all of its groups have another setting, less all."""
    config, found = configured("parallel.precision=fp32", *MUON), {}
    for key in ("lr_scale", "weight_decay", "scale"):
        engine, moves = made(config, world), None
        run_steps(config, engine, world, 1)
        groups = [group for group in engine._update._groups if group["optimizer"] == "muon"]
        for group in groups:
            group[key] *= 1.1
        moves = Moves(config, engine)
        run_steps(config, engine, world, 1, watch=moves)
        found[key] = len(moves.wrong) - sum(len(group["params"]) for group in groups)
    return found


def main() -> None:
    torch.set_num_threads(1)
    world = init_world(int(sys.argv[1]))
    tell(
        world,
        {
            "one_step_moves_as_the_table_says": one_step_moves_as_the_table_says(world),
            "another_setting_is_seen": another_setting_is_seen(world),
            "non_finite_step_changes_nothing": non_finite_step_changes_nothing(world, *MUON),
            "save_and_load": save_and_load(world, *MUON),
            "swapped": swapped_weights_are_used_and_given_back(world, *MUON),
        },
    )


if __name__ == "__main__":
    main()
