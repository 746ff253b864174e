"""What became of a job: counters of a finished one, and rows that are on the disk."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from pipeline.errors import TooManyFailedRows
from pipeline.settings import WriteSettings
from pipeline.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class RunOutcome:
    """A finished job. `was_complete`: there was nothing left to do."""

    directory: str
    counters: dict[str, float]
    was_complete: bool = False

    @property
    def rows_failed(self) -> int:
        """Rows written with `status = error`."""
        return int(self.counters["rows_error"])

    def check_failures(self, settings: WriteSettings) -> None:
        """Raises TooManyFailedRows if more rows failed than the settings allow."""
        remedy = f"failed.parquet in {self.directory} names them"
        check_failures(settings, self.rows_failed, int(self.counters["rows_in"]), remedy)

    @classmethod
    def of_sealed(cls, directory: RunDirectory) -> RunOutcome:
        """What a complete run directory has to say."""
        answered, failed = directory.count_rows()  # what is there, whatever run.json says
        rows = {"rows_ok": answered, "rows_error": failed, "rows_in": answered + failed}
        counters = directory.read_manifest()["counters"] | rows
        return cls(directory.name, counters, was_complete=True)


def check_failures(settings: WriteSettings, failed: int, rows: int, remedy: str) -> None:
    """Raises TooManyFailedRows if more of the rows failed than the settings allow."""
    allowed = settings.allowed_failures(rows)
    if failed > allowed:
        raise TooManyFailedRows(
            f"{failed} of {rows} rows failed, {allowed} are allowed by --fail-on-error; {remedy}"
        )


def count_committed(directory: RunDirectory) -> dict[str, int]:
    """Rows and cached tokens in the committed parts: what is on the disk, not what was meant."""
    ok = pl.col("status") == "ok"
    columns = [
        ok.sum().alias("rows_ok"),
        (~ok).sum().alias("rows_error"),
        pl.col("cached_tokens").cast(pl.Int64).sum().alias("cached_tokens"),
    ]
    counted: dict[str, int] = directory.scan().select(columns).collect().row(0, named=True)
    return counted
