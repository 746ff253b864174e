"""What a person sees when the cluster itself is not there, not theirs, or gone: the real command
against a cluster of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.status import read_status
from tests.executor import ray_engines
from tests.tiny_job import answers, write_prompts

_HEAD = """
import ray, sys
context = ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
    logging_level="ERROR", object_store_memory=100 << 20,
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown(wait_for_processes=True)
"""
# The command, with workers that can be told to be slow and a shorter patience than Ray's minute.
_COMMAND = """
from functools import partial
from pipeline import run
from pipeline.cli import app as cli
from pipeline.executor import ray_crew
from tests.executor import ray_engines
run.run_job = partial(run.run_job, make_engine=ray_engines.make_watched)
ray_crew._HEAD_SILENT_S = 4.0
cli.main()
"""


@dataclass
class Head:
    """A cluster in processes of its own."""

    process: subprocess.Popen[str]
    address: str
    environment: dict[str, str]

    def kill_gcs(self) -> None:
        """What every member of the cluster must reach."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        (gcs,) = [child for child in children if child.name() == "gcs_server"]
        gcs.kill()


@pytest.fixture
def head(ray_environment: dict[str, str], tmp_path: Path) -> Iterator[Head]:
    environment = {
        **os.environ,
        **ray_environment,
        "RAY_AUTH_MODE": "token",
        ray_engines.FOLDER: str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    members: list[psutil.Process] = []
    try:
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start"
        members = psutil.Process(process.pid).children(recursive=True)
        yield Head(process, address, environment)
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        for member in members:
            if member.is_running():
                member.kill()
        process.wait()
        process.stdout.close()


def start_job(head: Head, source: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    arguments = [
        "run", str(source), "-o", str(out), "--model", str(source.parent / "model"),
        "--engine", "echo", "--max-new-tokens", "4", "--rows-per-part", "5", "--progress", "none",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments, *flags],
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.fault(
    "the cluster's head dies",
    injected="kill -9 of the Ray head's gcs_server while two actors compute",
    outcome="exit code 1 in seconds with what to type; parts intact; resumed without the cluster",
)
def test_a_head_that_dies_ends_the_job_in_a_sentence(
    head: Head, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Seen red: without looking after the head, Ray ends the process after a minute and run.json
    says that the job is running."""
    (tmp_path / "model").symlink_to(tokenizer_folder)
    source = write_prompts(tmp_path / "p.parquet", [f"prompt {i}" for i in range(400)])
    out = tmp_path / "out"
    on_ray = ("--executor", "ray", "--num-workers", "2", "--ray-address", head.address)

    (tmp_path / "pace").write_text("0.05")
    job = start_job(head, source, out, *on_ray)
    deadline = time.monotonic() + 60
    while not any((out / "data").glob("part-*")):
        assert time.monotonic() < deadline and job.poll() is None, job.communicate()
        time.sleep(0.1)
    head.kill_gcs()
    killed = time.monotonic()
    said = job.communicate(timeout=50)[1]
    assert time.monotonic() - killed < 40
    assert job.returncode == 1
    assert "head of the Ray cluster" in said.splitlines()[-1] and "same command" in said
    assert read_status(Location(out))["status"] == "failed"
    committed = answers(out).height
    assert 5 <= committed < 400

    resumed = start_job(head, source, out)
    assert resumed.communicate(timeout=60) and resumed.returncode == 0
    assert answers(out)["row_index"].to_list() == list(range(400))
    assert answers(out)["generated_text"].to_list() == [
        f"prompt {i}"[-4:][::-1] for i in range(400)
    ]


@pytest.mark.slow
def test_a_wrong_token_is_said(head: Head, tmp_path: Path, tokenizer_folder: Path) -> None:
    """Ray itself tries for twenty seconds and says it in forty lines."""
    (tmp_path / "model").symlink_to(tokenizer_folder)
    source = write_prompts(tmp_path / "p.parquet", ["prompt"])
    head.environment |= {"RAY_AUTH_TOKEN": "0" * 64}
    job = start_job(
        head, source, tmp_path / "out", "--executor", "ray", "--ray-address", head.address
    )
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 2 and "RAY_AUTH_TOKEN" in said.splitlines()[-1]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1"])
def test_no_cluster_at_the_address_is_said_at_once(
    ray_environment: dict[str, str], address: str
) -> None:
    from pipeline.executor.ray_crew import connect

    begin = time.monotonic()
    with pytest.raises(UsageError, match=f"no Ray cluster answers at {address}.*ray start --head"):
        connect(address)
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize("address", ["somewhere", "ray://head:10001", "head:port"])
def test_what_is_no_address_is_a_usage_error(ray_environment: dict[str, str], address: str) -> None:
    from pipeline.executor.ray_crew import connect

    with pytest.raises(UsageError, match="is not like 10.0.0.1:6379"):
        connect(address)


def test_workers_run_ours_where_a_person_has_a_pipeline_of_their_own(
    head: Head, tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Seen red: each worker imported theirs and was "lost: its process or its machine died"."""
    (tmp_path / "model").symlink_to(tokenizer_folder)
    (tmp_path / "pipeline.py").write_text("raise SystemExit('this is their pipeline')\n")
    source = write_prompts(tmp_path / "p.parquet", ["one", "two"])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvcoppice", "run", str(source), "-o", "out",
         "--model", "model", "--engine", "echo", "--max-new-tokens", "4",
         "--executor", "ray", "--ray-address", head.address],
        env=head.environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(answers(tmp_path / "out")) == 2
