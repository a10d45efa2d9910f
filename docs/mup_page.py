"""docs/mup.md from the muP tables of the configs: python -m docs.mup_page > docs/mup.md (no weights are made)."""

import argparse
from collections.abc import Iterator
from typing import NamedTuple

from launch.common import run
from trainer.build.engine import build_mup_table
from trainer.config.load import load_config
from trainer.config.schema import TrainConfig
from trainer.config.yaml_files import CONFIG_DIR
from trainer.mup.table import ParameterRow

HEAD = """# What μP does to each weight

Written by `python -m docs.mup_page > docs/mup.md` from the tables that training uses; a test holds it current.

The width d grows by whole heads at a fixed head_dim, so attention keeps 1/sqrt(head_dim). m is the width over the
base width (of a tensor's own fan_in). Factors multiply the base hyperparameters and are all 1 at the base width. This
table is AdamW's; that of Muon follows.

| role | dimensions | init std x | input x | lr x | wd x | why |
|---|---|---|---|---|---|---|
| input | fixed -> d | 1 | 1 | 1 | 1 | its sum over fan_in does not grow with the width |
| hidden | d -> d | 1/sqrt(m) | 1 | 1/m | m | Adam moves every entry by lr, alike for all samples: d such \
entries add up to d, not sqrt(d). torch's AdamW decays by lr x wd, which stays the same |
| output | d -> fixed | 1 | 1/m | 1 | 1 | the factor is on the layer's input (never its bias), so that the \
gradients of all weights before it shrink by the same 1/m |
| inner output: `projector.fc1` | d -> fixed | sqrt(m) | 1/m | 1 | 1 | as output, but more layers follow: what it \
gives at init keeps its size |
| vector | d | 1 | 1 | 1 | 0 | one number per feature, nothing to sum over |
| fixed | none | 1 | 1 | 1 | 0, of matrices 1 | the same tensor at every width |

Gradients shrink as the width grows, so a clip norm that was found on the proxy is looser on the target:
`mup/clip_share` tells how often it acts. Adam's epsilon is the config's at every width (`mup.eps_rule: constant`;
default 1e-12): gradients shrink with 1/m, and behind a zero gate they are as small as 1e-9. `eps_rule: width` divides
epsilon by m instead. The final weight starts at zero, which takes away the only transient that depends on the width.
Weights decay by role (`optim.decay: matrices`) unless a config says `all`.

Base hyperparameters that the table carries too: `mup.output_multiplier` (times 1/m), `mup.role_lr.ROLE` (on the lr of a
role), and `mup.factors` on lr, wd and init by kind of module or by name pattern, of either optimizer:

```yaml
mup:
  factors:
    attention: {lr: 0.7}                        # kinds: attention, mlp, modulation, text, image, label, time, patch, \
skip, final
    "blocks.*.image.mlp*": {lr: 1.5, init: 1.1} # patterns of parameter names; no two keys may set the same
```

## Under Muon

`optim.kind: muon` gives the matrices of the kinds attention and mlp to Muon; all else stays with AdamW and the rules
above. `optim.muon.include` and `optim.muon.exclude` (kinds or name patterns) choose otherwise among the hidden weights
of linear layers. Muon moves a matrix by lr x scale x the polar factor of its momentum, whose singular values are all 1.
The last column of the tables below is its scale; lr x and wd x are AdamW's there, and 1 under Muon (wd_rule
independent).

| of a weight of Muon | x | why |
|---|---|---|
| scale | sqrt(fan_out / fan_in) | a step then moves the output by at most lr in rms, of inputs with rms 1, at every \
shape: what μP asks of a change (arXiv 2310.17813). Torch's `max(1, .)` moves [D, 4D] twice as far; a scale that \
matches the rms of Adam's steps does not transfer across the width |
| matrices | 3 for q, k, v; 2 for a gate and its features | each has singular values of its own; the polar factor of \
all three as one [3D, D] would bind them together. `optim.muon.by_head` takes each head [K, D], with sqrt(K/D); a \
gated MLP has none |
| lr | 1 | the change of the output does not grow with the width, so no 1/m is due |
| wd, `wd_rule: independent`, `sqrt`, `coupled` | 1, 1/sqrt(m), 1/m | lr x wd goes with the width as under AdamW, \
whose lr has the 1/m. With matrix optimizers 1/m is reported best (arXiv 2512.05620): `coupled` |
| eps | none | nothing is divided by a gradient |
| init, input x | as hidden | they are of the forward pass, whatever updates the weight |
| depth: lr | L^(alpha - 1) | as AdamW's: each branch changes in proportion to its lr, alike in all blocks |

Under `mup.parametrization: sp` the scale stays, because it is Muon's and not μP's, and the factors of the width go.

## Depth, and an init

`mup.base_depth` (off by default) scales with the depth: CompleteP (arXiv 2505.01618), as Complete(d)P (arXiv
2512.22382) has it. L is depth / base depth, alpha is `mup.depth_alpha`: 1, or 1/2.

| in the blocks | x | alpha 1 | alpha 1/2 | why |
|---|---|---|---|---|
| what a block adds to the residual stream | L^-alpha | 1/L | 1/sqrt(L) | L branches add up to L if they agree, as the \
changes by training do, and to sqrt(L) if they do not, as at init |
| lr, of every role | L^(alpha - 1) | 1 | 1/sqrt(L) | with it L x L^-alpha x lr, the change of the stream by a step, \
stays |
| eps, under `eps_rule: width` | L^-alpha | 1/L | 1/sqrt(L) | gradients shrink as the branch does |
| wd, init | 1 | 1 | 1 | as the paper has them: at alpha 1/2, lr x wd of the blocks falls with the depth |

What is not in a block stays. U-ViT refuses it: its long skips are no residual branch. The sources found transfer with
either alpha, up to 32 times the depth, with QK-norm and on language.

One init differs from the muP paper's code on purpose: PixArt's patch embedding is Xavier-uniform over the flattened
patch, as PixArt's own code has it (std 0.0811 at base width 288). The paper's takes the convolution's four dimensions,
because `mup.init` sees no flattened view, and so counts the patch's pixels in fan_out too (0.0414). Unit latents then
enter with rms 0.32 instead of 0.17, beside positions with 0.71. It does not depend on the width in either, and to
change it would refuse the resume of every PixArt run.
"""


