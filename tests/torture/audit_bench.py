"""The audit and the report of a finished run with a real model, written over older ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.audit.similarity import Encoder
from pipeline.location import Location
from pipeline.run import run_job, write_report
from pipeline.settings import AuditSettings, JobSettings
from tests.tiny_job import write_prompts
from tests.torture.job import Content, check_whole

FILES = ("audit/audit.parquet", "audit/summary.json", "report.html", "report.md")


@dataclass(frozen=True)
class AuditBench:
    """`coppice audit`, then `coppice report`, on a copy of the run in `finished`."""

    base: Path
    finished: Path

    @property
    def output(self) -> Path:
        """The copy."""
        return self.base / "out"

    @property
    def most_wasted(self) -> int:
        """The run is finished."""
        return 0

    def prepare(self) -> None:
        """Lay the copy out."""
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.copytree(self.finished, self.output)

    def run(self) -> object:
        """Audit five rows, where the older audit had two."""
        return write_audit(self.output, "5")

    def content(self) -> Content:
        """Rows and verdict of the audit, without its seconds."""
        summary = json.loads((self.output / "audit" / "summary.json").read_bytes())
        said = {name: json.dumps(x) for name, x in summary.items() if not name.endswith("seconds")}
        rows = pl.read_parquet(self.output / "audit" / "audit.parquet")
        return {"rows": rows, "summary": pl.DataFrame(said)}

    def check_trusted(self) -> None:
        """Each of the four files is the old one or a whole one; nothing else has changed."""
        for name in FILES:
            check_whole(self.output / name)
        for old in self.finished.rglob("*"):
            new = self.output / old.relative_to(self.finished)
            is_ours = str(old.relative_to(self.finished)) in FILES
            assert old.is_dir() or is_ours or new.read_bytes() == old.read_bytes(), new

    def check_finished(self, expected: Content, calls: int) -> None:
        """The new audit is there, and the report is of it."""
        self.check_trusted()
        for name, frame in self.content().items():
            assert frame.equals(expected[name]), name
        assert "5 of 5 rows identical" in (self.output / "report.md").read_text()


def write_audit(output: Path, sample: str) -> object:
    """Audit and report; no encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "load", classmethod(lambda cls, name=None: None))
        audit_run(
            Location(output), AuditSettings(audit_sample=sample, audit_free_running=1, audit_arms=0)
        )
        return write_report(Location(output))["page"]


def finished_run(folder: Path, model: Path) -> Path:
    """A run of twelve rows that was audited and reported once."""
    folder.mkdir(parents=True)
    prompts: list[str | None] = [f"{i} is a number of its own" for i in range(12)]
    source = write_prompts(folder / "p.parquet", prompts)
    settings = JobSettings.from_flat({"model": str(model), "max_new_tokens": 4})
    run_job(str(source), folder / "out", settings)
    write_audit(folder / "out", "2")
    return folder / "out"
