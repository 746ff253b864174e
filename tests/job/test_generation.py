"""Jobs of models whose generation_config.json asks for something: as `generate()`, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import generation
from pipeline.audit.auditing import audit_run
from pipeline.errors import CoppiceError, RunDirectoryError, UsageError
from pipeline.generation import GenerationRules
from pipeline.job.observer import SilentObserver
from pipeline.location import Location
from pipeline.model import identity as fingerprint
from pipeline.run import plan_job, run_job, validate_input
from pipeline.settings import AuditSettings, JobSettings
from tests.tiny_job import answers, echo_settings, write_model, write_prompts
from tests.tokens.conftest import save_tokenizer

PROMPTS = ["hello world what is it", "who are you", "tell me more", "hello world what now"]
EVERY_ROW = AuditSettings(audit_sample="100%", audit_arms=2)


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("plain-model"))


def configured(plain: Path, folder: Path, **fields: Any) -> Path:
    """The model with further fields in its generation_config.json."""
    shutil.copytree(plain, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def settings(model: Path, **flat: Any) -> JobSettings:
    defaults = {"model": str(model), "max_new_tokens": 12, "dtype": "float32"}
    return JobSettings.from_flat(defaults | flat)


def generated(model: Path, **options: Any) -> list[str]:
    """The texts of `generate()` with the model's own defaults."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, tokenizer=tokenizer, **options
        )
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return str(write_prompts(tmp_path / "p.parquet", [*PROMPTS]))


@pytest.mark.parametrize("engine", ["prefix", "naive"])
def test_a_run_says_what_generate_says_and_its_audit_passes(
    tmp_path: Path, plain_model: Path, prompts: str, engine: str
) -> None:
    model = configured(
        plain_model, tmp_path / "m", repetition_penalty=1.5, no_repeat_ngram_size=2, min_length=14
    )
    run_job(prompts, tmp_path / "out", settings(model, engine=engine))
    texts = generated(model, max_new_tokens=12)
    assert texts != generated(plain_model, max_new_tokens=12)
    assert answers(tmp_path / "out")["generated_text"].to_list() == texts
    verdict = audit_run(Location(tmp_path / "out"), EVERY_ROW)
    assert verdict.passed and verdict.free_exact == verdict.free_rows == 4, verdict.reasons


