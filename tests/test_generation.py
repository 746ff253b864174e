"""Every field of transformers' GenerationConfig is done, refused, or known to change no text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from pipeline.errors import UsageError
from pipeline.generation import (
    PLAIN,
    REFUSED,
    RULES,
    UnsupportedGeneration,
    active_rules,
    end_at,
    ids_of,
    resolve_sampling,
    why_not_by_vllm,
)
from pipeline.records import SamplingParams
from pipeline.sampling_settings import SamplingSettings
from pipeline.settings import JobSettings

NO_INFLUENCE = {
    # beams and groups of them, which are refused where there is more than one
    "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups",
    # a guess that the model checks token by token: faster, and the same text
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type",
    # how it is computed, and what is returned besides
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size",
    "low_memory", "compile_config", "disable_compile", "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "transformers_version",
    # a monotone change of all logits at once, after everything else
    "renormalize_logits",
    # tokens: the end is read by `model/model.py`, the others are of padding and of encoders
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
}  # fmt: skip


def test_every_field_of_transformers_has_its_place() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    places: list[set[str]] = [set(PLAIN), set(RULES), set(REFUSED), NO_INFLUENCE]
    assert fields - set().union(*places) == set()
    twice = {n for n in fields if sum(n in place for place in places) > 1}
    assert twice == {"max_length"}  # a plain number that is kept until the prompt is known


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("token_healing", True),
        ("watermarking_config", {"greenlist_ratio": 0.25}),
        ("max_time", 3.0),
        ("constraints", [1]),
        ("force_words_ids", [[1]]),
    ],
)
def test_what_no_engine_can_do_is_refused_with_the_flag_that_overrules_it(
    name: str, value: object
) -> None:
    with pytest.raises(UnsupportedGeneration, match=f"{name}=") as error:
        resolve_sampling(SamplingSettings(), {name: value}, {})
    flag = str(error.value).split("--generation-options ")[1].split(" ")[0]
    flags = JobSettings.from_flat({"model": "m", "generation-options": [flag]}).sampling
    params = resolve_sampling(flags, {name: value}, {})
    assert not active_rules(params.rules)
    assert name in json.loads(params.rules)  # `generate()` has to be told so


def rules(model: dict[str, Any], flags: list[str], row: dict[str, object]) -> dict[str, Any]:
    settings = JobSettings.from_flat({"model": "m", "generation-options": flags}).sampling
    said = resolve_sampling(settings, model, row).rules
    return dict(json.loads(said)) if said else {}


def test_the_row_wins_over_flags_over_the_model_s_rules() -> None:
    own = {"repetition_penalty": 1.1, "suppress_tokens": [5]}
    assert rules({}, [], {}) == {}
    assert rules({"repetition_penalty": 1.0, "min_p": None, "typical_p": 1.0}, [], {}) == {}
    assert rules(own, [], {}) == own
    assert rules(own, ["repetition_penalty=1.3"], {}) == own | {"repetition_penalty": 1.3}
    assert rules(own, ["repetition_penalty=1.3"], {"repetition_penalty": 2}) == own | {
        "repetition_penalty": 2.0
    }
    # What overrules the model is kept, although it changes no logit.
    assert rules(own, ["suppress_tokens=null"], {"repetition_penalty": 1.0}) == {
        "repetition_penalty": 1.0,
        "suppress_tokens": [],
    }


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("repetition_penalty=0", "repetition_penalty: input should be greater than 0"),
        ("repetition_penalty=x", "repetition_penalty: input should be a valid number"),
        ("min_p=1.5", "min_p: input should be less than or equal to 1"),
        ("suppress_tokens=3", "suppress_tokens"),
        ("temperature=1", "a flag of its own, --temperature"),
        ("repitition_penalty=1", "there is no option 'repitition_penalty'; known are"),
        ("repetition_penalty", "name=value"),
    ],
)
def test_a_wrong_option_is_named(flag: str, message: str) -> None:
    with pytest.raises(UsageError, match="setting generation-options: ") as error:
        JobSettings.from_flat({"model": "m", "generation_options": flag})
    assert message in str(error.value)


def test_a_row_cannot_name_token_ids_or_rules_as_such() -> None:
    for row in ({"suppress_tokens": [1]}, {"rules": "{}"}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="unknown sampling field"):
            resolve_sampling(SamplingSettings(), {}, row)  # type: ignore[arg-type]


def test_max_length_counts_the_prompt_and_gives_way_to_max_new_tokens() -> None:
    own = {"max_length": 20, "min_p": 0.1}
    params = resolve_sampling(SamplingSettings(), own, {})
    assert end_at(params, 20) is None
    ended = end_at(params, 15)
    assert ended == SamplingParams(max_new_tokens=5, rules='{"min_p": 0.1}')
    for flags, model, row in (
        ({"max_new_tokens": 7}, own, {}),
        ({}, own | {"max_new_tokens": 7}, {}),
        ({}, own, {"max_new_tokens": 7}),
    ):
        said = resolve_sampling(SamplingSettings(**flags), model, row)  # type: ignore[arg-type]
        assert end_at(said, 100) == said == SamplingParams(7, rules='{"min_p": 0.1}')


def test_the_model_s_stop_strings_count_unless_others_are_said() -> None:
    own = {"stop_strings": ["a"]}
    assert resolve_sampling(SamplingSettings(), own, {}).stop == ("a",)
    assert resolve_sampling(SamplingSettings(stop=("b",)), own, {}).stop == ("b",)


def test_every_token_id_of_a_rule_is_found() -> None:
    own = {
        "suppress_tokens": [1], "begin_suppress_tokens": [2], "bad_words_ids": [[3, 4]],
        "sequence_bias": [[[5], 1.0]], "forced_bos_token_id": 6, "forced_eos_token_id": [7, 8],
    }  # fmt: skip
    assert ids_of(resolve_sampling(SamplingSettings(), own, {}).rules) == set(range(1, 9))


def test_vllm_is_given_no_rule_that_it_would_leave_out() -> None:
    def reason(own: dict[str, Any]) -> str | None:
        return why_not_by_vllm(resolve_sampling(SamplingSettings(), own, {}))

    assert reason({"repetition_penalty": 1.1, "min_p": 0.1, "min_new_tokens": 2}) is None
    assert "no_repeat_ngram_size is nothing that vLLM has" in str(
        reason({"no_repeat_ngram_size": 3})
    )


@pytest.mark.parametrize("temperature", [0.0, 1e-308, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


@pytest.mark.parametrize(
    "fields", [{"max_new_tokens": 2**31}, {"max_new_tokens": 2**63 - 1}, {"top_k": 2**70}]
)
def test_numbers_that_no_engine_can_count_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        SamplingParams(**fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be at most 2147483647"):
        JobSettings.from_flat({"model": "m"} | fields)
