"""The templates of this room, and the rule that their pages run and load nothing but themselves."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from pipeline.costs import money
from pipeline.report import formats
from pipeline.visible import visible

_FORMATS: Final = (
    formats.count, formats.percent, formats.size, formats.duration, formats.decimal, formats.cell,
    money,
)  # fmt: skip


@cache
def template(name: str) -> Template:
    """A template of this room, with the formats of `formats` as filters."""
    environment = Environment(
        loader=PackageLoader("pipeline", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {form.__name__: form for form in _FORMATS}
    style, script = _read("page.css"), _read("sort.js")
    environment.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "policy": "; ".join(
            (
                "default-src 'none'",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
        "change": formats.change,
    }
    return environment.get_template(name)


def _finalize(value: object) -> object:
    """What a page shows acts on no reader: ids, columns and messages are anybody's."""
    if isinstance(value, Markup):
        return Markup(visible(value, lines=True))
    return visible(value, lines=True) if isinstance(value, str) else value


def _read(name: str) -> str:
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
