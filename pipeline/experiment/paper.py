"""The recycling experiment from models to files: who is tested, on what, and what is written.

```
 results/  baseline.csv  recycled.csv  comparison.csv   prompt by prompt, both models
           depth.csv  neighbours.csv                    what the plots show
           summary.json  summary.md  depth.png  neighbours.png
```
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pipeline.audit.similarity import Encoder
from pipeline.errors import UsageError, install_extra
from pipeline.experiment.comparison import (
    PAPER,
    baseline_table,
    comparison_table,
    recycled_table,
    summary_table,
)
from pipeline.experiment.decode import GreedyDecoder
from pipeline.experiment.depth import DepthStudy, study_depth
from pipeline.experiment.experiment import Subject, run_experiment
from pipeline.experiment.kept_prompts import KeptPrompt, read_kept_prompts
from pipeline.experiment.neighbours import NeighbourRow, make_corpus, study_neighbours
from pipeline.experiment.pages import draw_recycling, summary_page
from pipeline.experiment.protocol import Protocol
from pipeline.experiment.retrieval import TextEncoder
from pipeline.experiment.subjects import Sizes, embedded_subject, timing_subject
from pipeline.model.machine import cpu_description
from pipeline.storage.durable import make_folder, replace_file, write_errors
from pipeline.storage.lock import FolderLock

Row = dict[str, Any]
Say = Callable[[str], None]
Prompts = tuple[list[KeptPrompt], list[KeptPrompt]]
"""To keep, and to ask."""
_STORES: Final = ".stores-"


@dataclass(frozen=True)
class PaperSettings:
    """`demo`: folder of the embedded model and prompts. `model`: to time, None: DialoGPT-medium if
    it is in the hub's cache, else its shape. `workloads`: folder of more prompts for the index."""

    demo: Path
    output: Path
    model: str | None = None
    tokenizer: str | None = None
    cache_prompts: Path | None = None
    test_prompts: Path | None = None
    workloads: Path | None = None
    protocol: Protocol = Protocol()
    depth_repeats: int = 30
    is_quick: bool = False


