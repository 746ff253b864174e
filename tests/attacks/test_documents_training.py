"""Adapters that cannot be trained, or not be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.segment_training import train_link_adapter, train_packet_adapter
from pipeline.segments.train_links import LinkSettings
from pipeline.segments.train_packet import PacketSettings
from pipeline.settings import JobSettings
from tests.job.test_documents import Row, write_rows
from tests.tiny_job import write_model

PACKETS = PacketSettings(2, rows=4, held_out=2, epochs=1, batch=2, max_new_tokens=2)
LINKS = LinkSettings(2, is_frozen=True, held_out=2, steps=3, batch=2, max_new_tokens=2)
ROWS: list[Row] = [("p ", ["aa bb", "cc dd"], f"q{number}") for number in range(6)]


def train(settings: Any, source: Path, output: Path, model: Path) -> None:
    job = JobSettings.from_flat({"model": str(model), "reuse": "concat", "device": "cpu"})
    make: Any = train_packet_adapter if isinstance(settings, PacketSettings) else train_link_adapter
    make(str(source), output, job, settings, lambda line: None)


@pytest.mark.fault(
    "prompts in segments",
    injected="training with a learning rate of nan, below 0 or beyond 1; into a folder that cannot "
    "be written; of a model whose logits are not finite",
    outcome="refused before the model is loaded, exit code 2; what is not finite is never written",
)
@pytest.mark.parametrize("settings", [PACKETS, LINKS], ids=["packet", "links"])
def test_what_cannot_be_learned_or_kept_is_refused(
    tmp_path: Path, model_folder: Path, settings: Any
) -> None:
    """Seen red: an error of torch, exit 1; a folder found bad after all steps; nan in the card."""
    source, output = write_rows(tmp_path / "in.parquet", ROWS), tmp_path / "adapter"
    for rate in (float("nan"), -1.0, 0.0, 1e38, float("inf")):
        changed = type(settings)(**vars(settings) | {"learning_rate": rate})
        with pytest.raises(UsageError, match="--learning-rate must lie above 0"):
            train(changed, source, output, tmp_path / "no model")
    with pytest.raises(UsageError, match="choose another -o"):
        train(settings, source, source / "adapter", model_folder)
    wild = write_model(tmp_path / "wild", sharpness=1e30)
    with pytest.raises(UsageError, match="not finite, so no adapter is written"):
        train(settings, source, output, wild)
    assert not output.exists()
