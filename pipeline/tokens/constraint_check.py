"""Whether constraints can be kept, found in a process of its own: a grammar is a stranger's code.

```
 constraint ─► child (2 GiB, some seconds) ─► what every answer begins with, or why it is refused
```
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from pipeline.confined import Confined, Ended, Fault, NotMade
from pipeline.constraints import schema_of
from pipeline.tokens.grammar import Grammars

SECONDS: Final = 5.0
_KEYWORD: Final = re.compile(r"[$a-zA-Z]+")
_NAMED: Final = frozenset(
    (
        "$ref", "additionalProperties", "allOf", "anyOf", "const", "enum", "format", "items",
        "maxItems", "maxLength", "maxProperties", "maximum", "minItems", "minLength",
        "minProperties", "minimum", "multipleOf", "oneOf", "pattern", "patternProperties",
        "prefixItems", "properties", "required", "type",
    )
)  # fmt: skip


class Checked(NamedTuple):
    """What every answer begins with; or `reason`, a sentence that quotes nothing, and what the
    compiler says besides."""

    opening: tuple[int, ...] = ()
    reason: str | None = None
    detail: str = ""


class ConstraintChecker:
    """Compiles constraints apart, each once."""

    def __init__(self, grammars: Callable[[], Grammars]) -> None:
        """`grammars` are asked for with the first constraint."""
        self._grammars = grammars
        self._child: Confined | None = None
        self._known: dict[str, Checked] = {"": Checked()}

    def check(self, constraints: Iterable[str]) -> dict[str, Checked]:
        """By constraint."""
        wanted = list(dict.fromkeys(constraints))
        new = [constraint for constraint in wanted if constraint not in self._known]
        if self._child is None and new:
            self._child = Confined(make_checker, (self._grammars(),), SECONDS)
        try:
            found = [] if self._child is None else self._child.map(new)
        except NotMade as error:
            reason = f"the tokenizer cannot be used for what answers must be: it {error}"
            return dict.fromkeys(wanted, Checked(reason=reason))
        for constraint, said in zip(new, found, strict=True):
            self._known[constraint] = _read(said)
        return {constraint: self._known[constraint] for constraint in wanted}


def _read(said: str | Fault | Ended) -> Checked:
    if isinstance(said, str):
        return Checked(tuple(json.loads(said)))
    if isinstance(said, Ended):
        why = f"takes over {SECONDS:g} s to compile" if said.is_slow else "ends its compiler"
        return Checked(reason=f"what the answer must be {why}; make it simpler")
    reason, _, detail = said.message.partition("\n")
    return Checked(reason=reason, detail=detail)


def make_checker(grammars: Grammars) -> Callable[[str], str | Fault]:
    """Of one constraint: the ids that every answer begins with, as JSON; runs in the child."""

    grammars.load()

    def check(constraint: str) -> str | Fault:
        try:
            _check_values(constraint)
            return json.dumps(grammars.opening(constraint))
        except ValueError as error:
            detail = str(error)
            return Fault(f"{_say(constraint, detail)}\n{detail}")
        except BaseException as error:  # a panic of Rust is no Exception
            return Fault(f"{_say(constraint, '')}\n{type(error).__name__}")

    return check


def _check_values(constraint: str) -> None:
    """Raises ValueError where a keyword of a schema has a value that it cannot have."""
    schema = schema_of(constraint)
    if schema is None:
        return
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        names = [str(step) for step in error.absolute_path if str(step) in _NAMED]
        raise ValueError(f"{names[-1] if names else 'a keyword'} has no such value") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _say(constraint: str, detail: str) -> str:
    """One sentence that quotes nothing of the constraint but a keyword."""
    kinds = {"json_schema": "schema", "regex": "regular expression", "grammar": "grammar"}
    kind = next((name for key, name in kinds.items() if key in constraint[:20]), "constraint")
    keyword = next((word for word in _KEYWORD.findall(detail) if word in _NAMED), None)
    at = f" at its keyword {keyword!r}" if keyword is not None and kind == "schema" else ""
    return f"answers cannot be held to the {kind}{at}; change it"
