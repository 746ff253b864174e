"""The arms of this environment on a tiny model: float32 tokens must be identical."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import scratch
from benchmarks.arm import make_arm
from benchmarks.arms import ARMS, Arm
from benchmarks.job import Job, read_answers
from benchmarks.launcher import run_arm, shorten
from benchmarks.prompts import distinct_prompts, shared_prompts
from benchmarks.shapes import model_folder


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(scratch.VARIABLE, str(tmp_path_factory.mktemp("bench")))
        folder = model_folder("tiny", "float32")
    prompts = shared_prompts(4, 20, 5, 32768) + distinct_prompts(3, (3, 40), 32768)
    return Job(str(folder), "float32", 4, [prompts], rows_at_once=3)


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scratch.VARIABLE, str(tmp_path))


@pytest.mark.parametrize("arm", ["unshared", "naive", "generate"])
def test_arms_agree(job: Job, arm: str) -> None:
    ours = make_arm("prefix", job).generate(job.batches[0], 4)
    assert [len(row) for row in ours] == [4] * 7
    assert make_arm(arm, job).generate(job.batches[0], 4) == ours


def test_an_arm_answers_batch_by_batch(job: Job) -> None:
    outcome = run_arm("prefix", replace(job, batches=[[[1, 2]], [[1, 2], [1, 3]]]), 120)
    assert outcome.failure is None
    first, second = outcome.answers
    assert (first["batch"], second["batch"]) == (0, 1)
    assert second["token_ids"][0] == first["token_ids"][0]
    assert first["startup_s"] > first["seconds"] > 0
    assert second["counters"]["prefilled_tokens"] == 3


def test_an_arm_that_takes_too_long_says_so(job: Job) -> None:
    outcome = run_arm("prefix", job, limit_s=0.1)
    assert (outcome.answers, outcome.failure) == ([], "did not finish in 0.1 s")


def test_an_arm_that_fails_says_why_without_a_folder(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"print('some log'); raise ValueError({str(tmp_path / 'weights')!r} + ' is absent')"
    monkeypatch.setattr(Arm, "command", lambda self, name: [sys.executable, "-c", code])
    outcome = run_arm("prefix", job, 60)
    assert outcome.failure == "failed after 0 s (exit 1): ValueError: weights is absent"


def test_a_peer_without_an_environment_is_a_failure_not_the_end(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COPPICE_BENCH_VLLM", str(tmp_path))
    outcome = run_arm("vllm", job, 60)
    assert outcome.failure is not None and "without bin/python" in outcome.failure


def test_a_line_cut_off_by_the_time_limit_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "answer").write_text('{"batch": 0}\n{"batch": 1')
    assert read_answers(tmp_path / "answer") == [{"batch": 0}]
    assert read_answers(tmp_path / "absent") == []


def test_messages_name_no_folder_and_no_host() -> None:
    said = shorten("OSError: /home/someone/x/lib.so\n not at https://host.example/simple")
    assert said == "OSError: lib.so not at …"


def test_nothing_in_the_scratch_folder_reaches_git(tmp_path: Path) -> None:
    assert scratch.scratch("logs") == tmp_path / "logs"
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_peer_scripts_stand_alone() -> None:
    peers = Path(scratch.ROOT / "benchmarks" / "peers")
    for script in [*peers.glob("*_arm.py"), *peers.glob("*_export.py")]:
        words = ("from benchmarks", "import benchmarks", "pipeline.", "import pipeline")
        assert not [w for w in words if w in script.read_text()], script
    assert {arm.environment for arm in ARMS.values()} == {None, "vllm", "openvino"}
