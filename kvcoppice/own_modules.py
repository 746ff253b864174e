"""Makes sure that `pipeline` and `flows` are ours: a person's own files may have these names too.

```
 a script of a person's ─► check    one sentence where theirs is found first
 a process of our own   ─► load     ours, whatever is found first
```
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1]


def check(name: str = "pipeline") -> None:
    """Raises ImportError, in a sentence, if importing `name` would not bring our package."""
    try:
        found = find_spec(name)
    except ValueError:  # a module that was made by hand says nothing of itself
        found = ModuleSpec(name, None)
    if found is None or not _is_ours(found):
        where = None if found is None else found.origin
        raise ImportError(
            f"{where or f'another module {name}'} hides the package {name} of coppice; rename it, "
            "or start Python in another folder, or with -P where the file is not the program itself"
        )


def load(*names: str) -> None:
    """Import our packages of these names, also where others come first on Python's path.

    Raises ImportError, in a sentence, if others have been imported before.
    """
    for name in names:
        if name in sys.modules:
            check(name)
            continue
        spec = PathFinder.find_spec(name, [str(_FOLDER)])
        assert spec is not None and spec.loader is not None, f"{_FOLDER} holds no {name}"
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)


def _is_ours(found: ModuleSpec) -> bool:
    paths = found.submodule_search_locations or ()
    return any(Path(path).resolve().parent == _FOLDER for path in paths)
