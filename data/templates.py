"""Pages and cards from the Jinja templates that lie beside the modules which write them. Every room may import it."""

from pathlib import Path
from typing import Any

import jinja2


def render(template: Path, /, **values: Any) -> str:
    """The text of a template. In .html values are escaped. jinja2.UndefinedError where it names what is not given."""
    page = template.suffix == ".html"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=page,
        undefined=jinja2.StrictUndefined,
        trim_blocks=page,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**values)
