"""The writer of a run in a bucket: a run directory here, and every commit repeated in the store.

```
 part ─► working copy ─► PUT data/part-… ─► PUT run.json that names it, if it is still ours = commit
```

A part that run.json does not name is left over from a session that died, and the next one removes
it. Every session puts its own name into run.json first, on the
condition that run.json is as it was read. So whoever had it before fails at its next commit, and of
two writers exactly one goes on. The working copy makes up for what the store cannot do: what a
session computed and could not upload is uploaded by the next one. It is removed with the seal.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.errors import CoppiceError, RunDirectoryError, StorageError
from pipeline.private_folder import private_folder, stale_in
from pipeline.storage.committed_parts import SUCCESS_NAME
from pipeline.storage.durable import replace_file
from pipeline.storage.lock import FolderLock, is_abandoned, own_name
from pipeline.storage.manifest import (
    MANIFEST_NAME,
    check_fingerprint,
    parse_manifest,
    run_id_of,
)
from pipeline.storage.metrics_log import METRICS_NAME
from pipeline.storage.part_file import PART_NAME, PartFooter
from pipeline.storage.part_list import describe_parts, is_stored, named_parts, part_file
from pipeline.storage.remote_copy import SUMMARY_NAME, TREE_NAME, RemoteCopy
from pipeline.storage.remote_folder import RemoteFolder, Stored, SupersededError
from pipeline.storage.run_directory import (
    AUDIT_NAMES,
    PLAN_NAME,
    RETRIED_NAME,
    RunDirectory,
)

_PLAN_NAMES: Final = (PLAN_NAME, TREE_NAME, SUMMARY_NAME)  # the last one last
_STALE_S: Final = 7 * 24 * 3600  # working copies that nobody came back for
_logger = logging.getLogger("coppice")


class RemoteRun(RemoteCopy):
    """From `take`: the only writer until it is superseded. `root` is the working copy.

    After a fault what the store holds is whole, and the same command makes the rest good.
    """

    def __init__(self, root: Path, lock: FolderLock | None, folder: RemoteFolder) -> None:
        super().__init__(root, lock, folder)
        self._etag: str | None = None  # of the run.json that is ours
        self._has_whole_copy = False

    @classmethod
    def take(
        cls,
        folder: RemoteFolder,
        copies: Path,
        fingerprint: dict[str, Any],
        description: dict[str, Any],
        with_parts: bool = False,
    ) -> RemoteRun:
        """As `RunDirectory.create_or_resume`, with a working copy below `copies`; of a run that is
        complete it has parts only `with_parts`.

        Raises RunDirectoryError if somebody else takes it meanwhile, StorageError.
        """
        held = folder.read(MANIFEST_NAME)
        if held is None:
            check_empty(folder)
        else:
            found = parse_manifest(held.content, folder.url)["fingerprint"]
            check_fingerprint(folder.url, found, fingerprint)
        root = _working_copy(folder, copies, run_id_of(fingerprint))
        try:
            local = RunDirectory.create_or_resume(root, fingerprint, description)
        except RunDirectoryError as error:
            raise type(error)(str(error).replace(str(root), folder.url)) from error
        run = cls(root, local._lock, folder)
        try:
            run._agree_with(held, with_parts)
        except BaseException:
            local.close()
            raise
        return run

    @property
    def is_whole(self) -> bool:
        """As of a run directory; of a sealed run the names and sizes in the store are enough."""
        return self._has_whole_copy or super().is_whole

    def write_part(self, number: int, table: pa.Table, provenance: dict[str, str]) -> Path:
        """Commit a part here and in the store. Raises StorageError, RunDirectoryError."""
        path = super().write_part(number, table, provenance)
        self._footers[path] = self._read_footer(path)
        self._put(part_file(path.name))
        try:
            self.update_manifest(parts=self._parts() | describe_parts(self._footers[path]))
        except RunDirectoryError:
            with suppress(StorageError):
                self._drop_lost(path.name)
            raise
        return path

    def replace_part(self, footer: PartFooter, table: pa.Table) -> None:
        """As of a run directory; in the store one run.json names the new part and not the old."""
        super().replace_part(footer, table)
        parts = {n: part for n, part in self._parts().items() if n != footer.path.name}
        made = [own for own in self.footers() if own.path.name not in parts]
        for own in made:
            self._put(part_file(own.path.name))
        self.update_manifest(parts=parts | describe_parts(*made))
        self._call(lambda: self._folder.delete([part_file(footer.path.name)]))

    def update_manifest(self, **fields: Any) -> None:
        """Replace these fields of run.json, in the store only if it is still ours."""
        super().update_manifest(**fields)
        content = (self.root / MANIFEST_NAME).read_bytes()
        try:
            put = partial(self._folder.put_if, MANIFEST_NAME, content, self._etag)
            self._etag = self._call(put)
        except SupersededError as error:
            self._fault = self._superseded(error.now)
            raise self._fault from None

    def seal(self, rows: NDArray[np.int64]) -> None:
        """As of a run directory, and `data/` in the store holds the named parts and no other."""
        present = self._call(self._folder.names)
        self._check_stored(present)
        # Only now: had somebody taken over, parts of theirs would look like left-overs to us.
        self.update_manifest()
        self._drop_unnamed(present)
        self._put(METRICS_NAME)
        super().seal(rows)

    def unseal(self, with_audit: bool) -> None:
        """As of a run directory, in the store first."""
        self._folder.delete((*AUDIT_NAMES, SUCCESS_NAME) if with_audit else (SUCCESS_NAME,))
        super().unseal(with_audit)

    def close(self) -> None:
        """Release the lock; the working copy goes if the store has all of it."""
        if self._lock is None:
            return
        try:
            if self._fault is None and self.is_sealed:
                shutil.rmtree(self.root, ignore_errors=True)
            elif self._fault is None:
                self._put(METRICS_NAME)
        except StorageError as error:
            _logger.warning("%s", error)
        finally:
            super().close()

    def _agree_with(self, held: Stored | None, with_parts: bool) -> None:
        """Make copy and store the same, both ahead of where either was; then the run is ours."""
        present = self._folder.names()
        parts = {} if held is None else self._adopt(held, present)
        stored = {n: part for n, part in parts.items() if is_stored(n, part, present)}
        if SUCCESS_NAME in present:
            replace_file(self.root / SUCCESS_NAME, b"")
        else:
            (self.root / SUCCESS_NAME).unlink(missing_ok=True)
        is_whole = stored == parts and set(_PLAN_NAMES) <= present.keys()
        if self.is_sealed and is_whole and not with_parts:
            self._has_whole_copy = True  # of nothing but names: enough to say that all is done
            return
        if RETRIED_NAME in present:  # the newest says how often rows have failed
            self._folder.fetch(RETRIED_NAME, self.root / RETRIED_NAME)
        for name in (*_PLAN_NAMES, METRICS_NAME):
            if name in present and not (self.root / name).exists():
                self._folder.fetch(name, self.root / name)
        self._fetch_parts(stored)
        self._drop_recomputed(stored)
        self._take_over(held, stored)
        self._put_missing(present)

    def _adopt(self, held: Stored, present: dict[str, int]) -> dict[str, Any]:
        """Take run.json from the store, unless ours goes on from there; returns its parts."""
        theirs, ours = parse_manifest(held.content, self.name), self.read_manifest()
        known = theirs["sessions"]
        if len(ours["sessions"]) <= len(known) or ours["sessions"][: len(known)] != known:
            replace_file(self.root / MANIFEST_NAME, held.content)
        return named_parts(theirs, present)

    def _drop_recomputed(self, stored: dict[str, Any]) -> None:
        """Parts that only we have go where another machine answered one of their rows since."""
        footers = self.footers()
        theirs = [footer.row_indices for footer in footers if footer.path.name in stored]
        taken = np.concatenate([np.zeros(0, np.int64), *theirs])
        for footer in footers:
            if footer.path.name not in stored and np.isin(footer.row_indices, taken).any():
                del self._footers[footer.path]
                footer.path.unlink()

    def _take_over(self, held: Stored | None, stored: dict[str, Any]) -> None:
        """Put our name into run.json: from now on nobody else can commit."""
        self._folder.check_conditions()
        before = {} if held is None else parse_manifest(held.content, self.name)
        if before.get("status") == "running":
            _logger.warning("took over %s from %s", self.name, _writer_of(before))
        self._etag = None if held is None else held.etag
        writer = {"name": own_name(), "session": uuid.uuid4().hex}
        named = describe_parts(*(f for f in self.footers() if f.path.name in stored))
        self.update_manifest(parts=named, writer=writer)

    def _put_missing(self, present: dict[str, int]) -> None:
        """Upload what an earlier session could not; remove what nobody names."""
        for name in _PLAN_NAMES:
            path = self.root / name
            if path.exists() and present.get(name) != path.stat().st_size:
                self._put(name)
        ours = [footer for footer in self.footers() if footer.path.name not in self._parts()]
        for footer in ours:
            self._put(part_file(footer.path.name))
        if ours:
            self.update_manifest(parts=self._parts() | describe_parts(*ours))
        self._drop_unnamed(present)

    def _drop_unnamed(self, present: dict[str, int]) -> None:
        """Remove parts that are not named; `present` was listed before run.json was found ours.

        Nobody can name them any more, for nobody else commits. Raises StorageError for a Parquet
        file that is not a part: readers would take it for one.
        """
        named = {part_file(name) for name in self._parts()}
        others = [n for n in present if n.startswith("data/") and n.endswith(".parquet")]
        unnamed = [name for name in others if name not in named]
        for name in unnamed:
            if not PART_NAME.fullmatch(name.removeprefix("data/")):
                raise StorageError(
                    f"{self.name}/{name} is not a part of this run; move it out of the folder"
                )
        self._call(lambda: self._folder.delete(unnamed))

    def _drop_lost(self, name: str) -> None:
        """Take back a part that came too late, unless our successor met a run.json that names it.

        Nobody else can have it: it was computed here.
        """
        now = self._folder.read(MANIFEST_NAME)
        if now is not None and name not in parse_manifest(now.content, self.name).get("parts", {}):
            self._folder.delete([part_file(name)])

    def _superseded(self, now: Stored | None) -> CoppiceError:
        if now is None:
            return StorageError(
                f"{self.name}/{MANIFEST_NAME} was removed while the job ran; run the same command "
                "again"
            )
        writer = _writer_of(parse_manifest(now.content, self.name))
        return RunDirectoryError(
            f"{self.name} was taken over by {writer}; let that one finish, it goes on from what "
            "is committed here"
        )


def _working_copy(folder: RemoteFolder, copies: Path, run_id: str) -> Path:
    """The folder of this run below `copies`; others that nobody came back for are removed."""
    try:
        for left in stale_in(private_folder(copies), _STALE_S):
            if is_abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot keep a working copy of {folder.url} ({error}); set XDG_CACHE_HOME to a "
            "folder of your own"
        ) from error
    key = (folder.endpoint, folder.url, run_id)
    root = copies / hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    private_folder(root)
    return root


def check_empty(folder: RemoteFolder) -> None:
    """Raises RunDirectoryError if the prefix holds anything: there is no run of ours in it."""
    if folder.names().keys() - {MANIFEST_NAME}:  # somebody may be beginning one just now
        raise RunDirectoryError(
            f"{folder.url} is not empty and holds no run of coppice; choose a new folder"
        )


def _writer_of(manifest: dict[str, Any]) -> str:
    return str(manifest.get("writer", {}).get("name", "another process"))