def test_a_field_that_we_ignore_fails_the_audit(
    tmp_path: Path, plain_model: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product that does not know the field stands for every field that none of us knows."""
    model = configured(plain_model, tmp_path / "m", repetition_penalty=1.5)
    monkeypatch.setattr(
        generation, "RULES", tuple(n for n in generation.RULES if n != "repetition_penalty")
    )
    run_job(prompts, tmp_path / "out", settings(model))
    verdict = audit_run(Location(tmp_path / "out"), EVERY_ROW)
    assert not verdict.passed
    assert "free-running answers differ without a near-tie" in verdict.reasons[0]


def test_what_cannot_be_done_is_refused_before_anything_ran(
    tmp_path: Path, plain_model: Path, prompts: str
) -> None:
    model = configured(plain_model, tmp_path / "m", num_beams=4)
    with pytest.raises(UsageError, match=r"num_beams=4.*--generation-options num_beams=1"):
        run_job(prompts, tmp_path / "out", settings(model))
    assert not (tmp_path / "out").exists()
    run_job(prompts, tmp_path / "out", settings(model, generation_options=["num_beams=1"]))
    texts = generated(plain_model, max_new_tokens=12)
    assert answers(tmp_path / "out")["generated_text"].to_list() == texts
    assert audit_run(Location(tmp_path / "out"), EVERY_ROW).passed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suppress_tokens": [10**6]}, "token id 1000000, but the model knows 45 ids"),
        ({"bad_words_ids": [[-1]]}, "token id -1"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"no_repeat_ngram_size": "x"}, "no_repeat_ngram_size"),
        ({"stop_strings": 5}, "stop must be a text or a list of texts"),
        ({"stop_strings": {"x": 1}}, "stop must be a text or a list of texts"),
        ({"stop_strings": ["x", 5]}, "stop must be a text or a list of texts"),
    ],
)
def test_rules_that_make_no_sense_are_refused_before_anything_ran(
    tmp_path: Path, plain_model: Path, prompts: str, fields: dict[str, Any], message: str
) -> None:
    model = configured(plain_model, tmp_path / "m", **fields)
    with pytest.raises(CoppiceError, match=message):
        plan_job(prompts, settings(model))


def test_a_flag_overrules_the_model_and_belongs_to_the_run(
    tmp_path: Path, plain_model: Path, prompts: str
) -> None:
    model = configured(plain_model, tmp_path / "m", repetition_penalty=1.5)
    without = settings(model, generation_options=["repetition_penalty=1.0"])
    run_job(prompts, tmp_path / "out", without)
    texts = generated(plain_model, max_new_tokens=12)
    assert answers(tmp_path / "out")["generated_text"].to_list() == texts
    assert audit_run(Location(tmp_path / "out"), EVERY_ROW).passed
    with pytest.raises(RunDirectoryError, match="another (generation_|repetition)"):
        run_job(prompts, tmp_path / "out", settings(model))


def test_max_length_of_the_model_counts_the_prompt(
    tmp_path: Path, plain_model: Path, prompts: str
) -> None:
    model = configured(plain_model, tmp_path / "m", max_length=21, eos_token_id=None)
    said = {"model": str(model), "dtype": "float32", "fail_on_error": "1"}
    run_job(prompts, tmp_path / "out", JobSettings.from_flat(said))
    rows = answers(tmp_path / "out")
    lengths = [len(prompt) for prompt in PROMPTS]
    assert list(rows["completion_tokens"]) == [max(0, 21 - n) for n in lengths]
    assert rows["status"].to_list() == ["error" if n >= 21 else "ok" for n in lengths]
    assert "max_length" in rows["error_message"][0]
    ok = [i for i, n in enumerate(lengths) if n < 21]
    assert ok and len(ok) < 4
    run_job(prompts, tmp_path / "said", settings(model))
    assert answers(tmp_path / "said")["completion_tokens"].to_list() == [12] * 4


def test_stop_strings_of_the_model_end_an_answer(
    tmp_path: Path, plain_model: Path, prompts: str
) -> None:
    model = configured(plain_model, tmp_path / "m", stop_strings=["<eos>", "t", "u9"])
    run_job(prompts, tmp_path / "out", settings(model))
    texts = generated(model, max_new_tokens=12)
    ours = answers(tmp_path / "out")["generated_text"].to_list()
    assert all(
        text.startswith(own) and text[len(own) :] in ("", "t", "9")
        for own, text in zip(ours, texts, strict=True)
    )
    assert ours != generated(plain_model, max_new_tokens=12)
    assert audit_run(Location(tmp_path / "out"), EVERY_ROW).passed


def test_a_special_token_that_is_no_eos_stops(
    tmp_path: Path, plain_model: Path, prompts: str
) -> None:
    shared = {"ignore_eos": True, "stop": ["<eos>"]}
    run_job(prompts, tmp_path / "out", settings(plain_model, **shared))
    rows = answers(tmp_path / "out")
    assert rows["generated_text"].to_list() == generated(plain_model, max_new_tokens=12)
    assert "stop" in rows["finish_reason"].to_list()
    assert audit_run(Location(tmp_path / "out"), EVERY_ROW).passed


def test_a_strict_run_belongs_to_its_number_of_threads(
    tmp_path: Path, plain_model: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = settings(plain_model, fidelity="strict", device="cpu")
    run_job(prompts, tmp_path / "out", strict)
    run_job(prompts, tmp_path / "loose", settings(plain_model))
    monkeypatch.setattr(fingerprint, "num_threads", lambda: 77)
    with pytest.raises(RunDirectoryError, match="another threads .*now 77"):
        run_job(prompts, tmp_path / "out", strict)
    run_job(prompts, tmp_path / "loose", settings(plain_model))
    assert audit_run(Location(tmp_path / "out"), AuditSettings(audit_arms=0)).passed


@pytest.mark.parametrize("first", ["auto", "int8"])
def test_a_run_is_gone_on_with_by_the_same_weights_only(
    tmp_path: Path, plain_model: Path, prompts: str, first: str
) -> None:
    run_job(prompts, tmp_path / "out", settings(plain_model, weights=first))
    other = "int8" if first == "auto" else "auto"
    with pytest.raises(RunDirectoryError, match="another weights"):
        run_job(prompts, tmp_path / "out", settings(plain_model, weights=other))
    run_job(prompts, tmp_path / "out", settings(plain_model, weights=first))


def test_numbers_beyond_what_can_be_counted_are_their_rows_errors(
    tmp_path: Path, plain_model: Path
) -> None:
    most = [2**63 - 1, 3, 2**31, 2**31 - 1]
    path = write_prompts(tmp_path / "p.parquet", [*PROMPTS], max_new_tokens=most)
    run_job(str(path), tmp_path / "out", settings(plain_model, fail_on_error="2"))
    rows = answers(tmp_path / "out")
    assert rows["status"].to_list() == ["error", "ok", "error", "ok"]
    assert rows["error_type"].to_list() == ["BadSamplingParams", None, "BadSamplingParams", None]


class Listening(SilentObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_a_prompt_that_looks_rendered_is_warned_of(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "m")
    path = str(write_prompts(tmp_path / "p.parquet", ["<|bos|><|im_start|>user\nhi", "hello"]))
    found = validate_input(path, echo_settings(model))
    assert "1 of 2 sampled prompts" in found["warning"]
    planned = plan_job(path, echo_settings(model))
    assert planned.summary.warning == found["warning"]
    observer = Listening()
    run_job(path, tmp_path / "out", echo_settings(model), observer=observer)
    assert found["warning"] in observer.said
    assert all(line.isprintable() for line in observer.said), "one sentence a line"
    parsing = echo_settings(model, parse_special_tokens=True)
    assert validate_input(path, parsing)["warning"] is None


def test_every_rule_is_named_to_a_person(plain_model: Path, tmp_path: Path, prompts: str) -> None:
    model = configured(plain_model, tmp_path / "m", repetition_penalty=1.5)
    said = plan_job(prompts, settings(model)).job.describe_generation()
    assert "repetition_penalty=1.5" in said
    assert set(GenerationRules.model_fields) == set(generation.RULES)
