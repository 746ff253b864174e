"""Triton's interpreter, which would look through all of the language at every call of a function.

That is a third of its time. Once the language is interpreted it stays so here, for a process that
interprets compiles nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
_NOTHING_TO_RESTORE = SimpleNamespace(restore=lambda: None)
_patched: set[frozenset[str]] = set()


def patch_once(fn: Any) -> Any:
    """As triton's own, for the modules of the language that a function sees."""
    modules = frozenset(x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core)
    if modules not in _patched:
        _patch_lang(fn)
        _patched.add(modules)
    return _NOTHING_TO_RESTORE


def interpret_quickly() -> None:
    """From now on in this process."""
    interpreter._patch_lang = patch_once
