"""What a person can choose: one small frozen record per stage, validated once, then passed on.

Field names are unique over all sections and equal the command's flags, so that a flat mapping
(flags, or a YAML file) can be dealt out to the sections by `JobSettings.from_flat`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from pipeline.errors import UsageError
from pipeline.generation import read_generation_options
from pipeline.records import MOST_NEW_TOKENS

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
STORAGE_SECRETS = ("access_key_id", "secret_access_key", "session_token")
STORAGE_OPTIONS = ("endpoint_url", "region", "anonymous", *STORAGE_SECRETS)


def parse_bytes(text: str | int) -> int:
    """`8GiB`, `500MB`, `1024` -> bytes. Raises ValueError for anything else."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([kmg]i?)?b?\s*", str(text).lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 8GiB, 500MB or 1048576")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_seconds(text: str | float) -> float:
    """`4h`, `90m`, `30` -> seconds. Raises ValueError for anything else."""
    match = re.fullmatch(rf"\s*({_NUMBER})\s*([smhd])?\s*", str(text).lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 4h, 90m or 3600")
    return float(match[1]) * _SECONDS[match[2] or ""]


def parse_storage_options(value: object) -> dict[str, str]:
    """`["region=eu-west-1"]`, one such text, or a mapping, as a mapping; later ones win.

    `aws_region` is `region`, and so on. Raises ValueError, which never quotes a value: it may be
    a secret.
    """
    texts = [value] if isinstance(value, str) else value
    pairs = list(texts.items()) if isinstance(texts, dict) else _split_options(texts)
    options: dict[str, str] = {}
    for key, content in pairs:
        name = str(key).strip().lower().replace("-", "_").removeprefix("aws_")
        if name not in STORAGE_OPTIONS:
            raise ValueError(f"there is no option {key!r}; known are {', '.join(STORAGE_OPTIONS)}")
        options[name] = str(content).lower() if isinstance(content, bool) else str(content)
    return options


def _split_options(texts: object) -> list[tuple[str, str]]:
    if not isinstance(texts, list | tuple):
        raise ValueError("write it as name=value")
    pairs = [str(text).partition("=") for text in texts]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write it as name=value, like region=eu-west-1")
    return [(name, content) for name, _, content in pairs]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReadSettings(_Section):
    """Which rows and columns are read. A column left at None is found by its usual name.

    `template`: a Jinja file that makes the prompt of a row's columns, instead of a ready one.
    `reorder_fields`: list its `fields(...)` in each row in the order in which rows share most.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    template: Path | None = None
    reorder_fields: bool = False
    id_column: str | None = None
    limit: int | None = Field(default=None, ge=1)


class TokenSettings(_Section):
    """How a row becomes text, and text token ids."""

    system_prompt: str | None = None
    chat_template: Path | None = None
    apply_chat_template: bool = False
    parse_special_tokens: bool = False


class PlanSettings(_Section):
    """How the file becomes a plan. `min_prefix_tokens`: shorter shared spans get no KV range of
    their own in decode; their states are still computed once and then copied. `plan_memory`: bytes
    that planning may take, which change its time and nothing else. `shard` of `num_shards`: only
    these groups of the file, see `plan/shards.py`."""

    min_prefix_tokens: int = Field(default=16, ge=1)
    plan_memory: int = Field(default=2 << 30, ge=1)
    num_shards: int = Field(default=1, ge=1, le=10_000)
    shard: int = Field(default=0, ge=0)
    on_overlong: Literal["error", "truncate-left", "keep"] = "error"

    @field_validator("plan_memory", mode="before")
    @classmethod
    def _bytes(cls, value: str | int) -> int:
        return parse_bytes(value)

    @model_validator(mode="after")
    def _is_a_shard(self) -> Self:
        if self.shard >= self.num_shards:
            raise ValueError(
                f"shards are numbered from 0 to num-shards - 1 = {self.num_shards - 1}"
            )
        return self


class SamplingSettings(_Section):
    """Defaults for rows without sampling fields; None means: as the model's repository says.

    `top_k` 0 or -1: all tokens. `generation_options`: fields of transformers' `GenerationConfig`
    instead of the model's own, like `{"repetition_penalty": 1.0}`.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=MOST_NEW_TOKENS)
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    generation_options: dict[str, Any] = {}

    @field_validator("stop", mode="before")
    @classmethod
    def _texts(cls, value: object) -> object:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
            raise ValueError("give a text that is not empty, or a list of them")
        return tuple(texts)

    @field_validator("generation_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, Any]:
        texts = [value] if isinstance(value, str) else value
        return read_generation_options(
            texts if isinstance(texts, dict) else dict(_split_options(texts))
        )


class ModelSettings(_Section):
    """Which model runs, and on what. `model` is a folder or a hub id.

    `engine_options`: arguments of vLLM's `LLM`, like `{"tensor_parallel_size": "2"}`; no other
    engine has any.
    """

    model: str
    revision: str | None = None
    engine: Literal["prefix", "vllm", "naive", "echo"] = "prefix"
    engine_options: dict[str, str] = {}
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    @field_validator("engine_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, str]:
        texts = [value] if isinstance(value, str) else value
        pairs = texts.items() if isinstance(texts, dict) else _split_options(texts)
        return {str(name).strip().replace("-", "_"): str(text) for name, text in pairs}

    @model_validator(mode="after")
    def _has_options(self) -> Self:
        if self.engine_options and self.engine != "vllm":
            raise ValueError(f"engine-options are for --engine vllm, and not for {self.engine}")
        return self


class EngineSettings(_Section):
    """How the device runs; none of this may change an answer, but `fidelity` its last bit.

    `kv_budget` in bytes. `kernels`: "auto" is the fastest that the machine has, "torch" nothing
    private or compiled. `fidelity`: "strict" gives a row the same bits whatever runs beside it.
    `busy_device`: what to do while another job holds the device.
    """

    max_batch_tokens: int = Field(default=4096, ge=16)
    max_rows: int = Field(default=256, ge=1)
    kv_budget: int | None = Field(default=None, ge=1)
    kernels: Literal["auto", "torch"] = "auto"
    fidelity: Literal["default", "strict"] = "default"
    busy_device: Literal["wait", "fail", "share"] = "wait"

    @field_validator("kv_budget", mode="before")
    @classmethod
    def _bytes(cls, value: str | int | None) -> int | None:
        return None if value is None else parse_bytes(value)


class WriteSettings(_Section):
    """How the output is cut into parts and when the job counts as failed or stops by itself.

    `stall_timeout`: seconds in which nothing moves after which it is ended; 0: never.
    """

    rows_per_part: int = Field(default=1000, ge=1)
    preserve_order: bool = False
    fail_on_error: str = "0.01"
    time_budget: float | None = None
    stall_timeout: float = 1800.0

    @field_validator("time_budget", mode="before")
    @classmethod
    def _seconds(cls, value: str | float | None) -> float | None:
        return None if value is None else parse_seconds(value)

    @field_validator("stall_timeout", mode="before")
    @classmethod
    def _seconds_or_never(cls, value: str | float) -> float:
        return 0.0 if str(value).strip().lower() == "none" else parse_seconds(value)

    @field_validator("fail_on_error", mode="before")
    @classmethod
    def _limit(cls, value: object) -> str:
        text = str(value)
        if not re.fullmatch(r"\d+|[01]?\.\d+|1\.0*", text):
            raise ValueError(
                f"{text!r} is neither a fraction like 0.01 nor a number of rows like 50"
            )
        return text

    def allowed_failures(self, num_rows: int) -> int:
        """The most rows that may fail: a fraction has a dot, a count has none."""
        limit = self.fail_on_error
        return int(float(limit) * num_rows) if "." in limit else int(limit)


class FleetSettings(_Section):
    """Where the sequences are computed; decides no answer. Workers and address are Ray's alone."""

    executor: Literal["local", "ray"] = "local"
    num_workers: int | None = Field(default=None, ge=1)
    ray_address: str | None = None

    @model_validator(mode="after")
    def _has_a_fleet(self) -> Self:
        if self.executor == "local" and (self.num_workers or self.ray_address):
            raise ValueError("num-workers and ray-address belong to --executor ray; say that too")
        return self


class RecycleSettings(_Section):
    """Where KV states are kept from one run to the next. `kv_store_budget` in bytes."""

    kv_store: Path | None = None
    kv_store_budget: int = Field(default=8 << 30, ge=1)

    @field_validator("kv_store_budget", mode="before")
    @classmethod
    def _bytes(cls, value: str | int) -> int:
        return parse_bytes(value)


class MonitorSettings(_Section):
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


class AuditSettings(_Section):
    """How many rows are audited and what they must show. `audit_sample`: `200` rows or `1%`."""

    audit_sample: str = "1%"
    audit_min_exact: float = Field(default=1.0, ge=0.0, le=1.0)
    audit_free_running: int = Field(default=30, ge=0)
    audit_arms: int = Field(default=16, ge=0)
    audit_encoder: str | None = None

    @field_validator("audit_sample", mode="before")
    @classmethod
    def _sample(cls, value: object) -> str:
        text = str(value).strip()
        if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
            raise ValueError(f"{text!r} is neither a number of rows like 200 nor a share like 1%")
        return text

    def num_rows(self, total: int) -> int:
        """Rows asked for out of `total`; rows that cover prefix groups may come on top."""
        text = self.audit_sample
        wanted = -(-total * float(text[:-1]) // 100) if text.endswith("%") else int(text)
        return min(total, int(wanted))


class StoreSettings(_Section):
    """How an object store is reached, to read and to write; decides no answer.

    Secrets are in no dump and no repr: run.json and `--print-config` never hold them. What is
    not given is taken from the environment variables and files that AWS's own tools use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    storage_options: dict[str, str] = Field(default={}, repr=False)

    @field_validator("storage_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, str]:
        options = parse_storage_options(value)
        endpoint = options.get("endpoint_url")
        if endpoint is not None and not re.fullmatch(r"https?://[^/@\s]+/?", endpoint):
            raise ValueError("endpoint_url must look like https://host:port, without a password")
        if options.get("anonymous", "true") not in ("true", "false"):
            raise ValueError("anonymous is true or false")
        if ("access_key_id" in options) != ("secret_access_key" in options):
            raise ValueError("access_key_id and secret_access_key belong together; give both")
        return options

    @field_serializer("storage_options")
    def _without_secrets(self, options: dict[str, str]) -> dict[str, str]:
        return {name: text for name, text in options.items() if name not in STORAGE_SECRETS}

    def overridden_by(self, other: StoreSettings) -> StoreSettings:
        """These options, and those of `other` over them."""
        return StoreSettings(storage_options=self.storage_options | other.storage_options)


class JobSettings(_Section):
    """The whole job, section by section."""

    model: ModelSettings
    read: ReadSettings = ReadSettings()
    tokens: TokenSettings = TokenSettings()
    sampling: SamplingSettings = SamplingSettings()
    plan: PlanSettings = PlanSettings()
    engine: EngineSettings = EngineSettings()
    write: WriteSettings = WriteSettings()
    fleet: FleetSettings = FleetSettings()
    recycle: RecycleSettings = RecycleSettings()
    monitor: MonitorSettings = MonitorSettings()
    audit: AuditSettings = AuditSettings()
    store: StoreSettings = StoreSettings()

    @classmethod
    def from_flat(cls, flat: dict[str, Any]) -> JobSettings:
        """Deal a flat mapping of flag names out to the sections; None means "not said".

        Raises UsageError naming the first field that is unknown or out of range.
        """
        sections: dict[str, dict[str, Any]] = {name: {} for name in cls.model_fields}
        home = {key: name for name, section in _SECTIONS.items() for key in section.model_fields}
        for key, value in flat.items():
            field = key.replace("-", "_")
            if field not in home:
                raise UsageError(f"unknown setting {key!r}; known are {', '.join(sorted(home))}")
            if value is not None:
                sections[home[field]][field] = value
        try:
            return cls.model_validate(sections)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][-1]).replace("_", "-")
            reason = first["msg"].removeprefix("Value error, ")
            is_private = first["loc"][0] == "store" or name == "system-prompt"
            got = "" if is_private else f" (got {first['input']!r})"
            raise UsageError(f"setting {name}: {reason}{got}") from None


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "read": ReadSettings,
    "tokens": TokenSettings,
    "sampling": SamplingSettings,
    "plan": PlanSettings,
    "engine": EngineSettings,
    "write": WriteSettings,
    "fleet": FleetSettings,
    "recycle": RecycleSettings,
    "monitor": MonitorSettings,
    "audit": AuditSettings,
    "store": StoreSettings,
}
