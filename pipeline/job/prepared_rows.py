"""The rows of a job, read and tokenised, as columns. Knows no plan.

Token ids go to a file; of a row memory holds numbers and its id, packed. No text of a prompt is
kept, in memory or in a checkpoint, and of a tenant a checkpoint knows a hash.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Generic, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.datatypes import DataTypeClass

from pipeline.errors import StorageError, UsageError
from pipeline.job.planning_checkpoint import Checkpoint
from pipeline.job.prepare import Preparing
from pipeline.job.prepare_scores import ScorePreparation
from pipeline.job.prepared_batch import PreparedBatch
from pipeline.plan.requests import Requests
from pipeline.plan.segment_table import Segments
from pipeline.plan.token_table import TokenFile, TokenTable
from pipeline.prompts import PromptBatch, Rejected
from pipeline.records import SamplingParams

Value = TypeVar("Value")
_SCHEMA: dict[str, DataTypeClass | pl.DataType] = {
    "id": pl.String,
    "length": pl.Int32,
    "params": pl.Int32,
    "tenant": pl.Int32,
    "error_type": pl.String,
    "error_message": pl.String,
    "segments": pl.List(pl.Int32),
    "system_tokens": pl.Int32,
}
_REQUESTS: dict[str, DataTypeClass | pl.DataType] = {
    "lengths": pl.List(pl.Int32),
    "contexts": pl.List(pl.Int32),
    "last": pl.List(pl.UInt32),
    "num_bytes": pl.List(pl.Int32),
    "cut": pl.Int64,
}
"""Besides, of rows that are scored; `lengths` are those of the rows of the token file."""


class PreparedRows:
    """The rows added so far. With a checkpoint, those that it holds are there from the start."""

    def __init__(
        self,
        preparation: Preparing,
        dtype: np.dtype[np.unsignedinteger],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self._preparation = preparation
        self._checkpoint = checkpoint
        is_scored = isinstance(preparation, ScorePreparation)
        self._schema = _SCHEMA | _REQUESTS if is_scored else _SCHEMA
        self._frames = [pl.DataFrame(schema=self._schema)]
        self._unsaved: list[pl.DataFrame] = []
        self._params = _Numbers[SamplingParams]()
        self._tenants = _Tenants()
        self.largest_id = -1
        with disk_errors():
            file = tempfile.TemporaryFile() if checkpoint is None else checkpoint.tokens
        if checkpoint is not None and checkpoint.state:
            self._restore(checkpoint)
        self.num_rows = sum(map(len, self._frames))
        lengths = self._column("lengths" if is_scored else "length").to_series()
        if is_scored:
            lengths = lengths.explode()
        self._tokens = TokenFile(file, dtype, lengths.to_numpy())

    def add(self, batch: PromptBatch) -> None:
        """Tokenise the next rows and keep what the plan needs. Raises StorageError."""
        for part in self._preparation.parts(batch):
            self._add(part)

    def _add(self, batch: PromptBatch) -> None:
        prepared = self._preparation.prepare(batch)
        for flat, lengths in prepared.portions():
            with disk_errors():
                self._tokens.append(flat, lengths)
            self.largest_id = max(self.largest_id, int(flat.max(initial=0)))
        if prepared.requests is not None:  # their last tokens are fed nowhere, and read
            most = int(prepared.requests.last.max(initial=0))
            self.largest_id = max(self.largest_id, most)
        rows = range(batch.row_start, batch.row_start + len(batch.ids))
        faults = [prepared.rejected.get(row) for row in rows]
        frame = pl.DataFrame(
            {
                "id": batch.ids,
                "length": prepared.lengths if prepared.requests is None else None,
                "params": self._params.number(prepared.params),
                "tenant": self._tenants.number(batch.tenants),
                "error_type": [fault and fault.error_type for fault in faults],
                "error_message": [fault and fault.message for fault in faults],
                "segments": [prepared.segments.get(index) for index in range(len(faults))],
                "system_tokens": [
                    prepared.system_tokens.get(index) for index in range(len(faults))
                ],
                **_lists(prepared),
            },
            schema=self._schema,
        )
        self._frames.append(frame)
        self._unsaved.append(frame)
        self.num_rows += len(frame)
        if sum(map(len, self._unsaved)) >= Checkpoint.every_rows:
            self.save()

    def tokens(self) -> TokenTable:
        """The token ids of all rows; no more can be added."""
        with disk_errors():
            return self._tokens.finish()

    @contextmanager
    def until_failure(self) -> Iterator[None]:
        """Let another call go on from the checkpoint, or forget it where the input is at fault."""
        try:
            yield
        except UsageError:
            self.forget()  # what is wrong will be another input, with a key of its own
            raise
        except BaseException:
            if self._checkpoint is not None:
                self._checkpoint.release()
            raise

    def save(self) -> None:
        """Commit the rows added since the last time, where there is a checkpoint.

        Raises StorageError.
        """
        if self._checkpoint is not None and self._unsaved:
            state = {
                "rows": self.num_rows,
                "largest_id": self.largest_id,
                "params": [asdict(params) for params in self._params.known],
                "tenants": list(self._tenants.hashes.known),
            }
            self._checkpoint.save(pl.concat(self._unsaved), state)
        self._unsaved.clear()

    def keep(self) -> None:
        """Leave the checkpoint to the next call that needs the same rows; all of them are saved."""
        if self._checkpoint is not None:
            self._checkpoint.leave()
            self._checkpoint = None

    def forget(self) -> None:
        """Remove the checkpoint: it is not needed any more."""
        if self._checkpoint is not None:
            self._checkpoint.remove()
            self._checkpoint = None

    def columns(self) -> pl.DataFrame:
        """[rows] `id`, `params` (index into `params()`), `tenant` (a number)."""
        return self._column("id", "params", "tenant")

    def segments(self) -> Segments:
        """How rows are cut; those in one piece, and those that cannot run, have no segment."""
        lists = self._column("segments")["segments"]
        counts = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        lengths = lists.drop_nulls().explode().to_numpy().astype(np.int64)
        return Segments(np.append(0, np.cumsum(counts)), lengths)

    def requests(self) -> Requests:
        """What each row asks, where rows are scored."""
        frame = self._column(*_REQUESTS)
        counts = frame["lengths"].list.len().to_numpy().astype(np.int64)
        contexts, last, num_bytes = (
            frame[name].explode().to_numpy().astype(np.int64)
            for name in ("contexts", "last", "num_bytes")
        )
        bounds = np.append(0, np.cumsum(counts))
        return Requests(bounds, contexts, last, num_bytes, frame["cut"].to_numpy())

    def system_tokens(self) -> NDArray[np.int64]:
        """[rows] of a row that begins a conversation, as many first tokens are its system message;
        0 of others."""
        counts = self._column("system_tokens")["system_tokens"]
        return counts.fill_null(0).to_numpy().astype(np.int64)

    def tenants(self) -> tuple[str | None, ...]:
        """The hash of each tenant by its number; None: of rows without one."""
        return tuple(self._tenants.hashes.known)

    def params(self) -> tuple[SamplingParams, ...]:
        """The distinct parameters."""
        return tuple(self._params.known)

    def rejected(self) -> dict[int, Rejected]:
        """Rows that cannot run."""
        frame = self._column("error_type", "error_message").with_row_index()
        faults = frame.filter(pl.col("error_type").is_not_null())
        return {row: Rejected(row, kind, message) for row, kind, message in faults.iter_rows()}

    def _column(self, *names: str) -> pl.DataFrame:
        return pl.concat([frame.select(names) for frame in self._frames], rechunk=True)

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self._frames.extend(checkpoint.frames())
        self.largest_id = state["largest_id"]
        self._params.number(
            [
                SamplingParams(**said | {name: tuple(said[name]) for name in ("stop", "opening")})
                for said in state["params"]
            ]
        )
        self._tenants.hashes.number(state["tenants"])


def _lists(prepared: PreparedBatch) -> dict[str, pl.Series]:
    """The columns `_REQUESTS` of rows that are scored, each of which has at least one request."""
    requests = prepared.requests
    if requests is None:
        return {}
    frame = pl.DataFrame(
        {
            "row": np.repeat(np.arange(len(requests.counts)), requests.counts),
            "lengths": prepared.lengths,
            "contexts": requests.contexts,
            "last": requests.last,
            "num_bytes": requests.num_bytes,
        }
    )
    lists = frame.group_by("row", maintain_order=True).agg(pl.all())
    return {
        name: pl.Series(requests.cut) if name == "cut" else lists[name].cast(kind)
        for name, kind in _REQUESTS.items()
    }


@contextmanager
def disk_errors() -> Iterator[None]:
    """Where token ids are written: a full disk is named. Raises StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot keep token ids on disk ({error.strerror}); free the disk, or set TMPDIR and "
            "XDG_CACHE_HOME to one with room"
        ) from error


class _Numbers(Generic[Value]):
    """Distinct values, numbered as they appear."""

    def __init__(self) -> None:
        self.known: dict[Value, int] = {}

    def number(self, values: Sequence[Value]) -> NDArray[np.int32]:
        """The number of each value."""
        return np.fromiter(map(self.number_of, values), np.int32, len(values))

    def number_of(self, value: Value) -> int:
        """The number of one value, the next one if it is new."""
        return self.known.setdefault(value, len(self.known))


class _Tenants:
    """Tenants by number. `hashes` is all that has to be kept for others to get the same numbers."""

    def __init__(self) -> None:
        self.hashes = _Numbers[str | None]()
        self._number_of: dict[str | None, int] = {}

    def number(self, tenants: Sequence[str | None]) -> NDArray[np.int32]:
        """The number of each tenant."""
        known = self._number_of
        for tenant in tenants:
            if tenant not in known:
                digest = None if tenant is None else hashlib.sha256(tenant.encode()).hexdigest()
                known[tenant] = self.hashes.number_of(digest)
        return np.fromiter(map(known.__getitem__, tenants), np.int32, len(tenants))
