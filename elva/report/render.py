"""Pages from the templates beside this file: values in, HTML out, nothing read or written."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

_PAGES = Environment(
    loader=PackageLoader("elva.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """The HTML of a template; every value is escaped where it enters."""
    return _PAGES.get_template(template).render(values) + "\n"
