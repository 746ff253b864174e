"""A night that begins with last night's KV: what is kept, loaded, refused, and never mixed up."""

from __future__ import annotations

import logging
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.audit.auditing import audit_run
from pipeline.job.observer import SilentObserver
from pipeline.job.recycling import parts_to_keep
from pipeline.kvstore.store import KVStore
from pipeline.location import Location
from pipeline.plan.plan import Plan
from pipeline.run import plan_job, run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.conversation_job import AS_TURNS, Turn, write_turns
from tests.engine import tiny
from tests.tiny_job import answers, write_prompts

SYSTEM = "you are a careful clerk of the harbour office: answer in one word. "
PROMPTS = [f"{SYSTEM}question {i % 3}: what is {word}?" for i, word in enumerate("abcdefghij")]


class Heard(SilentObserver):
    def __init__(self) -> None:
        self.text = ""

    def say(self, line: str) -> None:
        self.text += f"{line}\n"


class Nights:
    """Runs jobs on one store."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = model
        self.store = root / "store"
        self.number = 0

    def settings(self, **flat: Any) -> JobSettings:
        base = {"model": str(self.model), "max_new_tokens": 6, "ignore_eos": True}
        return JobSettings.from_flat(base | {"kv_store": str(self.store)} | flat)

    def run(self, prompts: list[str], **flat: Any) -> tuple[Path, dict[str, float], str]:
        """Run directory, counters, what was said."""
        self.number += 1
        tenants = flat.pop("tenants", None)
        columns = {} if tenants is None else {"tenant": tenants}
        source = write_prompts(self.root / f"p{self.number}.parquet", [*prompts], **columns)
        heard = Heard()
        place = self.root / f"night{self.number}"
        outcome = run_job(str(source), place, self.settings(**flat), heard)
        return place, outcome.counters, heard.text


@pytest.fixture
def nights(
    kernels: None, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Nights:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no rates: loading always pays
    return Nights(tmp_path, model_folder)


def texts(place: Path) -> list[str]:
    found: list[str] = answers(place)["generated_text"].to_list()
    return found


def test_the_second_night_computes_nothing_that_rows_shared(nights: Nights) -> None:
    """Seen red: with the store looked up after prefill, or not at all."""
    first, cold, _ = nights.run(PROMPTS)
    second, warm, said = nights.run(PROMPTS)
    assert texts(first) == texts(second)
    assert cold["loaded_tokens"] == 0
    plan = plan_job(str(nights.root / "p1.parquet"), nights.settings(kv_store=None)).plan
    shared = plan.count_below(np.arange(len(plan.sequences))) > 1
    assert warm["loaded_tokens"] == plan.tree.edge_lengths[shared].sum() > 60
    assert warm["prefilled_tokens"] == plan.tree.edge_lengths[~shared].sum()
    assert set(answers(first)["reuse_source"]) == {"run", "none"}
    assert set(answers(second)["reuse_source"]) == {"store"}
    assert f"{int(warm['loaded_tokens'])} prompt tokens loaded" in said
    verdict = audit_run(Location(second), AuditSettings(audit_sample="100%", audit_arms=0))
    assert verdict.passed and verdict.rows_exact == verdict.rows_audited == len(PROMPTS)


def test_tomorrows_other_questions_find_the_system_prompt(nights: Nights) -> None:
    nights.run(PROMPTS)
    others = [f"{SYSTEM}tell me {word}" for word in ("more", "less", "nothing")]
    place, counters, _ = nights.run(others)
    alone = nights.run(others, kv_store=None)
    assert counters["loaded_tokens"] >= len(SYSTEM)
    assert texts(place) == texts(alone[0])


DOCUMENTS = [f"document {i} speaks of {word}. " for i, word in enumerate(("tar", "rope", "salt"))]
ORDERS = [[0, 1], [1, 0], [2, 1, 0], [0, 2]]
REUSE = {"reuse": "epic", "epic_tokens": 2, "calibration_rows": 0, "ignore_eos": True}


def documents_of(nights: Nights, number: int) -> str:
    """A table whose rows have the documents in other orders, and questions of their own."""
    path = nights.root / f"documents{number}.parquet"
    rows = [
        [
            {"role": "system", "text": "say: "},
            *({"role": "document", "text": DOCUMENTS[i]} for i in order),
            {"role": "query", "text": f"what of {number}{row}?"},
        ]
        for row, order in enumerate(ORDERS)
    ]
    pq.write_table(pa.table({"id": [f"r{i}" for i in range(len(rows))], "segments": rows}), path)
    return str(path)


def run_documents(nights: Nights, number: int, **flat: Any) -> tuple[Path, dict[str, float]]:
    place = nights.root / f"out{number}{len(flat)}"
    settings = nights.settings(**REUSE | flat)
    outcome = run_job(documents_of(nights, number), place, settings, Heard())
    return place, outcome.counters


def test_documents_of_last_night_serve_tonight(nights: Nights) -> None:
    """Every one, wherever it stands; what rows compute themselves is computed."""
    run_documents(nights, 1)
    warm, counters = run_documents(nights, 2)
    planned = plan_job(documents_of(nights, 2), nights.settings(**REUSE)).plan.documents
    assert planned is not None
    every = np.arange(len(ORDERS))
    encoded = planned.tokens_to_compute(every) - planned.count_own(every)
    assert counters["loaded_tokens"] == encoded > 60
    assert counters["prefilled_tokens"] == planned.count_own(every)
    cold, _ = run_documents(nights, 2, kv_store=None)
    assert texts(warm) == texts(cold)
    verdict = audit_run(Location(warm), AuditSettings(audit_sample="100%", audit_arms=0))
    assert verdict.passed and verdict.rows_exact == len(ORDERS)


def test_a_document_in_another_context_is_another_one(nights: Nights) -> None:
    run_documents(nights, 1)
    place, counters = run_documents(nights, 2, document_context="alone")
    plain, _ = run_documents(nights, 2, document_context="alone", kv_store=None)
    assert counters["loaded_tokens"] == len("say: "), "the preamble is the same"
    assert texts(place) == texts(plain)


def test_the_plan_tells_what_the_store_has(nights: Nights) -> None:
    source = str(write_prompts(nights.root / "q.parquet", [*PROMPTS]))
    before = plan_job(source, nights.settings()).summary.store
    nights.run(PROMPTS)
    after = plan_job(source, nights.settings()).summary.store
    _, counters, _ = nights.run(PROMPTS)
    assert before is not None and after is not None
    assert before["tokens"] == 0 and after["tokens"] == counters["loaded_tokens"] > 0
    assert plan_job(source, nights.settings(kv_store=None)).summary.store is None


def test_below_the_break_even_depth_the_store_is_not_used(
    nights: Nights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: with every length accepted."""
    nights.run(PROMPTS)
    for least, loads in ((len(SYSTEM) + 40, False), (10, True)):
        monkeypatch.setattr("pipeline.job.recycling.least_depth", lambda *a, n=least: n)
        _, counters, _ = nights.run(PROMPTS)
        assert (counters["loaded_tokens"] > 0) is loads
    monkeypatch.setattr("pipeline.job.recycling.least_depth", lambda *a: None)
    _, counters, said = nights.run(PROMPTS)
    assert counters["loaded_tokens"] == 0 and "faster than loading" in said


