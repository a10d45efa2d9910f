"""The commands of launch/search.py about a study that has run: its report, the transfer, and its horizon."""

from collections.abc import Sequence
from pathlib import Path

from data.redaction import message
from launch.common import Command, add_overwrite, command, keep_files
from launch.processes import importing, kill_tree
from trainer.mup.transfer_rules import RULES

SEARCH = Path(__file__).resolve().parents[1] / "search.py"


def of_study(doc: str, name: str) -> Command:
    """The parser of a command that takes a study."""
    parser = command(doc, config=False, overrides=None, name=name)
    parser.add_argument("--study", required=True, help="the study's folder, or its name under runs/")
    return parser


def report_study(given: Sequence[str]) -> int:
    arguments = of_study("Write one page and its pictures to the study's folder.", "report").parse_args(given)
    from trainer.search.live_table import Table
    from trainer.search.page import write_page
    from trainer.search.report import describe_factors, make_report
    from trainer.search.study import Study

    study = Study.load(arguments.study)
    print(message(Table(study).summary()))
    report = make_report(study)
    fit = [f"optim.lr: {report.lr_fit}"] if report.lr_fit else []
    print(*fit, f"sampler: {report.sampler}", *describe_factors(report), write_page(report), sep="\n")
    return 0


def transfer_study(given: Sequence[str]) -> int:
    parser = of_study("Write the target's config with the base hyperparameters that were found.", "transfer")
    parser.add_argument("--to", required=True, help="the target's config")
    parser.add_argument("--trial", type=int, help="number of a trial, instead of the best")
    parser.add_argument(
        "--value", choices=("fit", "best"), help="optim.lr of the fit or of the best trial (default: fit)"
    )
    parser.add_argument("--rules", choices=RULES, default="none", help="for another batch and duration (default: none)")
    parser.add_argument("--force-rules", action="store_true", help="also where the rules were not tested")
    parser.add_argument("--output", required=True, type=Path, help="the config to write")
    add_overwrite(parser)
    arguments = parser.parse_args(given)
    keep_files(arguments.overwrite, arguments.output)
    from trainer.search.study import Study
    from trainer.search.transfer import Choice, write_target

    choice = Choice(arguments.trial, arguments.value, arguments.rules, arguments.force_rules)
    print(message("\n".join(write_target(Study.load(arguments.study), arguments.to, arguments.output, choice))))
    return 0


def horizon_of_study(given: Sequence[str]) -> int:
    parser = of_study("Train the best point for several durations: how does its learning rate move?", "horizon")
    parser.add_argument("--branches", default="0.25,0.5,1", help="durations as shares of the proxy's steps")
    parser.add_argument("--lrs", default="0.25,0.5,1,2,4", help="factors of the best learning rate, at least three")
    parser.add_argument("--seeds", type=int, default=1, help="runs per learning rate (default: 1)")
    parser.add_argument("--workers", type=int, default=1, help="runs side by side on this machine (default: 1)")
    parser.add_argument("--only-train", action="store_true", help="leave the fit to another of the same command")
    a = parser.parse_args(given)
    with importing():
        from trainer.search.horizon import measure
    worker = [str(SEARCH), "horizon", *given, "--workers", "1", "--only-train"]
    return measure(a.study, (a.branches, a.lrs, a.seeds), worker, a.workers, kill_tree, not a.only_train)
