"""Data sets of the Hugging Face hub as input: which files a URL means. Knows nothing about formats.

```
 hf://datasets/owner/name/data/*.parquet        hf://datasets/owner/name@revision/train.csv
```

A branch may move while a job runs, so it is read at the commit that it stands for when it is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO
from urllib.parse import unquote

from pipeline.errors import InputError, NoInput
from pipeline.inputs.input_objects import WILD, below, match
from pipeline.inputs.selection import Selection
from pipeline.location import Location
from pipeline.storage.store_faults import StoreFault

_URL = re.compile(r"hf://datasets/([^/@\s]+/[^/@\s]+)(?:@([^/\s]+))?(?:/(.*))?")
_PATIENCE_S = 8.0


@dataclass(frozen=True, eq=False)
class HubHome:
    """A data set at one commit. `root`: its URL as a person wrote it; see `input_files.Home`."""

    root: str
    folder: str
    options: Mapping[str, Any] = field(repr=False)  # with the token
    stamps: dict[str, tuple[int | str, ...]] = field(default_factory=dict)

    def open(self, path: str) -> BinaryIO:
        """For random reads: each is one request. Raises OSError."""
        with _hub_faults():
            opened: BinaryIO = self._files.open(f"{self.folder}/{path}", "rb", cache_type="none")
            return opened

    def open_stream(self, path: str) -> BinaryIO:
        """For one read from the start. Raises OSError."""
        with _hub_faults():
            opened: BinaryIO = self._files.open(f"{self.folder}/{path}", "rb", block_size=0)
            return opened

    def stamp(self, path: str) -> tuple[int | str, ...]:
        """Size and hash, which a commit cannot change. Raises OSError."""
        return self.stamps[path]

    @property
    def _files(self) -> Any:
        from huggingface_hub import HfFileSystem

        return HfFileSystem(**self.options)


def find_on_hub(location: Location) -> tuple[HubHome, Selection]:
    """The file itself, those of rows below a folder, or what a glob matches, see `selection`.

    Raises NoInput if there is nothing, InputError.
    """
    from huggingface_hub import HfApi

    found = _URL.fullmatch(str(location))
    if found is None:
        raise InputError(
            "a URL of the hub must look like hf://datasets/owner/name/path, or like "
            "hf://datasets/owner/name@revision/path"
        )
    name, revision, key = found[1], found[2], found[3] or ""
    options: dict[str, Any] = {
        "endpoint": location.endpoint,
        "token": location.store.storage_options.get("token"),
    }
    try:
        with _hub_faults():
            api = HfApi(**options)
            info = api.dataset_info(
                name, revision=revision and unquote(revision), timeout=_PATIENCE_S
            )
            entries = list(
                api.list_repo_tree(name, recursive=True, revision=info.sha, repo_type="dataset")
            )
    except StoreFault as error:
        raise InputError(f"cannot read {location}: {error}") from error
    stamps = {entry.path: _stamp(entry) for entry in entries if hasattr(entry, "blob_id")}
    chosen = _choose(key, sorted(stamps))
    if not chosen.names:
        raise NoInput(f"there is no file, folder or match for {location}; check the URL")
    root = f"hf://datasets/{name}" + (f"@{revision}" if revision else "")
    return HubHome(root, f"datasets/{name}@{info.sha}", options, stamps), chosen


def _stamp(entry: Any) -> tuple[int | str, ...]:
    return int(entry.size), str(entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _choose(key: str, paths: list[str]) -> Selection:
    if key in paths:
        return Selection((key,))
    if WILD.search(key):
        return match(key, lambda top: _inside(top, paths))
    top = key.strip("/")
    return below(top, _inside(top, paths))


def _inside(top: str, paths: list[str]) -> list[str]:
    return [path for path in paths if not top or path.startswith(f"{top}/")]


@contextmanager
def _hub_faults() -> Iterator[None]:
    """Turn what the hub's library raises into a StoreFault, whose message is a clause."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        reason = "the hub gives this data set only to those who accepted its terms (hf auth login)"
    except errors.RepositoryNotFoundError:
        reason = "the hub knows no such data set, or it is private (hf auth login); check its name"
    except errors.RevisionNotFoundError:
        reason = "this data set has no such revision; check what stands behind the @"
    except errors.EntryNotFoundError:
        reason = "this data set has no such file; check the URL"
    except errors.HFValidationError:
        reason = "it is no name of a data set on the hub; check the URL"
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE forbids to ask the hub; unset it, or name a folder"
    except Exception as error:  # of whichever HTTP client the hub library has
        reason = f"the hub does not answer ({type(error).__name__}); check the network"
    else:
        return
    raise StoreFault(reason)
