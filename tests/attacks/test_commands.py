"""Commands with values at and beyond their borders: one line on stderr, exit code 2, no folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_app import Shell, prompts, shell

__all__ = ["prompts", "shell"]


@pytest.fixture
def model(model_folder: Path) -> str:
    return str(model_folder)


WRONG = [
    ["--n", "0"], ["--n", "-1"], ["--n", "1000000"], ["--n", "x"], ["--n", "1.5"], ["--n", "true"],
    ["--n", "99999999999999999999999"], ["--n", ""], ["--n", "2"],
    ["--logprobs", "21"], ["--logprobs", "100"], ["--logprobs", "-1"], ["--logprobs", "true"],
    ["--logprobs", "5.5"],
    ["--presence-penalty", "2.1"], ["--presence-penalty", "nan"], ["--presence-penalty", "inf"],
    ["--frequency-penalty", "-3"], ["--frequency-penalty", "x"],
    ["--temperature", "-0.1"], ["--temperature", "101"], ["--temperature", "nan"],
    ["--top-p", "0"], ["--top-p", "1.1"], ["--top-k", "-2"],
    ["--seed", "9223372036854775808"], ["--seed", "1.5"], ["--stop", ""],
    ["--max-new-tokens", "0"], ["--max-new-tokens", "2147483648"],
    ["--price-per-hour", "0"], ["--price-per-hour", "-1"], ["--price-per-hour", "nan"],
    ["--price-per-hour", "inf"], ["--price-per-hour", "1e400"], ["--price-per-hour", "€3"],
    ["--generation-options", "n=2"], ["--generation-options", "nothing=1"],
    ["--generation-options", "logit_bias=5"], ["--generation-options", 'logit_bias={"x": 1}'],
    ["--generation-options", 'logit_bias={"5": 101}'],
    ["--generation-options", 'logit_bias={"5": NaN}'],
    ["--generation-options", "allowed_token_ids=[]"],
    ["--generation-options", "allowed_token_ids=[-1]"],
    ["--generation-options", "bad_words=x"], ["--generation-options", 'bad_words=[""]'],
    ["--generation-options", "min_tokens=-1"], ["--generation-options", "min_tokens=129"],
    ["--generation-options", "stop_token_ids=[1.5]"],
    ["--generation-options", "skip_special_tokens=5"],
    ["--generation-options", "min_p=2"], ["--generation-options", "repetition_penalty=0"],
    ["--generation-options", "num_beams=4"], ["--generation-options", "x"],
    ["--choices", "a,a"], ["--choices", "a,,b"], ["--choices", "a", "--prompt-logprobs"],
    ["--choices", "a", "--logprobs", "1"], ["--choices", "a", "--n", "2"],
    ["--choices", "a", "--choices-column", "b"], ["--explode", "--choices", "a"],
    ["--continuation-column", "nothing"], ["--choices-column", "nothing"],
    ["--questions", "nothing.yaml"], ["--question-order", "first"], ["--normalize", "bytes"],
]  # fmt: skip


@pytest.mark.parametrize("flags", WRONG, ids=" ".join)
def test_a_wrong_value_is_one_line_and_nothing_is_made(
    flags: list[str], shell: Shell, model: str, prompts: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code = shell("run", prompts, "-o", str(out), "--model", model, "--engine", "echo", *flags)
    assert code == 2, shell.err
    assert shell.out == "" and shell.err.startswith("coppice: "), shell.err
    assert shell.err.count("\n") == 1 and "unexpected" not in shell.err, shell.err
    named = flags[0].removeprefix("--") if flags[0] != "--generation-options" else ""
    assert named in shell.err, shell.err
    assert not out.exists()


CONFIGS = {
    "a date that no month has": "clock: 2026-02-30\n",
    "a key twice": "n: 2\nn: 4\ntemperature: 1\n",
    "a key twice, written in two ways": "max-new-tokens: 2\nmax_new_tokens: 4\n",
    "a list in itself": "stop: &a [*a]\n",
    "a text in itself": "stop: &a [x, *a]\n",
    "a number of 5,000 digits": f"seed: {'9' * 5000}\n",
    "true for a number": "logprobs: true\n",
    "yes for a number": "n: yes\n",
    "nested without end": "[" * 3000,
    "a list": "- n: 2\n",
    "half a pair": 'stop: "\\ud800"\n',
    "an unknown one": "logprob: 2\n",
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n"
    "c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nstop: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\n",
    "no YAML": "n: [1\n",
    "a tag": "n: !!python/object/apply:os.system [echo]\n",
    "choices twice": "choices: [a, a]\n",
    "a bool as a choice": "choices: [yes, no]\n",
    "null choices": "choices: [a, null]\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_settings_that_is_wrong_is_one_line(
    name: str, shell: Shell, model: str, prompts: str, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIGS[name])
    out = tmp_path / "out"
    code = shell(
        "run", prompts, "-o", str(out), "--model", model, "--engine", "echo",
        "--config", str(config),
    )  # fmt: skip
    assert code == 2, shell.err
    assert shell.out == "" and shell.err.count("\n") == 1, shell.err
    assert "unexpected" not in shell.err and len(shell.err) < 600, shell.err
    assert not out.exists()


@pytest.mark.parametrize("price", ["1e-300", "0.5", "1e12", "1e300", "1.7e308"])
def test_a_price_is_told_as_json_or_too_high_for_a_sum(
    price: str, shell: Shell, model: str, prompts: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    job = ("run", prompts, "-o", out, "--model", model, "--engine", "echo", "--json")
    code = shell(*job, "--fail-on-error", "1", "--price-per-hour", price)
    if float(price) > 1e12:  # ten hours of it would be Infinity, which is no JSON
        assert code == 2 and "price-per-hour" in shell.err and not Path(out).exists()
        return
    told = json.loads(shell.out, parse_constant=lambda said: pytest.fail(said))
    assert told["cost"]["price_per_hour"] == float(price)
    for command in ("report", "status"):
        assert shell(command, out, "--json") == 0
        json.loads(shell.out, parse_constant=lambda said: pytest.fail(said))


@pytest.mark.parametrize("command", ["status", "report", "retry", "audit", "convert"])
def test_a_folder_that_is_no_run_is_one_line(command: str, shell: Shell, tmp_path: Path) -> None:
    for folder in (tmp_path / "nothing", tmp_path):
        target = [str(tmp_path / "r.jsonl")] if command == "convert" else []
        assert shell(command, str(folder), *target) == 2
        assert shell.out == "" and shell.err.count("\n") == 1 and "unexpected" not in shell.err


def test_what_a_retry_may_not_change_is_refused(
    shell: Shell, model: str, prompts: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    shell("run", prompts, "-o", out, "--model", model, "--engine", "echo", "--fail-on-error", "1")
    for flags in (["--explode"], ["--n", "2"], ["--temperature", "1"], ["--model", model]):
        assert shell("retry", out, *flags) == 2, flags
        assert shell.err.count("\n") == 1 and flags[0].removeprefix("--") in shell.err
    assert shell("retry", out, "--price-per-hour", "2", "--json", "--fail-on-error", "1") == 0
    assert json.loads(shell.out)["cost"]["price_per_hour"] == 2.0
