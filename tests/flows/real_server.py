"""A real Prefect server and what serves nights to it, in processes of their own."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.tiny_job import hide_encoder

ROOT = Path(__file__).resolve().parents[2]
_NEVER = "0 2 29 2 *"  # a schedule that does not fire during a test
_PATIENCE_S = 180.0
_TIMEOUT_S = 20.0  # for one request; where all share one core, the server may take a minute's rest
# What a server and a runner do every few seconds, they do here more often.
_FAST = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "3",
    "PREFECT_SERVER_EVENTS_PROACTIVE_GRANULARITY": "PT2S",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "OMP_NUM_THREADS": "1",
}


class Process:
    """A command in a session of its own, with a log."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                command, env=environment, cwd=log.parent, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=_in_background,
            )  # fmt: skip

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the command itself."""
        return self._popen.pid

    def wait(self) -> int:
        """Its exit code, when it ends by itself."""
        return self._popen.wait(_PATIENCE_S)

    def end(self, number: int = signal.SIGKILL, whole_group: bool = True) -> int:
        """Signal it, wait, and return its exit code."""
        try:
            (os.killpg if whole_group else os.kill)(self._popen.pid, number)
        except ProcessLookupError:
            pass
        return self._popen.wait(_PATIENCE_S)


def _in_background() -> None:
    """As a shell starts what ends in `&`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PrefectServer:
    """Below `folder`: the database, the home of its clients, and a log for each process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/api"
        self._no_encoder = hide_encoder(folder / "no_encoder")
        self.database = folder / "server" / "prefect.db"
        self._started: list[Process] = []
        self._process: Process | None = None
        # One for all requests, for to make one takes 30 ms; no connection outlives a request, as
        # the server is killed now and then.
        self._client = httpx.Client(
            timeout=_TIMEOUT_S, limits=httpx.Limits(max_keepalive_connections=0)
        )

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever talks to this server, as a person would set it."""
        own = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
        return (
            own
            | _FAST
            | {
                "PREFECT_API_URL": self.url,
                "PREFECT_HOME": str(self.folder / "me"),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": os.pathsep.join(
                    [self._no_encoder, str(ROOT), os.environ.get("PYTHONPATH", "")]
                ),
                "COPPICE_LOCKS": str(self.folder / "locks"),
            }
        )

    def start(self) -> None:
        """Start it, again on the same database, and wait until it answers."""
        environment = self.environment | {"PREFECT_HOME": str(self.database.parent)}
        command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui"]
        self._process = Process(
            [*command, "--host", "127.0.0.1", "--port", str(self._port)],
            environment,
            self.folder / "server.log",
        )
        wait_for(self._answers, "the server to answer")

    def stop(self) -> None:
        """As a power cut does."""
        assert self._process is not None
        self._process.end()

    def stop_all(self) -> None:
        """It and whatever was started for it."""
        for process in self._started:
            process.end()
        self.stop()
        self._client.close()

    def run(self, *words: str, **environment: str) -> Process:
        """`python -m WORDS` as a client of this server."""
        process = Process(
            [sys.executable, "-m", *words],
            self.environment | environment,
            self.folder / f"{len(self._started)}-{words[0]}.log",
        )
        self._started.append(process)
        return process

    def serve(self, file: Path, name: str, cron: str = _NEVER, **environment: str) -> Process:
        """`coppice schedule`, and wait until the deployment is there."""
        words = ("kvcoppice.flows", "schedule", str(file), "--cron", cron, "--timezone", "UTC")
        process = self.run(*words, "--name", name, **environment)
        wait_for(lambda: self.deployment(name) is not None, f"{name} to be served", process)
        return process

    def deployment(self, name: str) -> dict[str, Any] | None:
        """None if there is none."""
        answer = self._ask("GET", f"deployments/name/coppice-nightly/{name}")
        return answer.json() if answer.status_code == 200 else None

    def post(self, path: str, **body: Any) -> Any:
        """The answer's JSON."""
        answer = self._ask("POST", path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def begin(self, name: str, **parameters: Any) -> str:
        """Let the deployment run now, and return the run's id."""
        deployment = self.deployment(name)
        assert deployment is not None
        run = self.post(
            f"deployments/{deployment['id']}/create_flow_run",
            parameters=parameters,
            state={"type": "SCHEDULED"},
            idempotency_key=secrets.token_hex(8),  # asked twice, it is still one run
        )
        return str(run["id"])

    def flow_run(self, run: str) -> dict[str, Any]:
        """As the server has it."""
        found: dict[str, Any] = self._ask("GET", f"flow_runs/{run}").json()
        return found

    def ended(self, run: str, patience_s: float = _PATIENCE_S) -> dict[str, Any]:
        """The final state of a run, as soon as it has one."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        wait_for(
            lambda: self.flow_run(run)["state_type"] in final, f"{run} to end", None, patience_s
        )
        state: dict[str, Any] = self.flow_run(run)["state"]
        return state

    def artifacts(self, run: str) -> dict[str, Any]:
        """Data by key."""
        found = self.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})
        return {artifact["key"]: artifact["data"] for artifact in found}

    def _ask(self, method: str, path: str, **asked: Any) -> httpx.Response:
        """Ask again while it is busy, as Prefect's own client does: SQLite has one writer."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                url = f"{self.url}/{path}"
                answer = self._client.request(method, url, **asked)
                if answer.status_code != 503 or time.monotonic() > deadline:
                    return answer
            except httpx.TimeoutException:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return self._client.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False


def wait_for(
    is_so: Callable[[], Any],
    what: str,
    process: Process | None = None,
    patience_s: float = _PATIENCE_S,
) -> None:
    """Wait, and fail with what `process` said."""
    deadline = time.monotonic() + patience_s
    while not is_so():
        said = process.log if process else ""
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s for {what}\n{said}"
        time.sleep(0.25)
