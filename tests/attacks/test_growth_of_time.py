"""Inputs in very many pieces: time that grows with them, not with their square; and an end on
demand. Bounds are several times what was measured on two busy cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from tests.sweeps import sweep
from tests.tiny_job import write_prompts, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path, pieces: int) -> Path:
    folder.mkdir()
    for number in range(pieces):
        write_prompts(folder / f"f{number:05}.parquet", ["hello"], id=[f"r{number}"])
    return folder


def groups(path: Path, pieces: int) -> Path:
    table = pa.table({"id": [f"r{i}" for i in range(pieces)], "prompt": ["hello"] * pieces})
    pq.write_table(table, path, row_group_size=1)
    return path


def columns(path: Path, pieces: int) -> Path:
    more = {f"c{number}": [number] for number in range(pieces)}
    pq.write_table(pa.table({"id": ["a"], "prompt": ["hello"], **more}), path)
    return path


def keys(path: Path, pieces: int) -> Path:
    row = {"id": "a", "prompt": "hello"} | {f"k{number}": number for number in range(pieces)}
    path = path.with_suffix(".jsonl")
    path.write_text(json.dumps(row) + "\n")
    return path


def read(source: Path, cache: Path) -> float:
    """Seconds of processor time of all that a job reads."""
    begin = time.process_time()
    opened = open_source(Location(source), ReadSettings(), copies=ParquetCopies(cache))
    assert sum(len(batch.ids) for batch in opened.iter_prompts()) == opened.num_rows
    opened.check_carried_columns()
    for start in range(0, opened.num_rows, 1000):
        opened.take(np.arange(start, min(start + 1000, opened.num_rows)))
    opened.fingerprint()
    return time.process_time() - begin


@pytest.mark.fault(
    "inputs in very many pieces",
    injected="files and row groups of one row, thousands of columns and of keys in a line",
    outcome="eight times the pieces take about eight times the time",
)
@pytest.mark.parametrize(
    ("make", "pieces"), [(files, 100), (groups, 500), (columns, 500), (keys, 500)]
)
def test_time_grows_with_the_pieces(
    tmp_path: Path, make: Callable[[Path, int], Path], pieces: int
) -> None:
    """Seen red: 64 times (a cache that added up all tables at each call, a schema per column)."""
    few = make(tmp_path / "few", pieces)
    many = make(tmp_path / "many", 8 * pieces)
    read(few, tmp_path / "cache")  # what is imported and compiled once
    short = read(few, tmp_path / "cache1")
    assert read(many, tmp_path / "cache2") < 24 * short + 1


_STAGES = {
    "reading": "[list(source.iter_prompts()) for _ in range(9**9)]",
    "taking": "[source.take(np.arange(9)) for _ in range(9**9)]",
    "hashing": "[file.content_hash() for _ in range(9**9) for file in source._files]",
    "converting": "[ParquetCopies(Path(f'{cache}/{n}')).open(lines) for n in range(9**9)]",
    "planning": "[plan_rows(open_job(str(path), settings)) for _ in range(9**9)]",
}
_STAGE = """
import sys
from pathlib import Path
import numpy as np
from pipeline.job.job import open_job
from pipeline.job.planning import plan_rows
from pipeline.prompt_settings import ReadSettings
from pipeline.inputs.input_files import InputFile
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.location import Location
from pipeline.inputs.prompt_source import open_source
from tests.tiny_job import echo_settings
path, lines, cache = Path(sys.argv[1]), InputFile.local(Path(sys.argv[2])), sys.argv[3]
settings = echo_settings(Path(sys.argv[4]))
source = open_source(Location(path), ReadSettings())
print("ready", flush=True)
"""


@pytest.mark.fault(
    "SIGTERM",
    injected="while files are read, taken from, hashed, converted, planned",
    outcome="the process has ended within 5 seconds",
)
@pytest.mark.parametrize("stage", sweep(_STAGES, ("converting", "planning")))
def test_a_job_ends_on_demand_in_every_stage(tmp_path: Path, stage: str) -> None:
    source = groups(tmp_path / "in.parquet", 3000)
    command = [
        sys.executable, "-c", _STAGE + _STAGES[stage], str(source),
        str(keys(tmp_path / "in", 3000)), str(tmp_path / "cache"),
        str(write_tokenizer(tmp_path / "model")),
    ]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        process.wait(60)
        assert time.monotonic() - begin < 5
