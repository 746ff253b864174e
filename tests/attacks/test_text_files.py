"""CSV files and JSON lists that somebody made to do harm, or that only look like what they are."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import JobSettings, ReadSettings
from tests.tiny_job import answers


def opened(path: Path, tmp_path: Path) -> PromptSource:
    copies = ParquetCopies(tmp_path / "cache" / "inputs")
    return open_source(Location(path), ReadSettings(), copies=copies)


@pytest.mark.parametrize(
    "cell",
    [
        "=HYPERLINK(1)",
        "\x00",
        "\x1b[2J",
        "a\x00b",
        "\u202e",
        "\ufeff",
        "{{ 7 * 7 }}",
        "\x85",
        "\u2028",
    ],
)
def test_a_cell_is_text_and_nothing_else(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f'id,prompt\na,"{cell}"\nb,c\n', encoding="utf-8", newline="")
    source = opened(path, tmp_path)
    assert source.take(np.arange(2))["prompt"].to_pylist() == [cell, "c"]


def test_what_a_bad_row_holds_is_in_no_message(
    tmp_path: Path, settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "in.csv").write_text('id,prompt\na,b\nCANARY,CANARY,x\n"CANARY"CANARY,y\n')
    lenient = settings.write.model_copy(update={"fail_on_error": "100%"})
    run_job(
        str(tmp_path / "in.csv"),
        tmp_path / "out",
        settings.model_copy(update={"write": lenient}),
    )
    found = answers(tmp_path / "out")
    assert found["status"].to_list() == ["ok", "error", "error"]
    assert "CANARY" not in str(found["error_message"].to_list())


@pytest.mark.parametrize("name", ["in.csv.gz", "in.json.gz"])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, name: str) -> None:
    rows = [{"id": str(i), "prompt": "x" * 50} for i in range(2000)]
    text = json.dumps(rows) if "json" in name else "id,prompt\n" + "a,b\n" * 2000
    whole = gzip.compress(text.encode())
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=name):
        opened(tmp_path / name, tmp_path)


@pytest.mark.parametrize(
    "content", [b"PAR1" + bytes(100) + b"PAR1", b"\x1f\x8b\x08\x00", bytes(64), b"\xff\xfe\x00"]
)
@pytest.mark.parametrize("name", ["in.csv", "in.json", "in.tsv.gz"])
def test_what_is_no_text_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        opened(tmp_path / name, tmp_path)
    assert "\n" not in str(error.value) and "\x00" not in str(error.value)


def test_a_header_of_a_million_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("prompt," + ",".join(f"c{i}" for i in range(10**6)) + "\n")
    with pytest.raises(InputError, match="has over 50,000 columns"):
        opened(tmp_path / "in.csv", tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_rows_or_one_sentence(tmp_path: Path, seed: int) -> None:
    """Never in another error, whatever three bytes become."""
    dice = random.Random(seed)
    name = dice.choice(["in.csv", "in.json"])
    rows = [{"id": f"r{i}", "prompt": 'a "b", [c]\n', "n": i} for i in range(40)]
    lines = [f'r{i},"a ""b"", [c]\n",{i}\n' for i in range(40)]
    text = json.dumps(rows) if name == "in.json" else "id,prompt,n\n" + "".join(lines)
    content = bytearray(text.encode())
    for _ in range(3):
        content[dice.randrange(len(content))] = dice.randrange(256)
    (tmp_path / name).write_bytes(content)
    try:
        source = opened(tmp_path / name, tmp_path)
        source.check_carried_columns()
        assert sum(len(batch.ids) for batch in source.iter_prompts()) == source.num_rows
    except InputError as error:
        assert "\n" not in str(error)
