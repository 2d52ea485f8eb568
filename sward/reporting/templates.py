"""Fill the templates of this package; every value is escaped, so that names cannot become markup."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2


def render(name: str, **values: Any) -> str:
    """Fill the template file `name` of this package; a value that the template names and nobody gives is an error."""
    return _environment().get_template(name).render(**values)


@lru_cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("sward.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
