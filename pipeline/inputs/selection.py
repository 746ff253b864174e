"""Which of the files below a folder are rows, by their names alone. Opens no file.

Left out are temporary files of others, whose path has a part that begins with `_` or `.`, and what
coppice itself has written there: a run or a plan is no input of the next one.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz")
"""Of the files that a folder is searched for."""
_JSON = (".json", ".json.gz")
HIDDEN = "with a name or a folder that begins with _ or ."
OUTPUTS = "written by coppice itself"
LINKED_AGAIN = "linked folders that are read already"
MATCHED_AGAIN = "matched again by way of a linked folder"
IN_CAPITALS = "whose ending is not in small letters"
OTHER_JSON = "of JSON that is no JSON lines, which must be named to be read"
BROKEN = "that link to nothing"
_PLAN_FILES = {"plan.parquet", "tree.parquet", "summary.json"}


@dataclass(frozen=True)
class Selection:
    """`names` of files of rows, relative to the folder and sorted; of the others, how many why."""

    names: tuple[str, ...]
    left_out: Counter[str] = field(default_factory=Counter)

    def describe(self) -> str:
        """What is read and what is not, in one line."""
        read = f"{len(self.names):,} {'file is' if len(self.names) == 1 else 'files are'} read"
        others = [f"{count:,} {why}" for why, count in sorted(self.left_out.items())]
        return f"{read}; left out: {', '.join(others)}" if others else read


def select(names: Collection[str]) -> Selection:
    """Of the names of all files below a folder, relative to it, those that are rows."""
    rows = [name for name in names if name.lower().endswith(ENDINGS)]
    found = _choose(rows, 0, "._", _own_folders(names))
    chosen = tuple(name for name in found.names if name.endswith(ENDINGS))
    in_capitals = Counter({IN_CAPITALS: len(found.names) - len(chosen)})
    other_json = Counter({OTHER_JSON: _count_other_json(names)})
    return Selection(chosen, +(found.left_out + in_capitals + other_json))


def _count_other_json(names: Collection[str]) -> int:
    """Of the files that may be lists of rows, and in a folder as well may be anything."""
    others = [name for name in names if name.endswith(_JSON)]
    found = _choose(others, 0, "._", _own_folders(names))
    return len(found.names)


def _choose(paths: Collection[str], fixed: int, marks: str, own: set[str]) -> Selection:
    """`marks`: what the parts of a hidden path begin with, after the first `fixed` parts."""
    chosen, left_out = [], Counter[str]()
    for name in sorted(paths):
        path = PurePosixPath(name)
        if any(part[0] in marks for part in path.parts[fixed:]):
            left_out[HIDDEN] += 1
        elif own and any(str(folder) in own for folder in path.parents):
            left_out[OUTPUTS] += 1
        else:
            chosen.append(name)
    return Selection(tuple(chosen), left_out)


def _own_folders(names: Collection[str]) -> set[str]:
    """Folders below the top that hold a run or a plan."""
    runs = {name.removesuffix("/run.json") for name in names if name.endswith("/run.json")}
    plans = {name.removesuffix("/summary.json") for name in names if name.endswith("/summary.json")}
    if not runs and not plans:
        return set()
    every = set(names)
    parents = {str(folder) for name in every for folder in PurePosixPath(name).parents}
    return {run for run in runs if f"{run}/data" in parents or f"{run}/plan" in parents} | {
        plan for plan in plans if all(f"{plan}/{name}" in every for name in _PLAN_FILES)
    }


def search(top: Path) -> Selection:
    """Of all files below a folder of this machine, linked folders included. Raises OSError."""
    names, links = _walk(top)
    found = select(names)
    return replace(found, left_out=found.left_out + links)


def _walk(top: Path) -> tuple[list[str], Counter[str]]:
    """Names of all files, and how many links lead to nothing, or once more to a folder."""
    names: list[str] = []
    links = Counter[str]()
    seen = {_identity(top)}
    for folder, folders, files in os.walk(top, followlinks=True, onerror=_raise):
        here = Path(folder)
        for inner in sorted(folders, key=lambda name: ((here / name).is_symlink(), name)):
            identity = _identity(here / inner)
            if identity in seen:
                folders.remove(inner)
                links[LINKED_AGAIN] += 1
            seen.add(identity)
        prefix = "" if here == top else f"{here.relative_to(top).as_posix()}/"
        names += [prefix + name for name in files if os.path.isfile(here / name)]
        rows = [name for name in files if name.endswith(ENDINGS)]
        links[BROKEN] += sum(not os.path.exists(here / name) for name in rows)
    return names, links


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def select_matches(pattern: str, paths: Collection[str], below: Collection[str]) -> Selection:
    """Of the files that a glob matched; a pattern that spells out such a name means it.

    `below`: all files below its part without wildcards, as far as `**` may have matched them.
    """
    parts = PurePosixPath(pattern).parts
    own = _own_folders(below) if "**" in parts else set()
    marks = "" if any(part[0] == "_" for part in parts) else "_"
    return _choose(paths, fixed_parts(pattern), marks, own)


def each_once(paths: Collection[str]) -> list[str]:
    """Each file of this machine by its shortest path: links let `**` go round in circles."""
    shortest_first = sorted(paths, key=lambda path: (path.count("/"), path))
    places: dict[tuple[str, str], str] = {}
    for path in shortest_first:
        folder, name = os.path.split(path)
        places.setdefault((os.path.realpath(folder), name), path)
    return list(places.values())


def fixed_parts(pattern: str) -> int:
    """How many parts of a path there are before the first wildcard."""
    parts = PurePosixPath(pattern).parts
    return next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts))
