"""What `namespace()` is in a template of a stranger's. Knows no template and no sandbox."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace


class SafeNamespace(Namespace):
    """Without names that Python itself would look up on it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, *rest = args
        for name in dict(*rest, **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("names in a namespace begin with no underscore")