class Line(NamedTuple):
    """A row of the table, for all blocks alike."""

    pattern: str
    role: str
    init: str
    decays: bool


class Documented(NamedTuple):
    name: str
    config: TrainConfig
    target: dict[str, ParameterRow]
    base: dict[str, ParameterRow]
    muon: dict[str, ParameterRow]
    """As the target, under optim.kind muon."""

    @property
    def lines(self) -> tuple[Line, ...]:
        """What the configs of one backbone may share."""
        return tuple(
            dict.fromkeys(Line(_pattern(n), r.role, r.init, r.weight_decay > 0) for n, r in self.target.items())
        )


def _pattern(name: str) -> str:
    """blocks.3.mlp.fc1.weight -> blocks.*.mlp.fc1.weight."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def documented() -> Iterator[Documented]:
    for path in sorted(CONFIG_DIR.glob("*_mup.yaml")):
        config = load_config(str(path))
        at_base = load_config(str(path), [f"model.width={config.mup.base_width}"])
        under_muon = load_config(str(path), ["optim.kind=muon"])
        target, base, muon = (build_mup_table(each) for each in (config, at_base, under_muon))
        yield Documented(path.stem, config, dict(target.rows), dict(base.rows), dict(muon.rows))


def _muon(row: ParameterRow) -> str:
    """The scale of Muon's row, and of how many matrices; a dash where AdamW has it."""
    if row.optimizer == "adamw":
        return "-"
    return f"{row.scale:.4g}" + (f", of each of {row.matrices}" if row.matrices > 1 else "")


def section(group: list[Documented]) -> str:
    """The widest config's table, and the others that have the same rows at another width."""
    shown = max(group, key=lambda d: d.config.model.width)
    width, base_width = shown.config.model.width, shown.config.mup.base_width
    parts = [f"\n## {shown.name}\n", f"Width {width} against base {base_width}: m = {width / base_width:g}."]
    others = [
        f"`{d.name}` ({d.config.model.width} / {d.config.mup.base_width}: m = "
        f"{d.config.model.width / d.config.mup.base_width:g})"
        for d in group
        if d is not shown
    ]
    if others:
        parts[-1] += f" The same rows, with their own m and fan_in: {', '.join(others)}."
    parts += [
        "",
        "| parameter | role | init std, base -> target | lr x | wd x | input x | Muon: scale |",
        "|---|---|---|---|---|---|---|",
    ]
    seen: dict[str, None] = {}
    for name, row in shown.target.items():
        before = shown.base[name].init_std
        init = row.init if row.init in ("zeros", "ones") else f"{before:.3g}"
        init += "" if row.init_std == before else f" -> {row.init_std:.3g}"
        numbers = f"{row.lr:.4g} | {row.weight_decay:.4g} | {row.multiplier:.4g}"
        seen[f"| `{_pattern(name)}` | {row.role} | {init} | {numbers} | {_muon(shown.muon[name])} |"] = None
    return "\n".join([*parts, *seen]) + "\n"


def document() -> str:
    groups: dict[tuple[str, tuple[Line, ...]], list[Documented]] = {}
    for each in documented():
        groups.setdefault((each.config.model.kind, each.lines), []).append(each)
    return HEAD + "".join(section(group) for group in groups.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(document(), end="")


if __name__ == "__main__":
    run(main)
