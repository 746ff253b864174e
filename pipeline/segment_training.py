"""From a table of prompts in segments to an adapter in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.job.job import Job, open_job
from pipeline.model.adapter import CARD, Card, save_adapter
from pipeline.model.identity import identify_model
from pipeline.settings import JobSettings
from pipeline.storage.targets import folder_to_write

if TYPE_CHECKING:
    from pipeline.segments.lessons import TrainingRow
    from pipeline.segments.train_links import Linked, LinkSettings
    from pipeline.segments.train_packet import PacketSettings, Trained

Say = Callable[[str], None]
_MODEL = "model"
"""Below the adapter's folder: the model that was trained with its links."""


def train_packet_adapter(
    input: str, output: Path, job_settings: JobSettings, settings: PacketSettings, say: Say
) -> Card:
    """Train soft tokens around documents; writes the adapter. Raises CoppiceError."""
    job = _open(input, output, job_settings, settings.learning_rate)
    rows = read_rows(job, settings.rows + settings.held_out, say)
    from pipeline.model.model import load_model
    from pipeline.segments.train_packet import train_packet

    loaded = load_model(job_settings.model)
    done = train_packet(loaded.model, rows, settings, say)
    _check_learned(done)
    training = asdict(settings) | {"best_epoch": done.epochs}
    card = _card(done, "packet", job.model_identity, training)
    save_adapter(output, card, done.rows.numpy())
    return card


def train_link_adapter(
    input: str, output: Path, job_settings: JobSettings, settings: LinkSettings, say: Say
) -> Card:
    """Train link tokens; unless the model is frozen it is trained in float32 and written below the
    adapter's folder. Raises CoppiceError."""
    job = _open(input, output, job_settings, settings.learning_rate)
    rows = read_rows(job, None, say)
    from pipeline.model.model import load_model
    from pipeline.segments.train_links import train_links

    model_settings = job_settings.model
    if not settings.is_frozen:
        model_settings = model_settings.model_copy(update={"dtype": "float32"})
    model = load_model(model_settings).model
    done = train_links(model, rows, settings, say)
    _check_learned(done)
    identity = job.model_identity
    if not settings.is_frozen:
        folder = output / _MODEL
        model.save_pretrained(folder)
        _copy_tokenizer(model_settings.model, model_settings.revision, folder)
        identity = identify_model(model_settings.model_copy(update={"model": str(folder)}))
        say(f"run jobs with --model {folder}: it is another model than it was")
    card = _card(done, "kvlink", identity, asdict(settings), done.drift)
    save_adapter(output, card, done.rows.numpy())
    return card


def read_rows(job: Job, most: int | None, say: Say) -> list[TrainingRow]:
    """The first rows with documents, as token ids; those that cannot run are left out."""
    from pipeline.segments.lessons import TrainingRow

    preparation, rows, left_out = job.preparation(), [], 0
    for batch in job.source.iter_prompts():
        prepared = preparation.prepare(batch)
        ends = np.cumsum(prepared.lengths)
        left_out += len(prepared.rejected)
        for index, parts in sorted(prepared.segments.items()):
            ids = prepared.flat[ends[index] - sum(parts) : ends[index]].astype(np.int64)
            if len(parts) > 2:
                rows.append(TrainingRow(np.split(ids, np.cumsum(parts)[:-1]), []))
        if most is not None and len(rows) >= most:
            break
    if left_out:
        say(f"{left_out:,} rows cannot run and are left out; coppice validate says why")
    return rows[:most]


def _open(input: str, output: Path, settings: JobSettings, learning_rate: float) -> Job:
    """Raises UsageError where nothing could be learned, or what is learned could not be kept."""
    if not 0 < learning_rate <= 1:
        raise UsageError(f"--learning-rate must lie above 0, and at most at 1, not {learning_rate}")
    if (output / CARD).exists():
        raise UsageError(f"{output} holds an adapter already; name another folder, or remove it")
    why_not = folder_to_write(output)[1]
    if why_not:
        raise UsageError(f"cannot write to {output}: {why_not}; choose another -o")
    return open_job(input, settings)


def _check_learned(done: Trained | Linked) -> None:
    """Raises UsageError where numbers have grown beyond all bounds."""
    if not (done.rows.isfinite().all() and np.isfinite(done.after.kl)):
        raise UsageError(
            "what was learned is not finite, so no adapter is written; choose a smaller "
            "--learning-rate, or a model whose own logits are finite"
        )


def _card(
    done: Trained | Linked, mode: Any, identity: dict[str, Any], training: dict[str, Any],
    drift: float | None = None,
) -> Card:  # fmt: skip
    from pipeline.segments.lessons import document_tokens, fingerprint

    return Card(
        model=identity,
        mode=mode,
        soft_tokens=training.pop("soft_tokens"),
        data_sha256=fingerprint(done.used),
        agreement=done.after.agreement,
        kl=done.after.kl,
        kl_untrained=done.before.kl,
        document_tokens=document_tokens(done.used),
        most_documents=max(len(row.segments) - 2 for row in done.used),
        seed=training.pop("seed"),
        training=training,
        drift=drift,
    )


def _copy_tokenizer(model: str, revision: str | None, folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(model, revision=revision).save_pretrained(folder)
