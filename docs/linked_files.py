"""What mkdocs.yml adds to the site: a page for each file of the repository that a document links to.

`../models/registry.py` is a link that works on a forge; on the site, which holds docs/ alone, it leads to a page with
the file's text. A link to a file that does not exist stays as it is, and then fails the build.
"""

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(\.\./([\w./-]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of each linked file, outside the navigation."""
    texts = [file.content_string for file in files.documentation_pages()]
    for name in sorted({name for text in texts for name in LINK.findall(text) if (ROOT / name).is_file()}):
        text = f"# {name}\n\n{_markdown(ROOT / name)}"
        page = File.generated(config, f"files/{name}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def _markdown(path: Path) -> str:
    """A file as a block of code; a notebook as its sentences and cells."""
    if path.suffix != ".ipynb":
        return f"````` {path.suffix.removeprefix('.')}\n{path.read_text()}\n`````\n"
    cells = json.loads(path.read_text())["cells"]
    texts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    text = "\n\n".join(f"``` python\n{text}\n```" if kind == "code" else text for kind, text in texts)
    return text.replace("](../docs/", "](../../")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to these files to their pages. All documents lie in docs/ itself."""
    if page.file.src_uri.startswith("files/"):
        return markdown
    return LINK.sub(lambda link: f"](files/{link[1]}.md" if (ROOT / link[1]).is_file() else link[0], markdown)
