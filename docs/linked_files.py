"""What mkdocs.yml adds to the site: a page for each file of the repository that a document links to.

`../models/registry.py` is a link that works on a forge; on the site, which holds docs/ alone, it leads to a page with
the file's text. A link to a file that does not exist stays as it is, and then fails the build.
"""

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
        path = ROOT / name
        text = f"# {name}\n\n````` {path.suffix.removeprefix('.')}\n{path.read_text()}\n`````\n"
        page = File.generated(config, f"files/{name}.md", content=text, inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to these files to their pages. All documents lie in docs/ itself."""
    return LINK.sub(lambda link: f"](files/{link[1]}.md" if (ROOT / link[1]).is_file() else link[0], markdown)