def run_paper(settings: PaperSettings, say: Say) -> dict[str, Any]:
    """Do it all and write the files; what `summary.json` holds.

    Raises InputError, ModelError, UsageError for what cannot work, FolderInUse, EngineError where
    recycled KV changed a token: then nothing is written.
    """
    sizes = Sizes.quick() if settings.is_quick else Sizes()
    prompts = (
        read_kept_prompts(settings.cache_prompts or settings.demo / "cache_prompts.csv"),
        read_kept_prompts(settings.test_prompts or settings.demo / "test_prompts.csv"),
    )
    encoder = _load_encoder()
    with write_errors(settings.output):
        make_folder(settings.output)
    lock = FolderLock(settings.output)
    try:
        for left in settings.output.glob(f"{_STORES}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=settings.output, prefix=_STORES) as stores:
            measured = _measure(settings, sizes, prompts, encoder, Path(stores), say)
        _write(settings.output, *measured)
    finally:
        lock.release()
    return measured[1]


def _measure(
    settings: PaperSettings,
    sizes: Sizes,
    prompts: Prompts,
    encoder: TextEncoder,
    stores: Path,
    say: Say,
) -> tuple[dict[str, list[Row]], dict[str, Any]]:
    """The tables by name, and the summary. `stores`: their folder, on the disk that is timed."""
    began, load = time.monotonic(), os.getloadavg()[0]
    tokenizer = settings.tokenizer or str(settings.demo / "demo_model")
    embedded = embedded_subject(settings.demo, sizes)
    timed = timing_subject(settings.model, tokenizer, sizes)
    tables: dict[str, list[Row]] = {}
    models: list[Row] = []
    for subject, note in (embedded, timed):
        say(f"{subject.name}: every prompt in every arm, {settings.protocol.repeats} times")
        folder = stores / str(len(models))
        rows = run_experiment(subject, prompts, encoder, settings.protocol, folder)
        for name, found in _tables(rows, subject, encoder).items():
            tables.setdefault(name, []).extend(found)
        arms = summary_table(rows, subject.read, encoder)
        models.append({"name": subject.name, "note": note, "arms": arms})
    depth = _study_depth(settings, sizes, timed[0], stores / "depth", say)
    say("nearest embeddings and longest prefixes, as the store grows")
    neighbours = _study_neighbours(settings, sizes, encoder, embedded[0])
    tables |= {"depth": depth.rows(), "neighbours": [asdict(row) for row in neighbours]}
    seconds = time.monotonic() - began
    return tables, {
        "how": _describe(settings, seconds, load),
        "paper": PAPER,
        "models": models,
        "depth": _describe_depth(timed[0].name, depth, _embed_s(tables["recycled"])),
        "neighbours": {"note": _NEIGHBOUR_NOTE, "rows": tables["neighbours"]},
        "seconds": seconds,
    }


def _study_depth(
    settings: PaperSettings, sizes: Sizes, timed: Subject, stores: Path, say: Say
) -> DepthStudy:
    say(f"{timed.name}: reuse depths of one long prompt, {settings.depth_repeats} times")
    repeats = replace(settings.protocol, repeats=settings.depth_repeats)
    subject = replace(timed, decoder=GreedyDecoder(timed.decoder.model, sizes.new_deep))
    return study_depth(subject, sizes.depth, repeats, stores)


_NEIGHBOUR_NOTE: Final = (
    "Stored: prompts, and prompts cut at ends of lines and sentences. Asked: prompts not stored. "
    "A query misses if some stored prompt shares more of its beginning than the nearest does."
)


def _tables(rows: Sequence[Any], subject: Subject, encoder: TextEncoder) -> dict[str, list[Row]]:
    return {
        "baseline": baseline_table(rows, subject.read),
        "recycled": recycled_table(rows, subject.read, encoder),
        "comparison": comparison_table(rows),
    }


def _load_encoder() -> TextEncoder:
    encoder = Encoder.load()
    if encoder is None:
        raise UsageError(
            f"there is no sentence encoder on this machine; {install_extra('encoder')}"
        )
    return encoder


def _study_neighbours(
    settings: PaperSettings, sizes: Sizes, encoder: TextEncoder, subject: Subject
) -> list[NeighbourRow]:
    files = [settings.demo / "prompts.parquet"]
    if settings.workloads is not None:
        files += sorted(settings.workloads.glob("*.parquet"))
    names = {path: path.stem for path in files if not path.stem.endswith("_messages")}
    texts = [prompt.text for path in names for prompt in read_kept_prompts(path)]
    corpus = make_corpus(texts, sizes.stored[-1], sizes.queries, settings.protocol.seed)
    return study_neighbours(encoder, subject.encode, corpus, sizes.stored)


def _describe(settings: PaperSettings, seconds: float, load: float) -> str:
    cpu = cpu_description().partition("\n")[0].partition(":")[2].strip() or "unknown CPU"
    quick = "Quick run: a tiny shape, no figure of it may be quoted. " if settings.is_quick else ""
    return (
        f"{quick}Medians of {settings.protocol.repeats} interleaved repeats after "
        f"{settings.protocol.warmups} or more discarded runs; fixed lengths, greedy, float32. "
        f"Lookup, embedding, load and transfer count. {cpu}, {os.cpu_count()} cores, "
        f"load {load:.1f} at the start (0: nothing else ran); {seconds:.0f} s in all."
    )


def _describe_depth(model: str, study: DepthStudy, embed_s: float) -> Row:
    rows = study.rows()
    warm = [row for row in rows if row["state"] == "warm"]
    deepest = max(warm, key=lambda row: row["depth"])
    sure = [row["depth"] for row in warm if row["depth"] and row["speedup_low"] > 0]
    encode_s = study.median("baseline", 0, "prefill_s")
    return {
        "model": model,
        "prompt_tokens": study.settings.prompt_tokens,
        "new_tokens": study.num_new,
        "repeats": deepest["repeats"],
        "encode_s": encode_s,
        "decode_s": study.median("baseline", 0, "decode_s"),
        "alpha": study.alpha(),
        "alpha_bound": encode_s / study.median("baseline", 0),
        "break_even": {
            "warm": study.break_even(),
            "cold": study.break_even("load-cold"),
            "embedding": study.break_even(extra_s=embed_s),
        },
        "least_sure_depth": min(sure, default=None),
        "deepest": deepest
        | {"off_percent": 100 * (deepest["ratio"] / deepest["predicted_ratio"] - 1)},
        "rows": rows,
    }


def _embed_s(recycled: Sequence[Row]) -> float:
    """What one sentence embedding took, in the median of all prompts."""
    known = sorted(row["embed_s"] for row in recycled if row["arm"] == "embedding")
    return float(known[len(known) // 2])


def _write(folder: Path, tables: Mapping[str, list[Row]], summary: Mapping[str, Any]) -> None:
    for name, rows in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_file(folder / f"{name}.csv", text.getvalue().encode())
    replace_file(folder / "summary.json", json.dumps(summary, indent=1).encode())
    replace_file(folder / "summary.md", summary_page(summary).encode())
    draw_recycling(summary, folder)
