"""docs/data.md with the tools that it names: img2dataset downloads, and the scripts read what MDS and litdata wrote.

    python -m benchmarks.walks --output benchmarks/results/walks.json

It installs the tools into an environment of their own (6.5 GB, as they bring a torch with CUDA). The JSON has their
versions and, for each set of shards, how many of its samples are those that were put in. The command ends with 1 where
one is missing.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.compat import WebDataset

from benchmarks.machine import write
from benchmarks.older_libraries import environment_of
from tests.helpers import walks
from tests.helpers.servers import serve

TOOLS = ("img2dataset", "mosaicml-streaming", "litdata")
# The writers of the two loaders: FOLDER/photos -> FOLDER/mds, FOLDER/lit.
_WRITE = {
    "streaming": """
from pathlib import Path
from streaming import MDSWriter
with MDSWriter(out="mds", columns={"image": "bytes", "caption": "str"}) as out:
    for path in sorted(Path("photos").glob("*.jpg")):
        out.write({"image": path.read_bytes(), "caption": path.with_suffix(".txt").read_text()})
""",
    "litdata": """
from pathlib import Path
from litdata import optimize

def sample(path):
    return {"image": Path(path).read_bytes(), "caption": Path(path).with_suffix(".txt").read_text()}

if __name__ == "__main__":
    paths = [str(path.absolute()) for path in sorted(Path("photos").glob("*.jpg"))]
    optimize(fn=sample, inputs=paths, output_dir="lit", chunk_bytes="1MB", num_workers=1)
""",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON of what was read")
    output = parser.parse_args().output
    python = environment_of(Path(".cache/walks"), *TOOLS).absolute()
    pairs = walks.pairs()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "shards").mkdir()
        walks.photos(folder / "photos", pairs)
        walks.parquet(folder / "parquet", pairs)
        for package, text in _WRITE.items():
            (folder / f"{package}_writer.py").write_text(text)
            subprocess.run([python, f"{package}_writer.py"], cwd=folder, check=True)
        with serve(lambda name: folder / name) as server:
            walks.sa_1b(folder, folder / "served", f"{server.url}/served", pairs)
            urls = [{"URL": f"{server.url}/photos/{i}.jpg", "TEXT": pair.caption} for i, pair in enumerate(pairs)]
            rows = [row | {"aesthetic": 4 + i / 8} for i, row in enumerate(urls)]
            pq.write_table(pa.Table.from_pylist(rows), folder / "laion.parquet")

            def img2dataset(line: str) -> None:
                tool, *arguments = shlex.split(line)
                one = ["--processes_count", "1", "--thread_count", "4"]
                subprocess.run([python.with_name(tool), *arguments, *one], cwd=folder, check=True)

            walks.walk(folder, {"img2dataset": img2dataset}, {"streaming": python, "litdata": python})
        captions = {pair.caption for pair in pairs}
        found: dict[str, Any] = {
            name: sum(sample["txt"].decode() in captions for sample in WebDataset(str(path), shardshuffle=False))
            for name, path in (
                ("img2dataset", folder / "web" / "00000.tar"),
                *((name, folder / "shards" / f"{name}-000000.tar") for name in ("parquet", "mds", "lit")),
            )
        }
    names = [f"{name} {_version(python, name)}" for name in TOOLS]
    write(output, {"tools": names, "samples": len(pairs), "found": found})
    return int(set(found.values()) != {len(pairs)})


def _version(python: Path, package: str) -> str:
    asked = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
