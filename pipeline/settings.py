"""What a person can choose: one small frozen record per stage, validated once, then passed on.

Field names are unique over all sections and equal the command's flags, so that a flat mapping
(flags, or a YAML file) can be dealt out to the sections by `JobSettings.from_flat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from pipeline import constraints
from pipeline.constraint_settings import check_constraints, read_grammar, read_schema
from pipeline.conversation_settings import ConversationSettings, check_conversations
from pipeline.costs import CostSettings
from pipeline.errors import UsageError
from pipeline.forms import (
    Duration,
    RowLimit,
    Section,
    Share,
    Size,
    parse_duration,
    rows_of,
    say_fault,
    unknown_name,
)
from pipeline.generation import read_generation_options
from pipeline.records import MOST_LOGPROBS, MOST_NEW_TOKENS, MOST_SAMPLES
from pipeline.reuse_settings import ReuseSettings, check_reuse
from pipeline.scoring_settings import ScoringSettings, check_scoring
from pipeline.template_arguments import read_template_arguments

STORAGE_SECRETS = (
    "access_key_id", "secret_access_key", "session_token", "account_key", "sas_token", "token",
)  # fmt: skip
STORAGE_OPTIONS = (
    "endpoint_url", "region", "anonymous", "service_account", "account_name", *STORAGE_SECRETS,
)  # fmt: skip
_PREFIXES = ("aws_", "azure_storage_", "google_")


def parse_storage_options(value: object) -> dict[str, str]:
    """`["region=eu-west-1"]`, one such text, or a mapping, as a mapping; later ones win.

    `aws_region` is `region`, and so on. Raises ValueError, which never quotes a value: it may be
    a secret.
    """
    options: dict[str, str] = {}
    for key, content in _named_values(value):
        name = str(key).strip().lower().replace("-", "_")
        name = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
        if name not in STORAGE_OPTIONS:
            raise ValueError(f"there is no option {key!r}; known are {', '.join(STORAGE_OPTIONS)}")
        options[name] = str(content).lower() if isinstance(content, bool) else str(content)
    return options


def _named_values(value: object) -> list[tuple[Any, Any]]:
    """Of a mapping, or of texts like `name=value`, or one such text. Raises ValueError."""
    if isinstance(value, dict):
        return list(value.items())
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        raise ValueError("write it as name=value")
    pairs = [str(text).partition("=") for text in texts]
    if not all(equals for _, equals, _ in pairs):
        raise ValueError("write it as name=value, like region=eu-west-1")
    return [(name, content) for name, _, content in pairs]


class ReadSettings(Section):
    """Which rows and columns are read. A column left at None is found by its usual name.

    `template`: a Jinja file that makes the prompt of a row's columns, instead of a ready one.
    `reorder_fields`: list its `fields(...)` in each row in the order in which rows share most.
    `segments_column`: a prompt in parts; `documents_column`: what stands before the prompt.
    `json_schema_column`: what the answer of each row must be.
    """

    prompt_column: str | None = None
    messages_column: str | None = None
    segments_column: str | None = None
    documents_column: str | None = None
    template: Path | None = None
    json_schema_column: str | None = None
    reorder_fields: bool = False
    id_column: str | None = None
    limit: int | None = Field(default=None, ge=1)


class TokenSettings(Section):
    """How a row becomes text, and text token ids.

    `clock`: what a chat template that prints the date or time takes for now, on the wall; None:
    the beginning of the day on which the job begins. `chat_template_kwargs`: what a chat template
    is given besides messages, like `{"enable_thinking": false}`. `reasoning_tags`: around what a
    model thinks before it answers: "auto" (those of its chat template), "none", or two, with a
    comma between.
    """

    system_prompt: str | None = None
    chat_template: Path | None = None
    clock: datetime | None = None
    apply_chat_template: bool = False
    parse_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_tags: str = "auto"

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _arguments(cls, value: object) -> dict[str, Any]:
        return read_template_arguments(dict(_named_values(value)))

    @field_validator("reasoning_tags")
    @classmethod
    def _tags(cls, value: str) -> str:
        begin, _, end = value.partition(",")
        if value not in ("auto", "none") and (not begin or not end or "," in end):
            raise ValueError("write it as auto, none, or two tags like <think>,</think>")
        return value

    @property
    def named_tags(self) -> tuple[str, str] | None:
        """The tags around reasoning, where a person names them."""
        begin, comma, end = self.reasoning_tags.partition(",")
        return (begin, end) if comma else None

    @field_validator("clock")
    @classmethod
    def _on_the_wall(cls, value: datetime | None) -> datetime | None:
        return None if value is None else value.replace(tzinfo=None)


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


class SamplingSettings(Section):
    """Defaults for rows without sampling fields; None means: as the model's repository says.

    `top_k` 0 or -1: all tokens. `generation_options`: fields of transformers' `GenerationConfig`
    instead of the model's own, like `{"repetition_penalty": 1.0}`, or of `RequestRules`.
    `json_schema`, `regex`, `grammar`: what each answer must be, as text; the first and the last may
    be files. `thinking_budget`: most tokens of thinking. `logprobs`: of each chosen token and so
    many likeliest ones. `n`: samples of each row.
    """

    max_new_tokens: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    temperature: float | None = Field(default=None, ge=0.0, le=100.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, le=MOST_NEW_TOKENS)
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int | None = Field(default=None, ge=1, le=MOST_SAMPLES)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_LOGPROBS)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    generation_options: dict[str, Any] = {}
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    thinking_budget: int | None = Field(default=None, ge=0, le=MOST_NEW_TOKENS)

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
        return read_generation_options(dict(_named_values(value)))

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema(cls, value: object) -> str | None:
        return None if value is None else read_schema(value)

    @field_validator("grammar", mode="before")
    @classmethod
    def _grammar(cls, value: object) -> str | None:
        return None if value is None else read_grammar(value)

    @field_validator("regex")
    @classmethod
    def _regex(cls, value: str | None) -> str | None:
        return value if value is None or constraints.of_regex(value) else None

    @property
    def constraint(self) -> str:
        """What each answer must be, as one text; empty: anything."""
        if self.json_schema is not None:
            return constraints.of_schema(self.json_schema)
        if self.regex is not None:
            return constraints.of_regex(self.regex)
        return "" if self.grammar is None else constraints.of_grammar(self.grammar)


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
        options = _named_values(value)
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


class ObjectStoreSettings(Section):
    """How an object store is reached, to read and to write; decides no answer.

    Secrets are in no dump and no repr: run.json and `--print-config` never hold them. What is
    not given is taken from the environment variables and files that each store's own tools use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    storage_options: dict[str, str] = Field(default={}, repr=False)

    @field_validator("storage_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, str]:
        options = parse_storage_options(value)
        endpoint = options.get("endpoint_url")
        if endpoint is not None and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s?#]*)?", endpoint):
            raise ValueError("endpoint_url must look like https://host:port, without a password")
        if options.get("anonymous", "true") not in ("true", "false"):
            raise ValueError("anonymous is true or false")
        if "account_key" in options and "sas_token" in options:
            raise ValueError("account_key and sas_token exclude each other; drop one")
        if ("access_key_id" in options) != ("secret_access_key" in options):
            raise ValueError("access_key_id and secret_access_key belong together; give both")
        return options

    @field_serializer("storage_options")
    def _without_secrets(self, options: dict[str, str]) -> dict[str, str]:
        return {name: text for name, text in options.items() if name not in STORAGE_SECRETS}

    def overridden_by(self, other: ObjectStoreSettings) -> ObjectStoreSettings:
        """These options, and those of `other` over them."""
        return ObjectStoreSettings(storage_options=self.storage_options | other.storage_options)


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
