"""A JSON file of ours against its schema: what is read is what was meant, or one sentence says why.

A schema is a TypedDict that pydantic checks without converting anything; names that it does not
know are let through. What is returned is the JSON as it was read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from pipeline.errors import RunDirectoryError

_MOST: Final = 2**63  # of any number that a run counts

Count = Annotated[int, Field(ge=0, lt=_MOST)]
Number = Annotated[float, Field(ge=0, lt=_MOST, allow_inf_nan=False)]  # or a whole number
Digits = Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
RECORD = ConfigDict(extra="allow", strict=True)
"""Of a schema, and of those inside of it."""


class JsonFile:
    """One kind of file. `name`: below its folder; `remedy`: what to do where it is damaged."""

    def __init__(self, schema: Any, name: str, remedy: str) -> None:
        self.name = name
        self._schema = TypeAdapter[Any](with_config(RECORD)(schema))
        self._remedy = remedy

    def read(self, root: Path) -> dict[str, Any] | None:
        """The file below `root`; None if it is not there. Raises RunDirectoryError."""
        content = self.content(root)
        return None if content is None else self.parse(content, root)

    def content(self, root: Path) -> bytes | None:
        """As it lies there, not parsed. Raises RunDirectoryError where it cannot be read."""
        try:
            return (root / self.name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise RunDirectoryError(
                f"cannot read {root / self.name} ({error.strerror}); check who may read it"
            ) from error

    def parse(self, content: bytes | str, path: str | Path) -> dict[str, Any]:
        """The content of the file in `path`. Raises RunDirectoryError."""
        try:
            value: dict[str, Any] = json.loads(content, parse_constant=_refuse)
            self._schema.validate_python(value)
        except ValidationError as error:
            raise self._damage(path, _explain(error)) from error
        except (ValueError, RecursionError) as error:
            raise self._damage(path, "it is not JSON in UTF-8") from error
        return value

    def _damage(self, path: str | Path, why: str) -> RunDirectoryError:
        return RunDirectoryError(f"{path}/{self.name} is damaged ({why}); {self._remedy}")


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong and where; no value, for it may be text of a row."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(step)[:80] for step in first["loc"]]
    what = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{'.'.join(where)}: {what}" if where else what
