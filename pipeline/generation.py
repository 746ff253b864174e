"""What of transformers' `GenerationConfig` changes the text of an answer, and what we do with it.

Every field is one of these; `tests/test_generation.py` asks transformers for the list:

- `SamplingParams` has a field of its own for it (`PLAIN`);
- a *rule*: the engine lets transformers' own logits processors apply it (`GenerationRules`);
- refused by name, where it is not neutral, since we have no place for it (`REFUSED`);
- without influence on the text that `generate()` gives for one prompt (all others).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.records import GREEDY_BELOW, MOST_NEW_TOKENS, SamplingParams
from pipeline.request_rules import REQUEST_RULES, read_asked, write_asked

if TYPE_CHECKING:
    from pipeline.sampling_settings import SamplingSettings

PLAIN: Final = (
    "do_sample", "temperature", "top_p", "top_k", "max_new_tokens", "max_length", "stop_strings",
)  # fmt: skip
REFUSED: Final[dict[str, tuple[Any, ...]]] = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "watermarking_config": (None,),
    "max_time": (None,),
}
"""Fields that only another way of generating can do, and the values that mean "without"."""
ROW_RULES: Final = (
    "repetition_penalty", "no_repeat_ngram_size", "min_p", "top_h", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "min_new_tokens",
)  # fmt: skip
"""Rules that a single row may ask for: those that name no token ids."""
VLLM_RULES: Final = ("repetition_penalty", "min_p", "min_new_tokens")
"""Rules that vLLM has as well, with the same meaning."""
_AGAINST_CONSTRAINTS: Final = {
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "remove_invalid_values",
}  # fmt: skip
"""Rules that give a token back which was ruled out."""
_BANS: Final = {
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "suppress_tokens", "begin_suppress_tokens",
}  # fmt: skip
_TRANSFORMERS_TOP_K: Final = 50  # where a model samples and does not say how many tokens it keeps

TokenId = int


class UnsupportedGeneration(ValueError):
    """The model asks for a way of generating that no engine has; the message names the flag."""


class GenerationRules(BaseModel):
    """Rules for logits, as transformers' `GenerationConfig` has them; a default changes nothing."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    encoder_repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    no_repeat_ngram_size: int = Field(default=0, ge=0)
    encoder_no_repeat_ngram_size: int = Field(default=0, ge=0)
    bad_words_ids: tuple[tuple[TokenId, ...], ...] = ()
    sequence_bias: tuple[tuple[tuple[TokenId, ...], float], ...] = ()
    min_length: int = Field(default=0, ge=0)
    min_new_tokens: int = Field(default=0, ge=0)
    max_length: int | None = Field(default=None, ge=1, le=MOST_NEW_TOKENS)
    forced_bos_token_id: TokenId | None = None
    forced_eos_token_id: TokenId | tuple[TokenId, ...] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[TokenId, ...] = ()
    begin_suppress_tokens: tuple[TokenId, ...] = ()
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    top_h: float = Field(default=1.0, gt=0.0, le=1.0)
    typical_p: float = Field(default=1.0, gt=0.0, le=1.0)
    epsilon_cutoff: float = Field(default=0.0, ge=0.0, lt=1.0)
    eta_cutoff: float = Field(default=0.0, ge=0.0, lt=1.0)


RULES: Final = tuple(GenerationRules.model_fields)
_NEUTRAL: Final = GenerationRules().model_dump(mode="json")


def resolve_sampling(
    settings: SamplingSettings, generation_config: dict[str, Any], override: dict[str, object]
) -> SamplingParams:
    """Row over flags over the model's generation_config over defaults. Raises ValueError.

    A repository that says `do_sample: false` (or nothing) is greedy whatever temperature it lists.
    """
    model = generation_config | settings.generation_options
    chosen = _defaults_of(model)
    said = settings.model_dump(
        exclude_none=True, exclude={"generation_options", "json_schema", "regex", "grammar"}
    )
    said["constraint"] = settings.constraint
    if not settings.stop:
        del said["stop"]
    chosen |= {n: model[n] for n in REQUEST_RULES if n in settings.generation_options}
    chosen |= said | {k: v for k, v in override.items() if v is not None}
    if chosen.get("logprobs") is False:  # as a request says "none"
        chosen["logprobs"] = None
    asked = write_asked({n: chosen.pop(n) for n in REQUEST_RULES if n in chosen})
    of_row = {name: chosen.pop(name) for name in ROW_RULES if name in chosen}
    chosen["stop"] = _read_stop(chosen.get("stop", ()))
    if model.get("do_sample") and chosen["temperature"] >= GREEDY_BELOW:
        chosen.setdefault("top_k", _TRANSFORMERS_TOP_K)
    if chosen.get("top_k") == 0 or chosen.get("top_k") == -1:
        chosen["top_k"] = None
    if "max_new_tokens" in chosen:
        model["max_length"] = None
    elif model.get("max_length"):
        chosen["max_new_tokens"] = model["max_length"]  # less the prompt, see `job/prepare.py`
    unknown = chosen.keys() - SamplingParams.__dataclass_fields__.keys()
    unknown |= chosen.keys() & {"rules", "asked"}
    if unknown:
        raise ValueError(f"unknown sampling field {sorted(unknown)[0]!r}")
    rules = _rules(generation_config, model | of_row)
    return _checked(SamplingParams(**chosen, rules=rules, asked=asked))