@pytest.mark.fault(
    "two tenants, one prefix",
    injected="a store of KV from earlier runs that both tenants use",
    outcome="each loads what it has computed itself, and nothing of the other",
)
def test_a_tenant_never_loads_what_another_has_computed(nights: Nights) -> None:
    """Seen red: without the tenant in the key."""
    count = len(PROMPTS)
    nights.run(PROMPTS, tenants=["a"] * count)
    _, other, _ = nights.run(PROMPTS, tenants=["b"] * count)
    _, nobody, _ = nights.run(PROMPTS)
    _, again, _ = nights.run(PROMPTS, tenants=["a"] * count)
    assert other["loaded_tokens"] == nobody["loaded_tokens"] == 0 < again["loaded_tokens"]


@pytest.mark.fault(
    "KV of an earlier run",
    injected="a store of another model, of another type of weights, of strict mode",
    outcome="nothing is loaded",
)
def test_states_of_another_model_are_not_found(nights: Nights, tmp_path: Path) -> None:
    """Seen red: with an identity of the tokenizer alone."""
    nights.run(PROMPTS)
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(nights.model, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + torch.tensor(0.5)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    others = ({"model": str(other)}, {"dtype": "bfloat16"}, {"weights": "int8"})
    for flat in (*others, {"fidelity": "strict"}):
        _, counters, _ = nights.run(PROMPTS, **flat)
        assert counters["loaded_tokens"] == 0, flat


@pytest.mark.fault(
    "KV of an earlier run",
    injected="every entry truncated, altered, or gone; the store's folder deleted while a job runs",
    outcome="computed instead, the same answers",
)
@pytest.mark.parametrize("damage", ["truncate", "alter", "remove", "folder"])
def test_a_damaged_store_costs_time_and_nothing_else(
    nights: Nights, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, cold, _ = nights.run(PROMPTS)
    entries = sorted(nights.store.rglob("*.safetensors"))
    assert entries
    for entry in entries:
        content = bytearray(entry.read_bytes())
        if damage == "truncate":
            entry.write_bytes(content[: len(content) // 2])
        elif damage == "alter":
            content[-5] ^= 1
            entry.write_bytes(content)
        elif damage == "remove":
            entry.unlink()
    if damage == "folder":
        match = KVStore.match

        def lose(store: KVStore, *arguments: Any) -> Any:
            shutil.rmtree(nights.store, ignore_errors=True)
            return match(store, *arguments)

        monkeypatch.setattr(KVStore, "match", lose)
    second, warm, _ = nights.run(PROMPTS)
    assert texts(first) == texts(second)
    assert warm["loaded_tokens"] == 0
    assert warm["prefilled_tokens"] == cold["prefilled_tokens"]


def test_two_jobs_use_one_store_and_one_of_them_writes(nights: Nights) -> None:
    nights.run(PROMPTS)
    from pipeline.job.job import open_job
    from pipeline.job.recycling import kv_identity

    job = open_job(str(nights.root / "p1.parquet"), nights.settings())
    identity = kv_identity(job.settings, job.model_identity, job.tokenizer.fingerprint, "float32")
    with KVStore.open(nights.store, identity, 1 << 30) as other:
        assert other.is_writer
        _, counters, said = nights.run([*PROMPTS, f"{SYSTEM}one more", f"{SYSTEM}one more?"])
    assert counters["loaded_tokens"] > 0 and "0 prefixes kept" in said


def test_an_engine_without_kv_of_prefixes_does_without(nights: Nights) -> None:
    _, counters, said = nights.run(PROMPTS, engine="naive")
    assert "--kv-store is left out: the naive engine" in said
    assert counters["rows_ok"] == len(PROMPTS) and not nights.store.exists()


@pytest.mark.parametrize("seed", range(12))
def test_nodes_are_kept_by_how_many_share_them(seed: int) -> None:
    """Against the words of `parts_to_keep`, said as slowly as can be."""
    draw = random.Random(seed)
    plan = tiny.plan_of(tiny.random_prompts(draw, 40), min_prefix_tokens=1)
    every = np.arange(len(plan.sequences))
    least, room = draw.choice([1, 20, 41]), draw.choice([10, 60, 10_000])
    kept = set(np.flatnonzero(parts_to_keep(plan, every, least, room)).tolist())
    below, tree = plan.count_below(every), plan.tree
    for node in kept:
        assert below[node] > 1
        assert tree.parent[node] == -1 or int(tree.parent[node]) in kept
        assert any(tree.end[other] >= least for other in kept if is_above(plan, node, other))
    assert tree.edge_lengths[sorted(kept)].sum() <= room
    if room == 10_000:
        wanted = {n for n in range(tree.num_nodes) if below[n] > 1}
        wanted = {
            n for n in wanted if any(tree.end[o] >= least and is_above(plan, n, o) for o in wanted)
        }
        assert kept == wanted


def is_above(plan: Plan, node: int, other: int) -> bool:
    """Whether `other` is `node` or lies below it."""
    while other != -1 and other != node:
        other = int(plan.tree.parent[other])
    return other == node


def test_the_writer_of_a_store_that_breaks_ends_no_job(
    nights: Nights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen red: without the except the engine waits for a thread that has died."""

    def fall(*arguments: Any) -> bool:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(KVStore, "put", fall)
    monkeypatch.setattr("pipeline.kvstore.connector._WAITING_BYTES", 0)
    monkeypatch.setattr(logging.getLogger("coppice"), "propagate", True)
    _, counters, _ = nights.run(PROMPTS)
    assert counters["rows_ok"] == len(PROMPTS)
    assert "keeps nothing of a prefix: unexpected RuntimeError" in caplog.text
    assert not any(thread.name == "kv-store" for thread in threading.enumerate())


def run_turns(nights: Nights, number: int, **flat: Any) -> tuple[Path, dict[str, float]]:
    """Three conversations of three turns, whose first prompts begin alike."""
    turns: list[Turn] = [
        (f"talk {talk}", turn, f"{SYSTEM}i am {talk}" if not turn else f"{number} or {turn}?")
        for turn in range(3)
        for talk in range(3)
    ]
    source = write_turns(nights.root / f"turns{number}.parquet", turns)
    place = nights.root / f"turns{number}{len(flat)}"
    outcome = run_job(str(source), place, nights.settings(**AS_TURNS | flat), Heard())
    return place, outcome.counters


def test_first_prompts_of_conversations_are_kept_and_loaded_and_nothing_of_later_turns(
    nights: Nights,
) -> None:
    _, cold = run_turns(nights, 0)
    place, warm = run_turns(nights, 1)
    alone, none = run_turns(nights, 1, kv_store=None)
    assert texts(place) == texts(alone)
    assert cold["loaded_tokens"] == 0 and len(SYSTEM) <= warm["loaded_tokens"] <= len(SYSTEM) + 5
    assert warm["prefilled_tokens"] == none["prefilled_tokens"] - warm["loaded_tokens"]
    sources = answers(place).group_by("turn").agg("reuse_source").sort("turn")
    assert [sorted(set(found)) for found in sources["reuse_source"]] == [
        ["store"], ["run"], ["run"]
    ]  # fmt: skip
