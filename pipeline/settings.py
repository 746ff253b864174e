"""What a person can choose: one small frozen record per stage, validated once, then passed on.

Field names are unique over all sections and equal the command's flags, so that a flat mapping
(flags, or a YAML file) can be dealt out to the sections by `JobSettings.from_flat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.constraint_settings import check_constraints
from pipeline.conversation_settings import ConversationSettings, check_conversations
from pipeline.costs import CostSettings
from pipeline.errors import UsageError
from pipeline.forms import (
    Duration,
    RowLimit,
    Section,
    Share,
    Size,
    named_values,
    parse_duration,
    rows_of,
    say_fault,
    unknown_name,
)
from pipeline.prompt_settings import ReadSettings, TokenSettings
from pipeline.reuse_settings import ReuseSettings, check_reuse
from pipeline.sampling_settings import SamplingSettings
from pipeline.scoring_settings import ScoringSettings, check_scoring
from pipeline.store_settings import ObjectStoreSettings


class PlanSettings(Section):
    """How the file becomes a plan. `min_prefix_tokens`: shorter shared spans get no KV range of
    their own in decode; their states are still computed once and then copied. `plan_memory`: bytes
    that planning may take, which change its time and nothing else. `shard` of `num_shards`: only
    these groups of the file, see `plan/shards.py`."""

    min_prefix_tokens: int = Field(default=16, ge=1)
    plan_memory: Size = Field(default=2 << 30, ge=1)
    num_shards: int = Field(default=1, ge=1, le=10_000)
    shard: int | None = Field(default=None, ge=0)
    on_overlong: Literal["error", "truncate-left", "keep"] = "error"

    @model_validator(mode="after")
    def _is_a_shard(self) -> Self:
        last = self.num_shards - 1
        if self.shard is None and last:
            raise ValueError(
                f"--num-shards {self.num_shards} cuts the job, so say which part to do: "
                f"--shard, from 0 to {last}"
            )
        if self.shard is not None and self.shard > last:
            raise ValueError(
                f"there is no --shard {self.shard} of --num-shards {self.num_shards}; "
                f"shards are numbered from 0 to {last}"
            )
        return self

    @property
    def shard_number(self) -> int:
        """Which of the shards; 0 where there is only one."""
        return self.shard or 0


class ModelSettings(Section):
    """Which model runs, and on what. `model` is a folder or a hub id.

    `engine_options`: arguments of vLLM's `LLM`, like `{"tensor_parallel_size": "2"}`; no other
    engine has any. `weights`: "int8" holds those of linear layers in int8, see `model/int8.py`.
    """

    model: str
    revision: str | None = None
    engine: Literal["prefix", "vllm", "naive", "echo"] = "prefix"
    engine_options: dict[str, str] = {}
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    weights: Literal["auto", "int8"] = "auto"
    device: str = "auto"

    @field_validator("engine_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, str]:
        options = named_values(value)
        return {str(name).strip().replace("-", "_"): str(text) for name, text in options}

    @model_validator(mode="after")
    def _has_options(self) -> Self:
        if self.engine_options and self.engine != "vllm":
            raise ValueError(f"engine-options are for --engine vllm, and not for {self.engine}")
        if self.weights != "auto" and self.engine not in ("prefix", "naive"):
            raise ValueError(
                f"weights {self.weights} is for --engine prefix or naive, and not for {self.engine}"
            )
        return self


class EngineSettings(Section):
    """How the device runs; none of this may change an answer, but `fidelity` its last bit.

    `kv_budget` in bytes; `spill_memory`: of the host, for conversations that give way to others
    (None: a quarter of what is free). `kernels`: "auto" is the fastest that the machine has,
    "torch" nothing private or compiled. `fidelity`: "strict" gives a row the same bits whatever
    runs beside it. `busy_device`: what to do while another job holds the device. `threads`: that
    compute on a CPU; None: one a core, and fewer while other programs need cores.
    """

    max_batch_tokens: int = Field(default=4096, ge=16)
    max_rows: int = Field(default=256, ge=1)
    kv_budget: Annotated[Size, Field(ge=1)] | None = None
    spill_memory: Annotated[Size, Field(ge=0)] | None = None
    kernels: Literal["auto", "torch"] = "auto"
    fidelity: Literal["default", "strict"] = "default"
    busy_device: Literal["wait", "fail", "share"] = "wait"
    threads: int | None = Field(default=None, ge=1)


class WriteSettings(Section):
    """How the output is cut into parts and when the job counts as failed or stops by itself.

    `explode`: a row of several samples is as many rows. `stall_timeout`: seconds in which nothing
    moves after which it is ended; 0: never.
    """

    rows_per_part: int = Field(default=1000, ge=1)
    preserve_order: bool = False
    explode: bool = False
    fail_on_error: RowLimit = "1%"
    time_budget: Duration | None = None
    stall_timeout: Duration = 1800.0

    @field_validator("stall_timeout", mode="before")
    @classmethod
    def _seconds_or_never(cls, value: str | float) -> float:
        return 0.0 if str(value).strip().lower() in ("none", "never") else parse_duration(value)

    def allowed_failures(self, num_rows: int) -> int:
        """The most rows that may fail."""
        return int(rows_of(self.fail_on_error, num_rows))


class FleetSettings(Section):
    """Where the sequences are computed; decides no answer. Workers and address are Ray's alone."""

    executor: Literal["local", "ray"] = "local"
    num_workers: int | None = Field(default=None, ge=1)
    ray_address: str | None = None

    @model_validator(mode="after")
    def _has_a_fleet(self) -> Self:
        if self.executor == "local" and (self.num_workers or self.ray_address):
            raise ValueError("num-workers and ray-address belong to --executor ray; say that too")
        return self