def _checked(params: SamplingParams) -> SamplingParams:
    """Raises ValueError where one field asks for what another one rules out."""
    least = read_asked(params.asked).min_tokens if params.asked else 0
    if least > params.max_new_tokens:
        raise ValueError(
            f"min_tokens is {least}, and max_new_tokens {params.max_new_tokens}; change one of them"
        )
    bad = sorted(active_rules(params.rules) & _AGAINST_CONSTRAINTS) if params.constraint else []
    if bad:
        raise ValueError(
            f"{bad[0]} and what the answer must be may ask for two tokens at once; run without it "
            f"by --generation-options {bad[0]}=null"
        )
    return params


def _read_stop(said: object) -> tuple[str, ...]:
    stop = (said,) if isinstance(said, str) else said
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise ValueError("stop must be a text or a list of texts")
    return tuple(stop)


def _defaults_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `SamplingParams` that the model decides."""
    chosen: dict[str, Any] = {}
    if model.get("do_sample"):
        names = ("temperature", "top_p", "top_k")
        chosen = {name: model[name] for name in names if model.get(name) is not None}
        chosen.setdefault("temperature", 1.0)
    if model.get("max_new_tokens"):
        chosen["max_new_tokens"] = model["max_new_tokens"]
    if model.get("stop_strings"):
        chosen["stop"] = model["stop_strings"]
    return chosen


def _rules(own: Mapping[str, Any], merged: Mapping[str, Any]) -> str:
    """What differs from plain generation, as JSON; what the model's own config says otherwise is
    there as well, so that `generate()` can be told. Empty: nothing."""
    for name, neutral in REFUSED.items():
        if merged.get(name) not in neutral:
            value = json.dumps(merged[name])
            raise UnsupportedGeneration(
                f"the model's generation_config.json asks for {name}={value}, which no "
                f"engine here can do; --generation-options {name}={json.dumps(neutral[-1])} runs "
                "without it"
            )
    rules = parse_rules(merged).model_dump(mode="json")
    before = parse_rules(own).model_dump(mode="json")
    told = {n: v for n, v in rules.items() if v != _NEUTRAL[n] or before[n] != v}
    told |= {n: neutral[-1] for n, neutral in REFUSED.items() if own.get(n) not in neutral}
    if told.get("max_length", 0) is None:
        del told["max_length"]  # `max_new_tokens` is always said and goes before
    return json.dumps(told, sort_keys=True) if told else ""


def parse_rules(fields: Mapping[str, Any]) -> GenerationRules:
    """The rules among these fields; null is "not said". Raises ValueError in one sentence."""
    said = {name: fields[name] for name in RULES if fields.get(name) is not None}
    try:
        return GenerationRules(**said)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise ValueError(f"{first['loc'][0]}: {reason}") from None


@lru_cache(maxsize=4096)
def read_rules(rules: str) -> Mapping[str, Any]:
    """`SamplingParams.rules` by name; None: as if the model had never asked for it."""
    said: dict[str, Any] = json.loads(rules) if rules else {}
    return {name: None if value == _NEUTRAL.get(name) else value for name, value in said.items()}


@lru_cache(maxsize=4096)
def active_rules(rules: str) -> frozenset[str]:
    """The names of the rules that change logits: those that do more than overrule the model."""
    said = read_rules(rules)
    return frozenset(n for n in RULES if said.get(n) is not None and n != "max_length")


def may_rule_out(params: SamplingParams) -> bool:
    """Whether a token may be ruled out however likely it is, one that must follow as well."""
    asked = read_asked(params.asked)
    banned = active_rules(params.rules) & _BANS or asked.allowed_token_ids or asked.bad_words
    return bool(banned or (asked.min_tokens and asked.stop_token_ids))


def length_limit(params: SamplingParams) -> int | None:
    """Tokens that prompt and answer may have together, where the model's `max_length` says it."""
    limit: int | None = read_rules(params.rules).get("max_length")
    return limit


def end_at(
    params: SamplingParams, prompt_tokens: int, has_later_turns: bool = False
) -> SamplingParams | None:
    """Parameters whose `max_length` has become `max_new_tokens`; None: the prompt fills it.

    `has_later_turns`: the limit stays among the rules, for it counts what was said before as well.
    """
    limit = length_limit(params)
    if limit is None:
        return params
    if prompt_tokens >= limit:
        return None
    params = replace(params, max_new_tokens=limit - prompt_tokens)
    if has_later_turns:
        return params
    left = {name: v for name, v in json.loads(params.rules).items() if name != "max_length"}
    return replace(params, rules=json.dumps(left, sort_keys=True) if left else "")


def ids_of(rules: str) -> set[TokenId]:
    said = GenerationRules(**{k: v for k, v in read_rules(rules).items() if v is not None})
    forced = (said.forced_bos_token_id, said.forced_eos_token_id)
    named = (
        *said.bad_words_ids, *(ids for ids, _ in said.sequence_bias), said.suppress_tokens,
        said.begin_suppress_tokens, *(x if isinstance(x, tuple) else (x,) for x in forced),
    )  # fmt: skip
    return {token_id for ids in named for token_id in ids if token_id is not None}


def why_not_by_vllm(params: SamplingParams) -> str | None:
    """One clause that names what vLLM would leave out of these parameters, or None."""
    if params.is_guided:
        return (
            "what the answer must be, and a budget of thinking, are for --engine prefix or naive: "
            "vLLM ends such answers at another token"
        )
    missing = sorted(active_rules(params.rules).difference(VLLM_RULES))
    if not missing:
        return None
    return (
        f"{missing[0]} is nothing that vLLM has with the same meaning; choose --engine prefix or "
        f"naive, or run without it by --generation-options {missing[0]}=null"
    )
