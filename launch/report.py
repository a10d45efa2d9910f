"""Write runs and studies as one file: the page of `mudit watch` with its data and pictures, which needs no other file.

mudit report runs/demo --output demo.html
mudit report runs/a runs/b --output both.html        (laid over each other)
"""

from pathlib import Path

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
        from launch.watching.sources import open_sources
        from trainer.files import write_atomically
        from trainer.page.html import report_page

    sources = open_sources(arguments.runs)
    found = [source.data() for source in sources]
    for each in found:
        if each["problem"]:
            raise ConfigError(f"{each['folder']}: {each['problem']}")
    reports: dict[int, str] = {}
    for number, each in enumerate(found):
        if each["kind"] == "study" and each["has_report"]:
            from trainer.page.study_data import read_report

            reports[number] = read_report(sources[number].folder).decode(errors="replace")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, report_page(found, [source.folder for source in sources], reports))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    run(main)