class RecycleSettings(Section):
    """Where KV states are kept from one run to the next. `kv_store_budget` in bytes."""

    kv_store: Path | None = None
    kv_store_budget: Size = Field(default=8 << 30, ge=1)


class MonitorSettings(Section):
    """Who may watch a running job: Prometheus, by HTTP or by a file for node_exporter.

    `metrics_port`: `9464`, which this machine alone can ask, or `0.0.0.0:9464`.
    """

    metrics_port: str | None = None
    metrics_file: Path | None = None

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _address(cls, value: object) -> str | None:
        if value is None:
            return None
        match = re.fullmatch(r"(?:(.+):)?(\d{1,5})", str(value).strip())
        if match is None or not 0 < int(match[2]) < 2**16:
            raise ValueError(f"{value!r} is not a port like 9464 or 0.0.0.0:9464")
        return str(value).strip()

    def metrics_address(self) -> tuple[str, int]:
        """(host, port) of `metrics_port`, which is not None."""
        host, _, port = (self.metrics_port or "").rpartition(":")
        return host.strip("[]") or "127.0.0.1", int(port)


class AuditSettings(Section):
    """How many rows are audited and what they must show. `audit_sample`: `200` rows or `1%`."""

    audit_sample: RowLimit = "1%"
    audit_min_exact: Share = 1.0
    audit_free_running: int = Field(default=30, ge=0)
    audit_arms: int = Field(default=16, ge=0)
    audit_encoder: str | None = None

    def num_rows(self, total: int) -> int:
        """Rows asked for out of `total`; rows that cover prefix groups may come on top."""
        return min(total, math.ceil(rows_of(self.audit_sample, total)))


class JobSettings(BaseModel):
    """The whole job, section by section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelSettings
    read: ReadSettings = ReadSettings()
    tokens: TokenSettings = TokenSettings()
    sampling: SamplingSettings = SamplingSettings()
    plan: PlanSettings = PlanSettings()
    engine: EngineSettings = EngineSettings()
    reuse: ReuseSettings = ReuseSettings()
    conversations: ConversationSettings = ConversationSettings()
    scoring: ScoringSettings = ScoringSettings()
    write: WriteSettings = WriteSettings()
    fleet: FleetSettings = FleetSettings()
    recycle: RecycleSettings = RecycleSettings()
    monitor: MonitorSettings = MonitorSettings()
    audit: AuditSettings = AuditSettings()
    store: ObjectStoreSettings = ObjectStoreSettings()
    cost: CostSettings = CostSettings()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        check_reuse(self)
        check_conversations(self)
        check_scoring(self)
        check_constraints(self)
        return self

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> JobSettings:
        """Deal a flat mapping of flag names out to the sections; None means "not said".

        Raises UsageError naming the first field that is unknown or out of range.
        """
        sections: dict[str, dict[str, Any]] = {name: {} for name in cls.model_fields}
        check_known(flat)
        for key, value in flat.items():
            field = key.replace("-", "_")
            if value is not None:
                sections[_HOMES[field]][field] = value
        if "model" not in sections["model"]:
            raise UsageError("no model was named; give --model FOLDER or a hub id like org/name")
        try:
            return cls.model_validate(sections)
        except ValidationError as error:
            raise UsageError(say_fault(error, _PRIVATE, SECTIONS)) from None


_PRIVATE = ("store", "system_prompt", "json_schema", "grammar", "regex")
"""Never quoted: secrets, texts of prompts, and what fills a screen."""
SECTIONS: dict[str, Any] = {n: field.annotation for n, field in JobSettings.model_fields.items()}
_HOMES = {key: name for name, section in SECTIONS.items() for key in section.model_fields}


def check_known(keys: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raises UsageError for a key that is no setting; `others`: names that may be meant as well."""
    for key in keys:
        if key.replace("-", "_") not in _HOMES:
            names = {*_HOMES, *others}
            raise UsageError(unknown_name(key, names, "coppice run --help lists them"))
