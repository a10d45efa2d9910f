"""Write runs and studies as one file: the page of `mudit watch` with its data and pictures, which needs no other file.

mudit report runs/demo --output demo.html
mudit report runs/a runs/b --output both.html        (laid over each other)
"""

from pathlib import Path

from data.redaction import message
from launch.common import add_overwrite, command, keep_files, run
from launch.processes import importing
from trainer.errors import ConfigError


def main() -> int:
    parser = command(__doc__, config=False, overrides=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs and studies, or names under runs/")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.html", help="the file to write")
    add_overwrite(parser)
    arguments = parser.parse_args()
    keep_files(arguments.overwrite, arguments.output)
    with importing():
        from launch.watching.sources import Sources
        from trainer.files import write_atomically
        from trainer.page.html import report_page

    sources = Sources(arguments.runs)
    folders = [*sources.look().values()]
    found = [source.data() for source in folders]
    for each in found:
        if each["problem"]:
            raise ConfigError(f"{each['folder']}: {each['problem']}")
    reports: dict[int, str] = {}
    for number, each in enumerate(found):
        if each["kind"] == "study" and each["has_report"]:
            from trainer.page.study_data import read_report

            reports[number] = read_report(folders[number].folder).decode(errors="replace")
    page = report_page(found, [source.folder for source in folders], reports, sources.notes)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, page)
    for note in sources.notes:
        print(message(f"warning: {note}"))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    run(main)
