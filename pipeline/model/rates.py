"""How fast this machine last ran a model: what the estimated time of a plan rests on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from pipeline.errors import CoppiceError
from pipeline.model.machine import cpu_description, private_cache
from pipeline.settings import ModelSettings
from pipeline.storage.durable import replace_file

_LEAST_TOKENS = 1000  # of either kind: a shorter run measures its own start


_Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Rates:
    """Tokens per second of device time, and the day on which they were measured. `saves_from`: as
    of `EngineCapabilities`, where a job with conversations ran."""

    prefill_tokens_per_s: _Rate
    decode_tokens_per_s: _Rate
    measured_on: str
    saves_from: int | None = None

    def estimate(self, prefill_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Seconds that a job of so many tokens takes; answers may end before `new_tokens`."""
        return {
            "prefill_s": prefill_tokens / self.prefill_tokens_per_s,
            "decode_s": new_tokens / self.decode_tokens_per_s,
            "measured_on": self.measured_on,
        }


_SCHEMA = TypeAdapter(Rates)


def remember_rates(
    settings: ModelSettings,
    identity: Mapping[str, Any],
    counters: Mapping[str, float],
    saves_from: int | None = None,
) -> None:
    """Keep the rates of a run for plans to come; a cache that cannot be written is no error.

    `identity`: as of `identify_model`, which reads the model's files.
    """
    prefilled, generated = counters["prefilled_tokens"], counters["generated_tokens"]
    if min(prefilled, generated) < _LEAST_TOKENS:
        return
    today = datetime.now(UTC).date().isoformat()
    if saves_from is None and (before := recall_rates(settings, identity)) is not None:
        saves_from = before.saves_from
    rates = Rates(
        prefilled / counters["prefill_s"], generated / counters["decode_s"], today, saves_from
    )
    with suppress(OSError, CoppiceError):
        replace_file(_path(settings, identity), _SCHEMA.dump_json(rates))


def recall_rates(settings: ModelSettings, identity: Mapping[str, Any]) -> Rates | None:
    """What was kept for this model, type and device, or None. `identity`: as above."""
    try:
        return _SCHEMA.validate_json(_path(settings, identity).read_bytes(), strict=True)
    except (OSError, ValueError, CoppiceError):
        return None


def _path(settings: ModelSettings, identity: Mapping[str, Any]) -> Path:
    """Named by all that the rates depend on. Raises OSError."""
    parts = (
        identity["model"], identity["revision"], settings.dtype, settings.weights,
        settings.device, settings.engine, cpu_description(), os.cpu_count(),
    )  # fmt: skip
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return private_cache("rates") / f"{digest}.json"
