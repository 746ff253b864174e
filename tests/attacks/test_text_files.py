"""CSV files and JSON lists that somebody made to do harm, or that only look like what they are."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import PromptSource, open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import run_job
from pipeline.settings import JobSettings
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


# Fields of a request in CSV.


def overrides_of(tmp_path: Path, text: str) -> tuple[list[dict[str, Any]], dict[int, str]]:
    (tmp_path / "in.csv").write_text(text)
    batches = list(opened(tmp_path / "in.csv", tmp_path).iter_prompts())
    found = [override for batch in batches for override in batch.overrides]
    return found, {bad.row_index: bad.message for batch in batches for bad in batch.rejected}


def test_one_cell_that_is_no_number_takes_no_other_row_s_temperature(tmp_path: Path) -> None:
    """Seen red: the column became text, and every row ran at the job's own temperature."""
    text = "id,prompt,temperature,n_\n" + "".join(f"r{i},x,0.{i},1\n" for i in range(1, 9))
    found, bad = overrides_of(tmp_path, text + 'r9,"two\nlines","0,9",1\n,x,hot,\nr11,x,,\n')
    assert found[:8] == [{"temperature": i / 10} for i in range(1, 9)]
    assert found[8:] == [{}, {}, {}]
    assert sorted(bad) == [8, 9]
    assert bad[8].startswith("row 9 of ") and "'temperature' that is not a number" in bad[8]
    assert "0,9" not in bad[8] and "hot" not in bad[9]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", ".5", "2."], [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0}]),
        (["1e-3", "-0", ""], [{"temperature": 0.001}, {"temperature": 0.0}, {}]),
        (["warm", "hot", ""], [{}, {}, {}]),
    ],
)
def test_numbers_are_read_as_people_write_them(
    tmp_path: Path, cells: list[str], expected: list[dict[str, Any]]
) -> None:
    found, bad = overrides_of(tmp_path, "prompt,temperature\n" + "".join(f"x,{c}\n" for c in cells))
    assert found == expected and not bad


def test_a_seed_of_64_bits_is_that_seed(tmp_path: Path) -> None:
    """Seen red: from 10**18 on it was rounded to a float, and so was every other one."""
    seeds = [2**63 - 1, 1234567890123456789, -(2**63)]
    found, bad = overrides_of(tmp_path, "prompt,seed\n" + "".join(f"x,{s}\n" for s in seeds))
    assert found == [{"seed": seed} for seed in seeds] and not bad


def test_switches_and_log_probabilities_of_csv(tmp_path: Path) -> None:
    """Seen red: `logprobs` of true was text, and then `top_logprobs` nothing without it."""
    found, bad = overrides_of(
        tmp_path,
        "prompt,logprobs,top_logprobs,skip_special_tokens,ignore_eos\n"
        "x,TRUE,3,false,True\nx,false,,,maybe\nx,True,,true,\n",
    )
    assert found[0] == {"logprobs": 3, "skip_special_tokens": False, "ignore_eos": True}
    assert found[2] == {"logprobs": 0, "skip_special_tokens": True}
    assert list(bad) == [1] and "'ignore_eos' that is not true or false" in bad[1]


def test_lists_of_token_ids_are_json_in_a_cell(tmp_path: Path) -> None:
    """Seen red: a column of text was no field, and its rows ran without."""
    header = "prompt,stop_token_ids,allowed_token_ids,logit_bias\n"
    text = header + 'x,"[5, 6]",,"{""7"": 1}"\nx,5,[1],\nx,,,\n'
    found, bad = overrides_of(tmp_path, text)
    assert found[0] == {"stop_token_ids": [5, 6], "logit_bias": {7: 1.0}}
    assert found[2] == {} and list(bad) == [1]
    assert bad[1] == "stop_token_ids must be a list of token ids, not str"
