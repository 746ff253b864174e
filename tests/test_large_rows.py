"""One row of 100 MB among normal ones: it alone fails, or is carried, and memory stays bounded."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_job import answers

ROOT = Path(__file__).resolve().parents[1]
_BIG = 100_000_000
_MOST_MIB = 1800  # 400 of it without the row; its tokens alone would take 12,000

_RUN = """
import sys
from pathlib import Path
from pipeline.run import run_job
from pipeline.settings import JobSettings
model = {"model": sys.argv[3], "engine": "echo", "max_new_tokens": 4, "fail_on_error": "1"}
run_job(sys.argv[1], Path(sys.argv[2]), JobSettings.from_flat(model))
print(Path("/proc/self/status").read_text())
"""


@pytest.mark.fault(
    "one 100 MB row",
    injected="one among three, as a prompt or in a carried column",
    outcome="the prompt is a failed row, the column is carried; memory bounded",
)
@pytest.mark.slow
@pytest.mark.parametrize("column", ["prompt", "note"])
def test_a_row_of_100_mb(tmp_path: Path, column: str) -> None:
    """Seen red: tokenised before it was refused."""
    columns = {"id": list("abcde"), "prompt": ["hello"] * 5, "note": ["n"] * 5}
    columns[column][2] = "hold the line; " * (_BIG // 15)
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    model = str(ROOT / "data" / "demo_model")
    command = [sys.executable, "-c", _RUN, str(tmp_path / "in.parquet"), str(tmp_path / "out")]
    done = subprocess.run([*command, model], capture_output=True, text=True, cwd=ROOT, check=True)
    rows = answers(tmp_path / "out")
    failed = ["c"] if column == "prompt" else []
    assert rows.filter(pl.col("status") == "error")["id"].to_list() == failed
    assert rows["error_type"][2] == ("OverlongPrompt" if failed else None)
    assert rows[column].to_list() == columns[column]
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    if peak is not None:  # Linux only
        assert int(peak[1]) / 1024 < _MOST_MIB
