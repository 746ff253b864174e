"""The rows of a job, read and tokenised, as columns. Knows no plan.

Token ids go to a file; of a row memory holds numbers and its id, packed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Generic, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipeline.errors import StorageError, UsageError
from pipeline.job.advice import SAMPLE_CHARACTERS
from pipeline.job.checkpoint import EVERY_ROWS, Checkpoint
from pipeline.job.prepare import Preparation
from pipeline.plan.token_table import TokenFile, TokenTable
from pipeline.records import PromptBatch, Rejected, SamplingParams
from pipeline.tokens.tokenizer import PromptTokenizer

Value = TypeVar("Value")
_SCHEMA = {
    "id": pl.String,
    "length": pl.Int32,
    "params": pl.Int32,
    "tenant": pl.Int32,
    "error_type": pl.String,
    "error_message": pl.String,
    "sample": pl.String,
}


class PreparedRows:
    """The rows added so far. With a checkpoint, those that it holds are there from the start."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        preparation: Preparation,
        dtype: np.dtype[np.unsignedinteger],
        sample_every: int | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`sample_every`: so many rows apart, beginnings of prompts are kept for advice."""
        self._tokenizer = tokenizer
        self._preparation = preparation
        self._sample_every = sample_every
        self._checkpoint = checkpoint
        self._frames = [pl.DataFrame(schema=_SCHEMA)]
        self._unsaved: list[pl.DataFrame] = []
        self._params = _Numbers[SamplingParams]()
        self._tenants = _Numbers[str | None]()
        self.largest_id = -1
        with _disk_errors():
            file = tempfile.TemporaryFile() if checkpoint is None else checkpoint.tokens
        if checkpoint is not None and checkpoint.state:
            self._restore(checkpoint)
        lengths = pl.concat([frame["length"] for frame in self._frames])
        self._tokens = TokenFile(file, dtype, lengths.to_numpy())
        self.num_rows = len(lengths)

    def add(self, batch: PromptBatch) -> None:
        """Tokenise the next rows and keep what the plan needs. Raises StorageError."""
        prepared = self._preparation.prepare(batch)
        with _disk_errors():
            self._tokens.append(prepared.flat, prepared.lengths)
        self.largest_id = max(self.largest_id, int(prepared.flat.max(initial=0)))
        rows = range(batch.row_start, batch.row_start + len(batch.ids))
        faults = [prepared.rejected.get(row) for row in rows]
        frame = pl.DataFrame(
            {
                "id": batch.ids,
                "length": prepared.lengths,
                "params": self._params.number(prepared.params),
                "tenant": self._tenants.number(batch.tenants),
                "error_type": [fault and fault.error_type for fault in faults],
                "error_message": [fault and fault.message for fault in faults],
                "sample": self._sample(batch, prepared.lengths),
            },
            schema=_SCHEMA,
        )
        self._frames.append(frame)
        self._unsaved.append(frame)
        self.num_rows += len(frame)
        if sum(map(len, self._unsaved)) >= EVERY_ROWS:
            self._save()

    def tokens(self) -> TokenTable:
        """The token ids of all rows; no more can be added."""
        with _disk_errors():
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

    def forget(self) -> None:
        """Remove the checkpoint: it is not needed any more."""
        if self._checkpoint is not None:
            self._checkpoint.remove()
            self._checkpoint = None

    def columns(self) -> pl.DataFrame:
        """[rows] `id`, `params` (index into `params()`), `tenant` (a number)."""
        return self._column("id", "params", "tenant")

    def params(self) -> tuple[SamplingParams, ...]:
        """The distinct parameters."""
        return tuple(self._params.known)

    def rejected(self) -> dict[int, Rejected]:
        """Rows that cannot run."""
        frame = self._column("error_type", "error_message").with_row_index()
        faults = frame.filter(pl.col("error_type").is_not_null())
        return {row: Rejected(row, kind, message) for row, kind, message in faults.iter_rows()}

    def sample(self) -> list[str]:
        """Beginnings of the rendered prompts of some rows, evenly spaced."""
        kept: list[str] = self._column("sample").to_series().drop_nulls().to_list()
        return kept

    def _column(self, *names: str) -> pl.DataFrame:
        return pl.concat([frame.select(names) for frame in self._frames], rechunk=True)

    def _sample(self, batch: PromptBatch, lengths: NDArray[np.int64]) -> list[str | None]:
        kept: list[str | None] = [None] * len(batch.ids)
        if self._sample_every is None:
            return kept
        for index in range(-batch.row_start % self._sample_every, len(kept), self._sample_every):
            content = batch.contents[index]
            if lengths[index] and content is not None:
                kept[index] = self._tokenizer.render(content)[:SAMPLE_CHARACTERS]
        return kept

    def _save(self) -> None:
        if self._checkpoint is not None:
            state = {
                "rows": self.num_rows,
                "largest_id": self.largest_id,
                "params": [asdict(params) for params in self._params.known],
                "tenants": list(self._tenants.known),
            }
            self._checkpoint.save(pl.concat(self._unsaved), state)
        self._unsaved.clear()

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self._frames.extend(checkpoint.frames())
        self.largest_id = state["largest_id"]
        self._params.number(
            [SamplingParams(**said | {"stop": tuple(said["stop"])}) for said in state["params"]]
        )
        self._tenants.number(state["tenants"])


@contextmanager
def _disk_errors() -> Iterator[None]:
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
        known = self.known
        numbers: Iterable[int] = (known.setdefault(value, len(known)) for value in values)
        return np.fromiter(numbers, np.int32, len(values))
