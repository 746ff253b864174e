"""Prompts below s3://: which objects a URL means, that rows are those of the files, and faults."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.inputs.input_files import find_input_files
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.storage.remote_folder import RemoteFolder
from pipeline.store_settings import ObjectStoreSettings
from tests.storage.buckets import KEY_ID, SECRET, Store
from tests.tiny_job import write_prompts

PROMPTS = ["hello", "world", None, "good bye"]


def parquet(prompts: list[str | None], first: int = 0) -> bytes:
    ids = [f"r{first + i}" for i in range(len(prompts))]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": ids, "prompt": prompts}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.fixture
def filled(store: Store, bucket: str) -> str:
    """A bucket with prompts in several places, and things that are no prompts."""
    store.put(bucket, "one.parquet", parquet(PROMPTS))
    store.put(bucket, "in/", b"")  # as the console of AWS marks a folder
    store.put(bucket, "in/x-2.parquet", parquet(["c"], 2))
    store.put(bucket, "in/x-1.parquet", parquet(["a", "b"]))
    store.put(bucket, "in/deep/er/x-3.parquet", parquet(["d"], 3))
    store.put(bucket, "in/deep/.hid/x-4.parquet", parquet(["e"], 4))
    for name in ("in/_x.parquet", "in/.x.parquet", "in/notes.txt", "instead/y.parquet"):
        store.put(bucket, name, b"not Parquet")
    return bucket


def texts(url: str, settings: ReadSettings | None = None) -> list[object]:
    source = open_source(Location(url), settings or ReadSettings())
    return [text for batch in source.iter_prompts() for text in batch.contents]


def test_an_object_has_the_rows_of_the_file(filled: str, tmp_path: Path) -> None:
    local = open_source(Location(write_prompts(tmp_path / "one.parquet", PROMPTS)), ReadSettings())
    remote = open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings())
    batches = [list(source.iter_prompts()) for source in (local, remote)]
    assert batches[0] == batches[1]
    rows = np.array([3, 0])
    assert remote.take(rows).equals(local.take(rows))
    assert len(remote.fingerprint()) == 64


def test_a_prefix_is_all_parquet_below_it_but_what_is_hidden(filled: str) -> None:
    assert texts(f"s3://{filled}/in/") == list("dabc")
    assert texts(f"s3://{filled}/in") == list("dabc")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("in/**/x-*.parquet", "dabc"),
        ("in/x-?.parquet", "abc"),
        ("in/x-[!1].parquet", "c"),
        ("in/*/er/*", "d"),
        ("in/deep/*/x-*.parquet", "d"),
        ("*/x-1.parquet", "ab"),
        ("in/deep/.hid/*.parquet", "e"),
    ],
)
def test_a_glob_matches_as_it_does_in_a_folder(
    filled: str, store: Store, tmp_path: Path, pattern: str, found: str
) -> None:
    for key in store.keys(filled):
        if not key.endswith("/"):
            (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / key).write_bytes(store.get(filled, key))
    assert texts(f"s3://{filled}/{pattern}") == list(found)
    assert texts(f"{tmp_path}/{pattern}") == list(found)


def test_json_lines_and_partitions_are_read_from_a_store_too(
    store: Store, bucket: str, tmp_path: Path
) -> None:
    store.put(bucket, "logs/lang=de/x.jsonl", b'{"id": "a", "prompt": "hallo"}\n')
    store.put(bucket, "logs/lang=en/y.jsonl", b'{"id": "b", "prompt": "hello"}\n')
    copies = ParquetCopies(tmp_path / "copies")
    source = open_source(Location(f"s3://{bucket}/logs/"), ReadSettings(), copies=copies)
    assert source.take(np.arange(2)).to_pylist() == [
        {"id": "a", "prompt": "hallo", "lang": "de"},
        {"id": "b", "prompt": "hello", "lang": "en"},
    ]
    store.put(bucket, "logs/lang=en/y.jsonl", b'{"id": "b", "prompt": "other"}\n')
    with pytest.raises(InputError, match="changed while it was being read"):
        list(source.iter_prompts())


def test_ids_of_files_without_a_column_are_those_of_a_folder(
    store: Store, bucket: str, tmp_path: Path
) -> None:
    for name in ("a/p.parquet", "b/p.parquet"):
        (tmp_path / name).parent.mkdir()
        pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / name)
        store.put(bucket, f"in/{name}", (tmp_path / name).read_bytes())
    ids = [
        [
            name
            for batch in open_source(Location(place), ReadSettings()).iter_prompts()
            for name in batch.ids
        ]
        for place in (str(tmp_path), f"s3://{bucket}/in/")
    ]
    assert ids[0] == ids[1] == ["a/p.parquet:0:0", "b/p.parquet:0:0"]


def test_options_go_before_the_environment(
    store: Store, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    options = {
        "endpoint_url": store.url,
        "access_key_id": KEY_ID,
        "secret_access_key": SECRET,
        "region": "us-east-1",
    }
    chosen = ObjectStoreSettings(storage_options=options)
    assert open_source(Location(f"s3://{filled}/one.parquet", chosen), ReadSettings()).num_rows == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/one.parquet", "no such bucket"),
        ("s3://no-such-bucket/in/", "no such bucket"),
        ("s3://no-such-bucket", "no such bucket"),
        ("s3://{}/two.parquet", "no object, prefix or match"),
        ("s3://{}/in/z-*.parquet", "no object, prefix or match"),
        ("s3://{}/out/", "no file of rows below"),
        ("s3://{}/in/notes.txt", "neither a Parquet file nor named"),
        ("abfs://{}/one.parquet", "abfs:// is not supported; use a folder"),
        ("s3:///one.parquet", "must look like s3://bucket/name"),
    ],
)
def test_what_cannot_be_read_is_one_sentence_with_a_remedy(
    filled: str, url: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        texts(url.format(filled))
    assert "\n" not in str(error.value) and ("check" in str(error.value) or ";" in str(error.value))


def test_a_password_in_a_url_is_refused_and_not_repeated(filled: str) -> None:
    with pytest.raises(InputError, match="--storage-options") as error:
        texts(f"s3://{KEY_ID}:{SECRET}@{filled}/one.parquet")
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("key", ["one.parquet", "in/", "in/*.parquet"])
def test_refused_credentials_are_named(store: Store, filled: str, key: str) -> None:
    with store.revoked(), pytest.raises(InputError, match="refuses the credentials; check AWS_"):
        texts(f"s3://{filled}/{key}")


def test_credentials_that_end_while_rows_are_read_are_named(store: Store, filled: str) -> None:
    source = open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings())
    with store.revoked(), pytest.raises(InputError, match="refuses the credentials"):
        list(source.iter_prompts())


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_large_file_goes_there_in_parts_and_back(
    store: Store, bucket: str, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(bytes(range(256)) * (20 << 12))
    folder = RemoteFolder(Location(f"s3://{bucket}/out"))
    folder.put("large", tmp_path / "large")
    folder.fetch("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "large").read_bytes()
    assert folder.names() == {"large": 20 << 20}


def test_a_store_that_is_not_there_is_an_error_at_once(filled: str) -> None:
    away = ObjectStoreSettings(storage_options={"endpoint_url": "http://127.0.0.1:9"})
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be reached; check the network"):
        find_input_files(Location(f"s3://{filled}/one.parquet", away))
    assert time.monotonic() - started < 5


def test_a_store_that_never_answers_is_an_error_in_time(
    filled: str, silent_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.store_client.ANSWER_S", 1)
    silent = ObjectStoreSettings(
        storage_options={"endpoint_url": f"http://127.0.0.1:{silent_port}"}
    )
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be reached; check the network"):
        find_input_files(Location(f"s3://{filled}/one.parquet", silent))
    assert time.monotonic() - started < 10  # with 8 s to answer: 25 s, measured


@pytest.mark.parametrize("same_size", [True, False])
def test_an_object_that_is_replaced_between_plan_and_read_is_noticed(
    store: Store, filled: str, same_size: bool
) -> None:
    source = open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings())
    before = source.fingerprint()
    prompts = ["hallo", *PROMPTS[1:]] if same_size else ["hello there", *PROMPTS[1:]]
    assert (len(parquet(prompts)) == len(parquet(PROMPTS))) == same_size
    store.put(filled, "one.parquet", parquet(prompts))
    with pytest.raises(InputError, match="changed while it was being read; start again"):
        list(source.iter_prompts())
    assert (
        open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings()).fingerprint() != before
    )


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(store: Store, filled: str) -> None:
    source = open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings())
    batches = source.iter_prompts()
    next(batches)
    store.put(filled, "one.parquet", parquet(["hallo", *PROMPTS[1:]]))
    with pytest.raises(InputError, match="changed while it was being read; start again"):
        next(batches)


def test_an_object_that_goes_away_is_noticed(store: Store, filled: str) -> None:
    source = open_source(Location(f"s3://{filled}/one.parquet"), ReadSettings())
    store.delete(filled, "one.parquet")
    with pytest.raises(InputError, match="one.parquet"):
        list(source.iter_prompts())
