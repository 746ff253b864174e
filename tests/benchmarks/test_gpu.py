"""The script for a card, on a CPU: no stage stops a later one; floors by hand; a rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.carried import MOST_BYTES, size_of, tracked_files
from benchmarks.gpu.plan import GROUPS, NOT_DRY, Stage, choose
from benchmarks.gpu.roofline import (
    FUSED,
    H100,
    UNFUSED,
    Card,
    Part,
    Rows,
    attention,
    byte_floor_s,
    merged_products,
    predict,
    products,
    step_floor_s,
    unshared_attention,
)
from benchmarks.gpu.watch import Journal, Watch
from benchmarks.gpu.workload import GPU_SHAPES
from benchmarks.limit import Dimensions

SMALL = Dimensions(hidden=8, intermediate=16, layers=2, heads=4, kv_heads=2, vocabulary=10)
ROWS = Rows(rows=3, shared=100, own=5)
LONG = ("engine:1B", "job:1B")  # half of a rehearsal; each runs decode steps, as step:1B does
CHILD = """
import json, os, sys, time
for name in sys.argv[1:]:
    print(json.dumps({"begins": name}), flush=True)
    if name == "hangs":
        os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "60")
        time.sleep(60)
    if name == "dies":
        print("a word about it", file=sys.stderr)
        os._exit(7)
    if name == "errs":
        print(json.dumps({"stage": name, "failed": "ValueError"}), flush=True)
    print("what some library says")
    print(json.dumps({"stage": name, "figure": os.getpid()}), flush=True)
    lost = {"leaves": True} if name == "loses" else {}
    print(json.dumps({"stage": name, "ends": name} | lost), flush=True)
    if lost:
        sys.exit(1)
"""


def watched(tmp_path: Path, groups: list[list[str]], seconds: float = 60.0) -> tuple[bool, Any]:
    """Whether all went well, and the rows on the disk, for stages with a box of one second."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    journal = Journal(str(tmp_path / "rows.jsonl"))
    watch = Watch(
        lambda names, left_s: [sys.executable, str(script), *names],
        journal,
        time.monotonic() + seconds,
    )
    is_whole = watch.run([[Stage(name, 1.0, 0.5) for name in group] for group in groups])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    return is_whole, rows


def test_stages_that_hang_die_or_lose_the_device_stop_no_later_one(tmp_path: Path) -> None:
    begin = time.monotonic()
    is_whole, rows = watched(tmp_path, [["a", "hangs", "b", "dies", "c", "loses", "d"], ["e"]])
    assert not is_whole and time.monotonic() - begin < 20
    measured = [row["stage"] for row in rows if "figure" in row]
    assert measured == ["a", "b", "c", "loses", "d", "e"]
    failed = {row["stage"]: row for row in rows if "failed" in row}
    assert failed["hangs"]["failed"] == "its time was over"
    assert failed["dies"]["failed"] == "its process left: 7"
    assert failed["dies"]["said"] == ["a word about it"]
    assert set(failed) == {"hangs", "dies"}
    process = {row["stage"]: row["figure"] for row in rows if "figure" in row}
    assert process["c"] == process["loses"] != process["d"] != process["e"]
    assert not sleeping(), "what a stage has started outlives it"


def sleeping() -> bool:
    said = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return "sleep 60" in said.splitlines()


def test_an_error_of_a_stage_is_a_row_and_its_group_goes_on(tmp_path: Path) -> None:
    is_whole, rows = watched(tmp_path, [["a", "errs", "b"]])
    assert not is_whole
    assert [row["stage"] for row in rows if "figure" in row] == ["a", "errs", "b"]
    assert len({row["figure"] for row in rows if "figure" in row}) == 1


def test_what_would_begin_too_late_is_told_and_does_not_begin(tmp_path: Path) -> None:
    is_whole, rows = watched(tmp_path, [["a"], ["b"]], seconds=0.2)
    assert not is_whole
    assert [row["skipped"] for row in rows] == ["no time is left"] * 2


def test_all_stages_fit_into_the_time_of_a_card() -> None:
    """Fifteen minutes, of which some go with starting the machine and bringing the files."""
    stages = [stage for group in GROUPS for stage in group]
    assert sum(stage.least_s for stage in stages) < 520
    assert len({stage.name for stage in stages}) == len(stages)
    assert [s.name for s in choose(["job:8B", "env"], dry=False)[1]] == ["job:8B"]
    (dry,) = choose(None, dry=True)
    assert {s.name for s in dry} == {s.name for s in stages} - NOT_DRY
    with pytest.raises(ValueError, match="no stage"):
        choose(["layer:2B"], dry=False)


