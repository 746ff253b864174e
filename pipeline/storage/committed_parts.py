"""The committed parts of a run: which rows they answer, each verified once. Writes nothing."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import StorageError
from pipeline.storage.manifest import read_manifest
from pipeline.storage.part_file import PART_NAME, PartFooter, read_part_footer
from pipeline.storage.schema import OUTPUT_FIELDS

SUCCESS_NAME = "_SUCCESS"


class CommittedParts:
    """Those in `data/` of the run directory `root`; their own footers say what is done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)  # how a person would write it
        self._footers: dict[Path, PartFooter] = {}

    @property
    def data(self) -> Path:
        """The folder of the parts."""
        return self.root / "data"

    def read_manifest(self) -> dict[str, Any]:
        """run.json. Raises RunDirectoryError if it is missing, damaged or of another version."""
        return read_manifest(self.root)

    @cached_property  # of a store the manifest is long, and every part asks
    def run_id(self) -> str:
        """16 hex digits of the fingerprint's hash."""
        return str(self.read_manifest()["run_id"])

    def count_rows(self) -> tuple[int, int]:
        """(answered, failed) rows of the committed parts."""
        is_ok = pl.col("status") == "ok"
        counts = self.scan().select(is_ok.sum(), (~is_ok).sum().alias("failed")).collect()
        answered, failed = counts.row(0)
        return answered, failed

    def done_rows(self) -> NDArray[np.int64]:
        """[done] int64, ascending: rows of all committed parts; each part is verified once.

        Raises StorageError if a part was altered, is foreign, or repeats a row of another one.
        """
        footers = self.footers()
        rows = np.concatenate([np.zeros(0, np.int64), *(f.row_indices for f in footers)])
        owner = np.repeat(np.arange(len(footers)), [len(f.row_indices) for f in footers])
        order = np.argsort(rows, kind="stable")
        twice = np.flatnonzero(np.diff(rows[order]) == 0)
        if len(twice):
            first, second = (footers[owner[order[twice[0] + i]]].path.name for i in (0, 1))
            raise StorageError(
                f"row {rows[order[twice[0]]]} is in two parts of {self.data}, {first} and "
                f"{second}; delete one of them and run the same command again"
            )
        return rows[order]

    def footers(self) -> list[PartFooter]:
        """Of all committed parts, by number; each part is verified once. Raises StorageError."""
        for path in self._part_paths():
            if path not in self._footers:
                self._footers[path] = self._read_footer(path)
        return sorted(self._footers.values(), key=lambda footer: footer.number)

    def next_part_number(self) -> int:
        """One more than the largest committed part's."""
        numbers = [int(match[1]) for p in self._part_paths() if (match := PART_NAME.match(p.name))]
        return max(numbers, default=-1) + 1

    def part_names(self) -> list[str]:
        """Of all committed parts, in order; each holds the hash of its part."""
        return [path.name for path in self._part_paths()]

    @cached_property
    def is_exploded(self) -> bool:
        """Whether each sample is a row of its parts."""
        return bool(self.read_manifest()["fingerprint"].get("explode"))

    def scan(self) -> pl.LazyFrame:
        """A row for each row of the input: of all committed parts, of several samples that are rows
        the first. Our columns and no rows where there is none yet."""
        rows = self.scan_samples()
        if self.is_exploded and self._part_paths():
            return rows.filter(pl.col("sample_index") == 0)
        return rows

    def scan_samples(self) -> pl.LazyFrame:
        """All rows of all committed parts."""
        paths = self._part_paths()
        if paths:
            return pl.scan_parquet(paths, glob=False)  # a name may hold brackets
        empty = pl.from_arrow(pa.schema(OUTPUT_FIELDS).empty_table())
        assert isinstance(empty, pl.DataFrame)
        return empty.lazy()

    def schema(self) -> pa.Schema:
        """Of all committed parts; our columns where there is none yet."""
        paths = self._part_paths()
        return pq.read_schema(paths[0]) if paths else pa.schema(OUTPUT_FIELDS)

    def check_rows(self, rows: NDArray[np.int64]) -> None:
        """Raises StorageError unless `rows` are there once each and no other, as committed."""
        done, num_rows = self.done_rows(), len(rows)
        missing = np.setdiff1d(rows, done, assume_unique=True)
        if len(missing):
            raise StorageError(
                f"{len(missing)} of {num_rows} rows have no answer in {self.name}/data (first: row "
                f"{missing[0]}{self._lost_parts()}); run the same command again"
            )
        if len(done) != num_rows:
            raise StorageError(
                f"{self.name}/data holds {len(done)} rows where {num_rows} were planned; "
                "move the folder away and run again"
            )
        columns = self.scan().select("row_index", "id").collect()
        if not np.array_equal(columns["row_index"].sort().to_numpy(), done):
            raise StorageError(
                f"the parts in {self.name}/data hold other rows than their footers say; move the "
                "folder away and run again"
            )
        num_ids = columns["id"].n_unique()
        if num_ids != num_rows:
            raise StorageError(
                f"{num_rows} rows in {self.name}/data have only {num_ids} different ids; "
                "make the ids of the input unique and run into a new folder"
            )

    def _lost_parts(self) -> str:
        """The parts that were there when the run was sealed and are not now, as a clause."""
        try:
            sealed = (self.root / SUCCESS_NAME).read_text(errors="replace").split()
        except OSError:
            return ""
        lost = sorted(set(filter(PART_NAME.fullmatch, sealed)) - set(self.part_names()))
        return f"; {lost[0]} is gone" if lost else ""

    def _read_footer(self, path: Path) -> PartFooter:
        footer = read_part_footer(path)
        origin = footer.provenance.get("run_id", self.run_id)
        if origin != self.run_id:
            raise StorageError(f"{path} belongs to the run {origin}; move it out of the folder")
        return footer

    def _part_paths(self) -> list[Path]:
        paths = sorted(self.data.glob("*.parquet")) if self.data.is_dir() else []
        foreign = [path for path in paths if not PART_NAME.fullmatch(path.name)]
        if foreign:
            raise StorageError(f"{foreign[0]} is not a part of this run; move it out of the folder")
        return paths
