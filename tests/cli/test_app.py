"""The command line: exit codes, what goes to which stream, and the three layers of settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import app as cli
from pipeline.cli.options import PANELS
from pipeline.location import Location
from pipeline.settings import JobSettings
from pipeline.status import read_status
from tests.tiny_job import write_model, write_prompts, write_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tokenizer(tmp_path_factory.mktemp("cli-tokenizer")))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return str(write_prompts(tmp_path / "p.parquet", ["hello world", "hello you", None]))


class Shell:
    """Runs the command in this process; `out` and `err` hold what it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd
        self.out = self.err = ""
        monkeypatch.setenv("COLUMNS", "80")

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr("sys.argv", ["coppice", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        self.out, self.err = self._capfd.readouterr()
        return int(end.value.code or 0)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def test_run_status_and_run_again(shell: Shell, prompts: str, model: str, tmp_path: Path) -> None:
    job = ("run", prompts, "-o", str(tmp_path / "out"), "--model", model, "--engine", "echo")
    assert shell(*job, "--fail-on-error", "1") == 0
    assert "2 ok, 1 failed" in shell.out
    assert "3 rows, 20 prompt tokens" in shell.err
    assert shell("status", str(tmp_path / "out"), "--json") == 0
    state = json.loads(shell.out)
    assert (state["status"], state["rows_done"], state["rows_failed"]) == ("complete", 3, 1)
    assert shell("status", str(tmp_path / "out")) == 0
    assert "3 of 3" in shell.out
    assert shell(*job, "--fail-on-error", "1") == 0
    assert "nothing to do" in shell.err


def test_too_many_failed_rows_exit_with_3(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    job = ("run", prompts, "-o", str(tmp_path / "out"), "--model", model, "--engine", "echo")
    assert shell(*job) == 3
    last = shell.err.splitlines()[-1]
    assert last.startswith(
        "coppice: 1 of 3 rows failed (1 NullPrompt); --fail-on-error 1% allows 0"
    )
    assert shell(*job) == 3, "also of a run that was complete"
    assert "(1 NullPrompt)" in shell.err
    assert shell(*job, "--fail-on-error", "50%") == 0
    assert "NullPrompt" in shell.out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_shard_is_chosen_and_said(
    shell: Shell, prompts: str, model: str, tmp_path: Path, command: str
) -> None:
    out = ("-o", str(tmp_path / "out")) if command == "run" else ()
    job = (command, prompts, *out, "--model", model, "--engine", "echo", "--num-shards", "2")
    assert shell(*job) == 2
    assert "say which part to do: --shard, from 0 to 1" in shell.err
    if command == "run":
        assert shell(*job, "--shard", "1", "--fail-on-error", "1") == 0
        assert "shard 1 of 2: " in shell.err and " of 3 rows" in shell.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.parquet", "-o", "out"), "nowhere.parquet"),
        (("status", "nowhere"), "holds no run"),
        (("audit", "nowhere"), "holds no run"),
        (("report", "nowhere"), "holds no run"),
    ],
)
def test_a_usage_error_is_one_line_and_exits_with_2(
    shell: Shell, model: str, arguments: tuple[str, ...], message: str
) -> None:
    extra = ("--model", model, "--engine", "echo") if arguments[0] == "run" else ()
    assert shell(*arguments, *extra) == 2
    assert shell.out == ""
    assert len(shell.err.splitlines()) == 1
    assert shell.err.startswith("coppice: ") and message in shell.err


def test_the_model_must_be_named(shell: Shell, prompts: str) -> None:
    assert shell("plan", prompts) == 2
    assert "--model" in shell.err


def test_an_unknown_flag_exits_with_2(shell: Shell, prompts: str) -> None:
    assert shell("plan", prompts, "--modle", "x") == 2


def test_json_is_one_object_and_nothing_else(shell: Shell, prompts: str, model: str) -> None:
    assert shell("plan", prompts, "--model", model, "--engine", "echo", "--json") == 0
    summary = json.loads(shell.out)
    assert (summary["rows"], summary["rows_rejected"], summary["unique_tokens"]) == (3, 1, 14)
    assert shell("validate", prompts, "--model", model, "--engine", "echo", "--json") == 3
    assert json.loads(shell.out)["reasons"] == {"NullPrompt": 1}


def test_the_exit_code_of_validate_is_that_of_a_run(shell: Shell, prompts: str, model: str) -> None:
    """Seen red: 0, also where 300 of 300 rows could not run."""
    job = ("validate", prompts, "--model", model, "--engine", "echo")
    assert shell(*job) == 3
    assert "NullPrompt" in shell.out and "1 of 3 rows failed (1 NullPrompt)" in shell.err
    assert shell(*job, "--fail-on-error", "1") == 0 == shell(*job, "--fail-on-error", "0.5")
    assert shell(*job, "--limit", "2") == 0


def test_a_plan_says_why_rows_cannot_run(shell: Shell, prompts: str, model: str) -> None:
    """Seen red: "1 cannot run", and nothing more."""
    assert shell("plan", prompts, "--model", model, "--engine", "echo") == 0
    assert "1 cannot run" in shell.out
    said = " ".join(shell.out.split())
    assert "NullPrompt 1" in said and "e.g. r2 NullPrompt: the prompt is null" in said


def test_a_dry_run_writes_nothing(shell: Shell, prompts: str, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = ("run", prompts, "-o", str(out), "--model", model, "--engine", "echo", "--dry-run")
    assert shell(*job) == 0
    assert "unique tokens U" in shell.out
    assert not out.exists()


def test_a_plan_can_be_kept(shell: Shell, prompts: str, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    assert shell("plan", prompts, "-o", str(folder), "--model", model, "--engine", "echo") == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["plan.parquet", "summary.json", "tree.parquet"]


def test_tables_fit_80_columns(shell: Shell, prompts: str, model: str) -> None:
    assert shell("plan", prompts, "--model", model, "--engine", "echo") == 0
    assert max(map(len, shell.out.splitlines())) <= 80


def test_flags_win_over_the_file_over_the_defaults(shell: Shell, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    config.write_text("model: from-file\nmax-new-tokens: 7\nignore_eos: true\nkv-budget: 1GiB\n")
    flags = ("--config", str(config), "--print-config", "--model", "from-flag", "--no-ignore-eos")
    assert shell("run", "p.parquet", "-o", "out", *flags, "--stop", "a", "--stop", "b") == 0
    shown = yaml.safe_load(shell.out)
    assert shown["model"] == "from-flag"
    assert shown["max-new-tokens"] == 7
    assert shown["ignore-eos"] is False
    assert shown["kv-budget"] == 1 << 30
    assert shown["stop"] == ["a", "b"]
    assert shown["max-rows"] == 256


def test_the_shown_configuration_can_be_used_again(shell: Shell, tmp_path: Path) -> None:
    call = ("run", "p.parquet", "-o", "out", "--print-config")
    assert shell(*call, "--model", "m", "--time-budget", "4h") == 0
    first = shell.out
    (tmp_path / "job.yaml").write_text(first)
    assert shell(*call, "--config", str(tmp_path / "job.yaml")) == 0
    assert shell.out == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown setting 'modle'; did you mean model?"),
        ("- a list", "must be a mapping"),
        ("model: [", "not YAML"),
        ("modle: x\nmodel: y", "'modle'"),
        ("model: x\nmax-rows: many", "max-rows"),
    ],
)
def test_a_wrong_file_is_refused(shell: Shell, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    call = ("run", "p.parquet", "-o", "out", "--print-config")
    assert shell(*call, "--config", str(tmp_path / "job.yaml")) == 2
    assert message in shell.err


def test_every_setting_has_a_flag(shell: Shell) -> None:
    assert set(PANELS) == set(JobSettings.model_fields)
    assert shell("run", "--help") == 0
    for flag in PANELS.values():
        assert f"─ {flag} ─" in shell.out or flag == "Audit"
    for section in PANELS:
        fields = JobSettings.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        for name in fields if section != "audit" else ():
            assert f"--{name.replace('_', '-')} " in shell.out, "no flag is cut"
    words = " ".join(shell.out.replace("│", " ").split())
    for default in ("2GiB", "1%", "30m", "256", "1000", "prefix", "auto"):
        assert f"Default: {default}." in words
    assert max(map(len, shell.out.splitlines())) <= 80


def test_an_unexpected_error_names_its_place_but_not_its_text(
    shell: Shell, prompts: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise RuntimeError("the prompt was: a secret")

    monkeypatch.setattr("pipeline.run.plan_job", fail)
    assert shell("plan", prompts, "--model", model, "--engine", "echo") == 1
    assert "secret" not in shell.err
    assert "RuntimeError in test_app.py" in shell.err
    monkeypatch.setattr("sys.argv", ["coppice", "--debug", "plan", prompts, "--model", model])
    with pytest.raises(RuntimeError, match="secret"):
        cli.main()


def test_the_demo_runs_audits_and_reports(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    write_model(folder / "demo_model")
    write_prompts(
        folder / "prompts.parquet", [f"what do you say to number {i}?" for i in range(20)]
    )
    monkeypatch.setattr("pipeline.cli.demo.demo_folder", lambda: folder)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    assert shell("demo", "-o", "out", "--progress", "plain") == 0
    assert "20 ok, 0 failed" in shell.out
    assert "PASS (tier exact)" in shell.out
    assert max(map(len, shell.out.splitlines())) <= 80
    for name in ("report.html", "plan/plan.parquet", "audit/audit.parquet"):
        assert (out / name).exists() and f"out/{name}" in shell.out


def test_the_echo_engine_cannot_be_audited(
    shell: Shell, prompts: str, model: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    job = ("run", prompts, "-o", out, "--model", model, "--engine", "echo")
    assert shell(*job, "--fail-on-error", "1") == 0
    assert shell("audit", out) == 2
    assert "echo" in shell.err


def test_where_a_url_cannot_be_written_it_is_refused(
    shell: Shell, prompts: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = ("--model", model, "--engine", "echo")
    assert shell("plan", prompts, "-o", "s3://bucket/plan", *job) == 2
    assert "not a folder of this machine" in shell.err
    assert shell("demo", "-o", "s3://bucket/demo") == 2
    assert shell("convert", prompts, "s3://bucket/out.jsonl") == 2
    assert "convert writes a file of this machine" in shell.err
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]


def test_storage_options_are_shown_without_secrets(shell: Shell, prompts: str, model: str) -> None:
    options = ("region=eu-west-1", "access_key_id=CANARY", "secret_access_key=CANARY")
    flags = [part for option in options for part in ("--storage-options", option)]
    assert shell("run", prompts, "-o", "out", "--model", model, *flags, "--print-config") == 0
    assert yaml.safe_load(shell.out)["storage-options"] == {"region": "eu-west-1"}
    assert shell("status", "s3://bucket/x", "--storage-options", "secrt_access_key=CANARY") == 2
    assert "no option 'secrt_access_key'" in shell.err and "CANARY" not in shell.err


def test_status_can_be_watched_until_the_job_ends(
    shell: Shell, prompts: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: with the look again left out, it ends on a job that is running."""
    out = tmp_path / "out"
    job = ("run", prompts, "-o", str(out), "--model", model, "--engine", "echo")
    assert shell(*job, "--fail-on-error", "1") == 0
    looks: list[str] = []

    def read(run: Location) -> dict[str, Any]:
        looks.append(str(run))
        state = read_status(run)
        status = ("waiting", "planning", "running")[len(looks) - 1 : len(looks)]
        return state | ({"status": status[0]} if status else {})

    monkeypatch.setattr("pipeline.status.wait_for_status", read)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert shell("status", str(out), "--watch") == 0
    assert len(looks) == 4
    assert "complete" in shell.out and "3 of 3" in shell.out