def test_attention_of_a_layer_counted_by_hand() -> None:
    """Heads of 2 numbers; K and V of 2 heads: 8 numbers, 16 bytes a token. A pair: 2 products of 8
    multiplications and additions."""
    shared, own = attention(SMALL, ROWS)
    assert shared == Part(100 * 16, 3 * 100 * 32)
    assert own == Part(15 * 16, 15 * 32)
    assert unshared_attention(SMALL, ROWS) == Part(315 * 16, 315 * 32)


def test_a_step_counted_by_hand() -> None:
    """A layer: q, o 8x8; k, v 8x4; gate, up, down 8x16. A product reads its weight and rows, and
    writes rows."""
    found = products(SMALL, 3)
    assert len(found) == 2 * 7 + 1
    assert found[0] == Part(2 * (64 + 3 * 16), 2 * 3 * 64)
    assert found[-1] == Part(2 * (80 + 3 * 18), 2 * 3 * 80)
    slow = Card(bytes_per_s=1.0, flop_per_s=1e30)
    weights = 2 * (2 * 576 + 80)
    kv = (100 + 15) * 16 * 2
    assert byte_floor_s(SMALL, ROWS, slow) == weights + kv
    rows_of_products = 2 * 3 * (2 * (2 * 16 + 2 * 12 + 3 * 24) + 18)
    assert step_floor_s(SMALL, ROWS, slow) == weights + kv + rows_of_products
    fast = Card(bytes_per_s=1e30, flop_per_s=1.0)
    pairs = 2 * (300 + 15) * 32
    assert step_floor_s(SMALL, ROWS, fast) == 2 * 3 * (2 * 576 + 80) + pairs


def test_a_prediction_is_its_parts_and_never_below_the_floor() -> None:
    parts = predict(SMALL, ROWS, H100, FUSED)
    step = parts.pop("step_s")
    assert step == pytest.approx(sum(parts.values()))
    assert step > step_floor_s(SMALL, ROWS, H100)
    assert parts["starts_s"] == pytest.approx((2 * 11 + 18) * 1.3e-6)
    numbers = 8 * 8 + 2 * 16 + 3 * 16
    assert parts["between_s"] == pytest.approx(2 * 3 * numbers * 2 / 5.5e12)


def test_merged_products_read_what_they_share_once() -> None:
    apart, merged = products(SMALL, 3), merged_products(SMALL, 3)
    assert sum(p.flop for p in merged) == sum(p.flop for p in apart)
    saved = sum(p.bytes for p in apart) - sum(p.bytes for p in merged)
    assert saved == 2 * 3 * 8 * 3 * 2, (
        "two layers: three rows of 8 numbers, twice for Q K V, once more"
    )


@pytest.mark.parametrize(("shape", "share"), [("1B", 0.55), ("8B", 0.75)])
def test_a_step_of_256_rows_is_predicted_to_come_near_its_floor(shape: str, share: float) -> None:
    model, rows = Dimensions.of(GPU_SHAPES[shape]), Rows(256, 2048, 192)
    floor = step_floor_s(model, rows, H100)
    fused, before = (predict(model, rows, H100, engine)["step_s"] for engine in (FUSED, UNFUSED))
    assert floor / fused >= share > floor / before


@pytest.mark.parametrize("left_out", [LONG, pytest.param((), marks=pytest.mark.slow)])
def test_the_script_is_rehearsed(tmp_path: Path, left_out: tuple[str, ...]) -> None:
    """Every stage but the two that are commands of their own, on a CPU under the interpreter."""
    pytest.importorskip("triton", reason="triton is not installed; it comes for Linux alone")
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)]
    stages = [s.name for s in choose(None, dry=True)[0] if s.name not in left_out]
    command += ["--deadline", "280", "--stages", ",".join(stages)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert not [row for row in rows if "failed" in row or "skipped" in row]
    assert ended(rows) == stages
    layers = [row for row in rows if row["stage"] == "layer:1B" and "prefix" in row]
    assert all(row["floor_us"] >= row["byte_floor_us"] > 0 for row in layers)
    steps = [row for row in rows if row["stage"] == "step:1B" and "prefix" in row]
    assert steps and all(row["same_tokens"] and row["share_of_floor"] > 0 for row in steps)


def ended(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [row["ends"] for row in rows if "ends" in row]


def test_what_is_carried_is_added_up(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "a.whl").write_bytes(b"x" * 10)
    (tmp_path / "alone").write_bytes(b"x" * 5)
    (tmp_path / "wheels" / "link").symlink_to(tmp_path / "alone")
    assert size_of([tmp_path / "wheels", tmp_path / "alone"]) == 15
    tracked = size_of(tracked_files())
    assert 8 << 20 < tracked < MOST_BYTES * 0.4, "wheels and Triton's cache need 41 MiB"
