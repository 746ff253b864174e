"""What a run counts of documents, against a slow and obvious count, over drawn tables."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest

from pipeline.report.documents import measure_documents
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.audit.test_documents import write_adapter
from tests.job.test_documents import Row, write_rows
from tests.tiny_job import answers

CONTEXT, SOFT = 128, 2
Path_ = tuple[str | None, tuple[object, ...]]


class Counted(NamedTuple):
    """Of a table: tokens to compute; of each row that runs those repaired, and those of links."""

    computed: int
    rows: list[tuple[int, int] | None]


def draw_rows(draw: random.Random) -> list[Row]:
    """Some documents begin alike, some are equal, some are only the beginning of another."""
    texts = ["".join(draw.choices("abc ", k=draw.randint(1, 14))) for _ in range(5)]
    texts += [f"{texts[0]}x", texts[1][:2], texts[0]]
    return [
        (
            draw.choice(["", "say: ", "say"]),
            draw.choices(texts, k=draw.choice([0, 0, 1, 2, 3, 5, 12])),
            draw.choice(["q?", "why", "w", "a"]),
        )
        for _ in range(draw.randint(1, 14))
    ]


def count(rows: list[Row], tenants: list[str | None], flat: dict[str, Any]) -> Counted:
    """Character by character, of a tokenizer of characters."""
    mode, is_below = flat["reuse"], flat["document_context"] == "preamble"
    paths, seen, own = set[Path_](), set[object](), 0
    found: list[tuple[int, int] | None] = []
    for (preamble, documents, question), tenant in zip(rows, tenants, strict=True):
        links = len(documents) * {"packet": 2 * SOFT, "kvlink": SOFT}.get(mode, 0)
        length = len(preamble + "".join(documents) + question)
        if length + links >= CONTEXT:
            found.append(None)
            continue
        encoded: set[Path_] = {(tenant, tuple(preamble))}
        repaired = 0
        own_here = len(question) + (links if mode == "kvlink" else 0)
        for number, document in enumerate(documents):
            inner: tuple[object, ...] = tuple(document)
            if mode == "packet":
                inner = ("H", "H", *inner, "T", "T")
            is_exact = is_below and number == 0
            again = min(flat.get("epic_tokens", 0), len(document)) if not is_exact else 0
            own_here += again
            if again < len(document):  # else nobody looks at what would be encoded
                above: tuple[object, ...] = tuple(preamble) if is_below else ()
                encoded.add((tenant, above + inner))
                repaired += again
        if mode == "cacheblend":
            changed = documents[1:] if is_below else documents
            repaired = int(np.rint(len("".join(changed)) * flat["blend_share"]))
            own_here += repaired
        is_new = (tenant, preamble, tuple(documents), question) not in seen
        seen.add((tenant, preamble, tuple(documents), question))
        found.append((repaired if is_new else 0, links))
        if is_new:
            own += own_here
            paths |= {(of, path[:end]) for of, path in encoded for end in range(1, len(path) + 1)}
    return Counted(len(paths) + own, found)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "packet": write_adapter(folder / "packet", model_folder, "packet"),
        "kvlink": write_adapter(folder / "kvlink", model_folder, "kvlink"),
    }


MODES = ["concat", "epic", "cacheblend", "packet", "kvlink"]
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]


@pytest.mark.fault(
    "prompts in segments",
    injected="drawn tables of equal, nested, repeated and overlong documents, with tenants and "
    "without, in every mode, in parts of every size, with one or two rows at a time",
    outcome="plan, counters, columns of rows and report say what an obvious count says",
)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
def test_plan_counters_columns_and_report_agree(
    tmp_path: Path, model_folder: Path, adapters: dict[str, Path], mode: str, seed: int
) -> None:
    draw = random.Random(f"{mode} {seed}")
    rows = draw_rows(draw)
    tenants: list[str | None] = [draw.choice([None, "a", "b"]) if seed % 2 else None for _ in rows]
    flat: dict[str, Any] = {"reuse": mode, "document_context": draw.choice(["preamble", "alone"])}
    if mode == "epic":
        flat["epic_tokens"] = draw.choice([1, 3, 30])
    elif mode == "cacheblend":
        flat["blend_share"] = draw.choice([0.0, 0.15, 0.5, 1.0])
    elif mode in adapters:
        flat["adapter"] = str(adapters[mode])
    more = {"rows_per_part": draw.choice([1, 3, 100]), "max_rows": draw.choice([1, 2, 256])}
    common = {"model": str(model_folder), "max_new_tokens": 4, "calibration_rows": 0}
    settings = {"device": "cpu", "dtype": "float32", "fail_on_error": "100%"} | common | more | flat
    brought: dict[str, Any] = {"tenant": tenants} if any(tenants) else {}
    source = write_rows(tmp_path / "in.parquet", rows, **brought)
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(settings))

    expected = count(rows, tenants, flat)
    counters = json.loads((tmp_path / "out" / "run.json").read_bytes())["counters"]
    plan = json.loads((tmp_path / "out" / "plan" / "summary.json").read_bytes())
    assert counters["prefilled_tokens"] == expected.computed == counters["unique_tokens"]
    assert plan["unique_tokens"] == expected.computed == plan["documents"]["by_this_mode"]
    found = answers(tmp_path / "out")
    for (preamble, documents, question), told, row in zip(
        rows, expected.rows, found.iter_rows(named=True), strict=True
    ):
        if told is None:
            assert (row["error_type"], row["exact"]) == ("OverlongPrompt", None)
            continue
        text = "".join(documents)
        assert (row["repaired_tokens"], row["link_tokens"]) == told
        assert (row["documents"], row["document_tokens"]) == (len(documents), len(text))
        assert row["prompt_tokens"] == len(preamble + text + question)
    ran = found.filter(pl.col("status") == "ok")
    needed = ran.select(pl.sum("prompt_tokens", "repaired_tokens", "link_tokens")).row(0)
    assert sum(needed) - ran["cached_tokens"].sum() == expected.computed
    said = measure_documents(pl.scan_parquet(tmp_path / "out" / "data" / "*.parquet"))
    assert said is not None and said.rows == len(ran) == sum(
        told is not None for told in expected.rows
    )
    runs = [row for row, told in zip(rows, expected.rows, strict=True) if told is not None]
    assert said.uses == sum(len(documents) for _, documents, _ in runs)
    assert said.document_tokens == sum(len("".join(documents)) for _, documents, _ in runs)
    assert said.repaired_tokens == sum(told[0] for told in expected.rows if told is not None)
