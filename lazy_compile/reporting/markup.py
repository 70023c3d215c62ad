"""HTML from templates in which every value is escaped unless it is markup already."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup as Markup

_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)


def render(template: str, **values: Any) -> Markup:
    """A template of Jinja with these values."""
    return Markup(_compiled(template).render(values))


def join(parts: Iterable[Markup]) -> Markup:
    """One after the other."""
    return Markup("").join(parts)


@cache
def _compiled(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)
