"""Write the prompts of the suite coco_30k: one caption per reference image of FID, from COCO's annotations.

python -m examples.coco_prompts --annotations captions_val2014.json --images FOLDER --output captions.jsonl

Images have COCO's names (COCO_val2014_000000000042.jpg), or at least its numbers (42.png). Of a folder with more than
--count images the same subset is taken that the suite takes with reference=FOLDER. Of an image's captions, about five,
the one with the smallest id is taken.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import temporary_beside
from data.image_sets import image_files
from launch.common import add_overwrite, keep_files, run


def first_captions(annotations: Path) -> dict[int, str]:
    """{number of an image: its caption with the smallest id}. Raises DataError where the file cannot be read."""
    try:
        entries: list[dict[str, Any]] = json.loads(annotations.read_text(encoding="utf-8"))["annotations"]
        falling = sorted(entries, key=lambda entry: -entry["id"])
        return {entry["image_id"]: " ".join(entry["caption"].split()) for entry in falling}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--annotations {annotations} cannot be read ({type(error).__name__}: {error}); expected COCO's "
            "captions_val2014.json"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", type=Path, required=True, help="COCO's captions_val2014.json")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, subfolders included")
    parser.add_argument("--count", type=int, default=30_000, help="number of images (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a .jsonl file")
    add_overwrite(parser)
    arguments = parser.parse_args()
    keep_files(arguments.overwrite, arguments.output)
    captions = first_captions(arguments.annotations)
    lines = []
    for path in image_files(arguments.images, "--images", arguments.count):
        number = re.search(r"(\d+)$", path.stem)
        if number is None or int(number[1]) not in captions:
            raise DataError(f"--images: {path} has no caption in {arguments.annotations}: its name must end in the "
                            "number of an image there")  # fmt: skip
        lines.append(json.dumps({"caption": captions[int(number[1])], "image": path.name}, ensure_ascii=False) + "\n")
    with temporary_beside(arguments.output) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    print(f"{arguments.output}: {len(lines)} captions")
    return 0


if __name__ == "__main__":
    run(main)
