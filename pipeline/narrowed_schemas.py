"""Schemas that a column and a compiler can take, whose answers fit those that were said as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from pipeline.constraints import Constraint, subschemas

MOST_WHOLE: Final = 2**63 - 1024
"""A whole number without bounds of its own stays below: a column holds it, and so does a float."""


def narrowed(schema: Constraint) -> Constraint:
    """A schema whose answers fit the given one as well: a whole number has 64 bits, which a column
    can hold, and an object with named properties has no others, so that its end is known, unless it
    requires some.

    Where schemas are put together objects stay open: what one part names the other may not know.
    """
    schema = json.loads(json.dumps(schema))
    parts = list(subschemas(schema))
    closes = not any("allOf" in part or _is_joined(part) for part in parts)
    for part in parts:
        kinds = part.get("type")
        listed = kinds if isinstance(kinds, list) else [kinds]
        if "integer" in listed and "number" not in listed:
            _bound(part, ("minimum", "exclusiveMinimum"), -MOST_WHOLE, max)
            _bound(part, ("maximum", "exclusiveMaximum"), MOST_WHOLE, min)
        if closes and part.get("properties") and "patternProperties" not in part:
            if set(part.get("required", ())) <= part["properties"].keys():
                part.setdefault("additionalProperties", False)
    return schema


def _bound(
    part: Constraint, names: tuple[str, str], most: int, nearer: Callable[[Any, int], Any]
) -> None:
    """Put a bound where there is none, or one that is farther away."""
    said = [name for name in names if name in part] or names[:1]
    part |= {name: nearer(part.get(name, most), most) for name in said}


def _is_joined(part: Constraint) -> bool:
    return "properties" in part and bool(part.keys() & {"$ref", "anyOf", "oneOf"})
