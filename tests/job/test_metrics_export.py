"""What Prometheus gets to see of a job: by HTTP while it runs, in a file also after it."""

from __future__ import annotations

import logging
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.errors import EngineError, UsageError
from pipeline.run import run_job
from pipeline.settings import JobSettings, MonitorSettings
from tests.tiny_job import FailingEngine, answers, echo_settings, on, write_prompts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def parse(text: str) -> dict[str, float]:
    """Samples by name; of the state set the one that holds."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"].endswith("/out")
            state = sample.labels.get("coppice_state")
            if state is None or sample.value:
                found[sample.name if state is None else f"state {state}"] = sample.value
    return found


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_prompts(tmp_path / "p.parquet", [f"prompt {i}" for i in range(20)] + [None]))


def test_a_running_job_is_asked_over_http_and_leaves_its_port(
    tmp_path: Path, source: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    heard: list[dict[str, float]] = []
    engine = FailingEngine(10, lambda: heard.append(parse(ask(port))))
    job = echo_settings(tokenizer_folder, metrics_port=str(port), fail_on_error="1")
    outcome = run_job(source, tmp_path / "out", job, make_engine=on(engine))
    assert (
        len(heard) == 1 and {"state waiting", "state planning", "state running"} & heard[0].keys()
    )
    assert outcome.rows_failed == 1
    with pytest.raises(urllib.error.URLError):
        ask(port)


def test_the_file_ends_with_the_numbers_of_run_json(
    tmp_path: Path, source: str, tokenizer_folder: Path
) -> None:
    """Seen red: with the last write left out the file shows the first state for ever."""
    file = tmp_path / "coppice.prom"
    job = echo_settings(tokenizer_folder, metrics_file=str(file), fail_on_error="1")
    counters = run_job(source, tmp_path / "out", job).counters
    found = parse(file.read_text())
    assert found["state complete"] == 1
    assert found["coppice_rows_done"] == counters["rows_in"] == 21
    assert found["coppice_rows_failed"] == counters["rows_error"] == 1
    assert found["coppice_prefilled_tokens_total"] == counters["prefilled_tokens"]
    assert found["coppice_generated_tokens_total"] == counters["generated_tokens"]


def test_a_job_that_fails_says_so_in_the_file(
    tmp_path: Path, source: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall() -> None:
        raise EngineError("the device fell over")

    engine = FailingEngine(10, fall)
    file = tmp_path / "coppice.prom"
    with pytest.raises(EngineError):
        run_job(
            source,
            tmp_path / "out",
            echo_settings(tokenizer_folder, metrics_file=str(file)),
            make_engine=on(engine),
        )
    assert "state failed" in parse(file.read_text())


@pytest.mark.fault(
    "monitoring",
    injected="the port of the metrics is taken; their file lies in no folder",
    outcome="refused before anything is computed",
)
def test_what_cannot_be_exported_is_refused_at_the_start(
    tmp_path: Path, source: str, tokenizer_folder: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UsageError, match="another --metrics-port"):
            job = echo_settings(tokenizer_folder, metrics_port=port)
            run_job(source, tmp_path / "out", job)
    nowhere = echo_settings(tokenizer_folder, metrics_file=str(tmp_path / "no" / "m.prom"))
    with pytest.raises(UsageError, match="another --metrics-file"):
        run_job(source, tmp_path / "out", nowhere)
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(
    "monitoring",
    injected="the disk of the metrics' file fails while the job runs",
    outcome="a warning; the job completes",
)
def test_a_file_that_cannot_be_written_later_stops_no_job(
    tmp_path: Path,
    source: str,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen red: with the OSError raised."""
    folder = tmp_path / "gone"
    folder.mkdir()

    def lose() -> None:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    engine = FailingEngine(3, lose)
    monkeypatch.setattr(logging.getLogger("coppice"), "propagate", True)
    job = echo_settings(tokenizer_folder, metrics_file=str(folder / "m.prom"), fail_on_error="1")
    run_job(source, tmp_path / "out", job, make_engine=on(engine))
    assert len(answers(tmp_path / "out")) == 21
    assert any("the job goes on" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("said", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (9464, ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_the_port_alone_is_for_this_machine_alone(said: object, address: tuple[str, int]) -> None:
    assert MonitorSettings.model_validate({"metrics_port": said}).metrics_address() == address


@pytest.mark.parametrize("said", ["0", "65536", "host", "host:", ""])
def test_a_wrong_port_is_named(said: str) -> None:
    with pytest.raises(UsageError, match="metrics-port"):
        JobSettings.from_flat({"model": "m", "metrics_port": said})
