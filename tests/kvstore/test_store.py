"""What is put comes back bit for bit, for the same ids, model and tenant and for no others."""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pipeline.errors import UsageError
from pipeline.kvstore.header import DTYPES
from pipeline.kvstore.store import KVStore
from tests.kvstore.oracle import (
    IDENTITY,
    Oracle,
    Prefix,
    as_ids,
    check_prompt,
    entry_paths,
    kv_of,
    open_store,
)

PROMPT = (5, 6, 7, 8, 9)
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
TENANTS = st.sampled_from(["", "other"])
ACTIONS = st.one_of(
    st.tuples(st.just("put"), PROMPTS, st.integers(0, 6), TENANTS),
    st.tuples(st.just("match"), PROMPTS, st.just(0), TENANTS),
    st.tuples(st.sampled_from(["reopen", "lose index", "evict"]), PROMPTS, st.just(0), TENANTS),
)


def put(store: KVStore, prompt: Prefix, low: int = 0, tenant: str = "") -> bool:
    return store.put(as_ids(prompt), low, kv_of(prompt, low, tenant), tenant)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ACTIONS, max_size=25))
def test_the_store_says_what_a_dictionary_of_all_prefixes_says(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, Prefix, int, str]]
) -> None:
    """Seen red: a child looked for at the end of its parent instead of where the prompts part; KV
    cut at the position in the prompt instead of in the entry."""
    folder = tmp_path_factory.mktemp("store") / "kv"
    store, oracle = open_store(folder), Oracle()
    for what, prompt, low, tenant in actions:
        if what == "put":
            low = min(low, len(prompt) - 1)
            assert put(store, prompt, low, tenant) == oracle.put(prompt, low, tenant)
        elif what == "match":
            check_prompt(store, prompt, oracle.match(prompt, tenant), tenant)
        else:
            store.close()
            if what == "lose index":
                (folder / "index.safetensors").unlink(missing_ok=True)
            store = open_store(folder)
            if what == "evict":
                used = store._catalogue.used_bytes
                store._catalogue.make_room(0, used * 2 // 3)
                oracle.keep_what_is_left(store)
    store.close()
    with open_store(folder) as store:
        for tenant, prefix in oracle.prefixes:
            check_prompt(store, prefix, len(prefix), tenant)
        assert store.stats.quarantined == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    identity = dataclasses.replace(IDENTITY, dtype=dtype)
    kv = kv_of(PROMPT, identity=identity)
    kv[0, 0, 0, 0, 0] = torch.finfo(kv.dtype).max  # sums of such overflow; they are finite
    kv[0, 0, 0, 0, 1] = torch.finfo(kv.dtype).max
    with open_store(tmp_path / "kv", identity) as store:
        assert store.put(as_ids(PROMPT), 0, kv)
        loaded = store.load(as_ids(PROMPT), 0, 5)
    assert loaded is not None and loaded.dtype == kv.dtype and torch.equal(loaded, kv)


def test_a_file_is_plain_safetensors_and_nobody_elses_to_read(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        with open_store(tmp_path / "kv") as store:
            put(store, PROMPT)
    finally:
        os.umask(umask)
    (path,) = entry_paths(tmp_path / "kv")
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("kv"), kv_of(PROMPT))
        assert file.get_tensor("token_ids").tolist() == list(PROMPT)
        assert file.metadata()["identity"] == IDENTITY.digest()
    for folder, _, names in os.walk(tmp_path / "kv"):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        for name in names:
            assert stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"},
        {"tokenizer": "x"},
        {"dtype": "bfloat16"},
        {"layout": (2, 3, 2)},
        {"rope": '{"theta":1}'},
    ],
    ids=lambda change: str(*change),
)
def test_states_of_another_model_are_a_miss_that_says_so_once(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red: an identity that left the rope settings out."""
    with open_store(tmp_path / "kv") as store:
        put(store, PROMPT)
    other = dataclasses.replace(IDENTITY, **change)  # type: ignore[arg-type]
    with open_store(tmp_path / "kv", other) as store:
        for _ in range(3):
            assert store.match(as_ids(PROMPT)) == 0
            assert store.load(as_ids(PROMPT), 0, 5) is None
        assert store.stats.other_identity == 1
        assert store.stats.misses == 6
    (said,) = [r.getMessage() for r in caplog.records]
    assert "holds states of other models, tokenizers or dtypes" in said
    with open_store(tmp_path / "kv") as store:
        check_prompt(store, PROMPT, 5)


def test_tenants_and_salts_never_meet(tmp_path: Path) -> None:
    """Seen red: a root that left the salt out."""
    with open_store(tmp_path / "kv") as store:
        put(store, PROMPT, tenant="a")
        assert store.match(as_ids(PROMPT), "a") == 5
        assert store.match(as_ids(PROMPT), "b") == 0
        assert store.match(as_ids(PROMPT)) == 0
        put(store, PROMPT, tenant="b")
        check_prompt(store, PROMPT, 5, "a")
        check_prompt(store, PROMPT, 5, "b")
    with open_store(tmp_path / "kv", salt="secret") as store:
        assert store.match(as_ids(PROMPT), "a") == 0
    names = b"".join(path.read_bytes() for path in (tmp_path / "kv").rglob("*") if path.is_file())
    assert b"secret" not in names and b"tenant" not in names


def test_what_cannot_be_kept_is_false(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path / "kv") as store:
        assert not put(store, PROMPT, low=2)  # nothing leads to it
        assert put(store, PROMPT) and not put(store, PROMPT)
        assert not put(store, PROMPT[:3])  # more than that is there
        longer = (*PROMPT, 1, 2)
        for bad in (torch.nan, torch.inf):
            kv = kv_of(longer)
            kv[1, 0, 1, 6, 2] = bad
            assert not store.put(as_ids(longer), 0, kv)
        with pytest.raises(ValueError, match=r"the store wants \(2, 2, 2, 7, 3\)"):
            store.put(as_ids(longer), 0, kv_of(PROMPT))
        check_prompt(store, longer, 5)
    with open_store(tmp_path / "small", budget=100) as store:
        assert not put(store, PROMPT)
        assert not entry_paths(tmp_path / "small")
    assert [r.getMessage() for r in caplog.records] == [
        "KV with values that are not finite is not stored"
    ]


def test_what_was_used_the_longest_ago_gives_way_and_parents_after_children(
    tmp_path: Path,
) -> None:
    """Use outlives the process. Seen red: times kept in memory alone; a budget that was checked
    after writing."""
    prompts = [(number, 1, 2) for number in range(4)]
    with open_store(tmp_path / "kv") as store:
        for prompt in prompts:
            put(store, prompt)
        put(store, (0, 1, 2, 3))
        store.load(as_ids(prompts[1]), 0, 3)
        used = store._catalogue.used_bytes
    with open_store(tmp_path / "kv", budget=used) as store:
        store.load(as_ids(prompts[2]), 0, 1)
        for new in (10, 11):
            assert put(store, (new, 1, 2))
            assert sum(path.stat().st_size for path in entry_paths(tmp_path / "kv")) <= used
        # 3 went first, then 0, which was used when its child came, and before it that child
        left = [prompt[0] for prompt in prompts if store.match(as_ids(prompt))]
        assert left == [1, 2]
        assert store.match(as_ids((0, 1, 2, 3))) == 0
        assert store.stats.evictions == 3


def test_the_path_of_a_new_entry_does_not_give_way_to_it(tmp_path: Path) -> None:
    with open_store(tmp_path / "kv") as store:
        put(store, PROMPT)
        used = store._catalogue.used_bytes
    with open_store(tmp_path / "kv", budget=used + 100) as store:
        assert not put(store, (*PROMPT, 1))
        check_prompt(store, PROMPT, 5)


@pytest.mark.fault(
    "two writers",
    injected="a second job on a KV store that another writes to",
    outcome="it only reads, says so once, and sees what is new after a refresh",
)
def test_one_writes_and_the_others_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_store(tmp_path / "kv") as writer:
        put(writer, PROMPT)
        reader = open_store(tmp_path / "kv")
        assert writer.is_writer and not reader.is_writer
        check_prompt(reader, PROMPT, 5)
        assert not put(reader, (1, 2))
        put(writer, (1, 2, 3))
        assert reader.match(as_ids((1, 2, 3))) == 0
        reader.refresh()
        check_prompt(reader, (1, 2, 3), 3)
        held = reader.load(as_ids(PROMPT), 0, 5)
        writer._catalogue.make_room(0, 0)
        assert reader.match(as_ids(PROMPT)) == 5
        assert reader.load(as_ids(PROMPT), 0, 5) is None  # a miss, and known from now on
        assert reader.match(as_ids(PROMPT)) == 0
        assert held is not None and torch.equal(held, kv_of(PROMPT))  # what it had it keeps
        assert reader.stats.quarantined == 0
        reader.close()
    assert len(caplog.records) == 1 and "is only read" in caplog.records[0].getMessage()
    with open_store(tmp_path / "kv") as store:
        assert store.is_writer


def test_a_loaded_tensor_can_be_written_to_and_the_file_stays(tmp_path: Path) -> None:
    with open_store(tmp_path / "kv") as store:
        put(store, PROMPT)
        kv = store.load(as_ids(PROMPT), 0, 5)
        assert kv is not None
        kv.zero_()
        check_prompt(store, PROMPT, 5)


def test_threads_may_share_a_store(tmp_path: Path) -> None:
    prompts = [(number, *range(number)) for number in range(30)]
    with open_store(tmp_path / "kv") as store:

        def use(first: int) -> None:
            for prompt in prompts[first:] + prompts[:first]:
                put(store, prompt)
                check_prompt(store, prompt, len(prompt))

        threads = [threading.Thread(target=use, args=(first,)) for first in (0, 10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.stats.puts == len(prompts)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes\.txt, so it is no KV store"):
        open_store(tmp_path)
    with pytest.raises(UsageError, match="cannot open the KV store"):
        open_store(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="int8"):
        open_store(tmp_path / "kv", dataclasses.replace(IDENTITY, dtype="int8"))


def test_a_large_store_opens_from_its_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 300 entries none is opened; with the index of 200 of them, 100 are."""
    draw = np.random.default_rng(0)
    prompts = [tuple(draw.integers(0, 3, 12).tolist()) for _ in range(300)]
    folder = tmp_path / "kv"
    with open_store(folder) as store:
        for prompt in prompts[:200]:
            put(store, prompt)
    early = (folder / "index.safetensors").read_bytes()
    first = len(entry_paths(folder))
    with open_store(folder) as store:
        for prompt in prompts:
            put(store, prompt)
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(
        "pipeline.kvstore.catalogue.os.open", lambda *a: opened.append(str(a[0])) or real(*a)
    )
    open_store(folder).close()
    assert not [path for path in opened if ".safetensors" in path and "index" not in path]
    (folder / "index.safetensors").write_bytes(early)
    with open_store(folder) as store:
        read = {path for path in opened if path.endswith(".safetensors")}
        assert len(read) == len(entry_paths(folder)) - first
        for prompt in prompts:
            check_prompt(store, prompt, 12)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
