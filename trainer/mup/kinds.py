"""Which parameters a person's key names: those of a kind of module ("attention") or those that a pattern matches.

Kinds are the backbone's (models.backbone.Backbone.KINDS): patterns of parameter names. Muon takes the matrices from
width to width of two of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

Kinds = Mapping[str, Sequence[str]]

OF_MUON = ("attention", "mlp")


class ChoiceError(ValueError):
    """A person's choice does not fit the model's parameters; the message names the config's key and what to do."""


def named(key: str, names: Collection[str], kinds: Kinds) -> list[str]:
    """The names that a kind of module, or else a pattern (fnmatch), stands for."""
    patterns = kinds.get(key, (key,))
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def of_muon(
    matrices: Collection[str],
    others: Mapping[str, str],
    kinds: Kinds,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> frozenset[str]:
    """The parameters that Muon updates: matrices of the kinds OF_MUON, and of `include`, but none of `exclude`.

    matrices: names of the weights of linear layers from width to width. others: what each other matrix is, by name.
    include, exclude: kinds or patterns. Raises ChoiceError with all that do not fit.
    """
    usual = {name for kind in OF_MUON if kind in kinds for name in named(kind, matrices, kinds)}
    added = {key: {*named(key, matrices, kinds)} - usual for key in include}
    taken = usual.union(*added.values())
    out = {key: taken.intersection(named(key, matrices, kinds)) for key in exclude}
    problems = [*_wrong_includes(added, others, usual, {*matrices} - usual, kinds)]
    problems += [
        f'optim.muon.exclude "{key}" takes nothing from Muon: it names none of its {len(taken)} matrices '
        f"({_examples(taken)}); fix or remove it"
        for key, names in out.items()
        if not names
    ]
    found = taken.difference(*out.values())
    if not found and not problems:
        problems = ["optim.kind muon: no matrix is left for Muon; exclude fewer, or use optim.kind adamw"]
    if problems:
        raise ChoiceError("\n  ".join(problems))
    return frozenset(found)


def factors_by_name(
    factors: Mapping[str, Mapping[str, float]], names: Collection[str], kinds: Kinds
) -> dict[str, dict[str, float]]:
    """{parameter: {factor: value}} from the same by kind or pattern. Raises ChoiceError with every key that names no
    parameter, and every two that set the same factor of one."""
    problems: list[str] = []
    found: dict[str, dict[str, float]] = {}
    setter: dict[tuple[str, str], str] = {}
    for key, given in factors.items():
        of_key = named(key, names, kinds)
        if not of_key:
            problems.append(
                f'mup.factors "{key}" names no parameter: give a kind of module ({", ".join(kinds)}) or a name pattern '
                f"that matches one of {_examples(names)}"
            )
        for factor, value in given.items():
            clashes: dict[str, str] = {}
            for name in of_key:
                other = setter.setdefault((name, factor), key)
                if other == key:
                    found.setdefault(name, {})[factor] = value
                else:
                    clashes.setdefault(other, name)
            problems += [
                f'mup.factors "{other}" and "{key}" both set {factor} of {name}: let them name different parameters'
                for other, name in clashes.items()
            ]
    if problems:
        raise ChoiceError("\n  ".join(problems))
    return found


def _wrong_includes(
    added: Mapping[str, Collection[str]],
    others: Mapping[str, str],
    usual: Collection[str],
    free: Collection[str],
    kinds: Kinds,
) -> Iterator[str]:
    """What is wrong with entries of optim.muon.include. added: what each of them adds. usual, free: the matrices that
    Muon has without them, and the others."""
    for key, names in added.items():
        of_key = f'optim.muon.include "{key}"'
        unfit = named(key, others, kinds)
        if unfit and key not in kinds:
            yield (
                f"{of_key} names {unfit[0]}, which is {others[unfit[0]]}: Muon orthogonalises weights of linear layers "
                "from width to width alone; name no other"
            )
        elif not names and named(key, usual, kinds):
            yield f"{of_key} adds nothing: {_examples(named(key, usual, kinds))} go to Muon without it; remove it"
        elif not names:
            yield (
                f"{of_key} names no weight of a linear layer from width to width: give a kind of module "
                f"({', '.join(kinds)}) or a name pattern that matches one of {_examples(free)}"
            )


def _examples(names: Collection[str]) -> str:
    shown = sorted(names)[:2]
    return ", ".join([*shown, *(["..."] if len(names) > len(shown) else [])])
