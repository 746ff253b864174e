"""Workers as actors of a Ray cluster. The only module that knows Ray.

An actor has one device: a GPU where the cluster has them, else an even part of the CPUs. Each has
at most one call to answer, and a worker that dies ends its call with an error.

Ray ends a driver that cannot reach the cluster's head for a minute, without a word of ours; so the
head is looked after here, and given up before.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray
from ray import cloudpickle, exceptions

from pipeline.engine.base import EngineFactory
from pipeline.errors import EngineError, UsageError
from pipeline.executor.base import Crew, Event, Hello, Lost, Order, Report
from pipeline.executor.staff import RESUME
from pipeline.executor.worker import Worker
from pipeline.settings import FleetSettings, JobSettings

_CONNECT_S = 5.0
_HEAD_EVERY_S = 2.0
_HEAD_SILENT_S = 20.0
_FETCH_S = 30.0
_GOODBYE_S = 15.0
_REASONS = {
    "ActorDiedError": "its process or its machine died",
    "ActorUnavailableError": "it cannot be reached",
    "OutOfMemoryError": "its machine ran out of memory",
}


@dataclass(frozen=True)
class Share:
    """What each worker gets of the cluster, and how many of them one machine may have."""

    size: int
    cpus: int
    gpus: int
    on_a_node: int


class RayCrew(Crew):
    """Actors of a cluster. Raises UsageError where there is no cluster, or too small a one."""

    def __init__(self, settings: JobSettings, make: EngineFactory, decode_weight: float) -> None:
        """`make` builds a worker's engine, on its machine; by reference, so it must be importable
        there."""
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            connect(settings.fleet.ray_address)
        self._head = _host_and_port(ray.get_runtime_context().gcs_address)
        self._head_seen = self._head_asked = time.monotonic()
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, int] = {}
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._share = share = share_out(nodes, settings.fleet, settings.model.device)
        except BaseException:
            self.close()
            raise
        self.size = share.size
        self._packed = cloudpickle.dumps(partial(_fitted, make, settings, decode_weight, share))
        what = "a GPU" if share.gpus else f"{share.cpus} CPUs" if share.cpus > 1 else "a CPU"
        self.notes = [f"ray: {share.size} workers with {what} each, of {len(nodes)} machines"]

    def hire(self, worker: int) -> None:
        options = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus}
        remote = ray.remote(_actor()).options(
            **options, scheduling_strategy="SPREAD", max_restarts=0
        )
        actor = self._actors[worker] = remote.remote()
        self._calls[actor.start.remote(self._packed)] = worker

    def send(self, worker: int, order: Order) -> None:
        self._calls[self._actors[worker].step.remote(order)] = worker

    def receive(self, timeout_s: float) -> Sequence[tuple[int, Event]]:
        self._check_head()
        if not self._calls:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(list(self._calls), timeout=timeout_s)
        if ready:  # and whatever else has come by now
            ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        return [(self._calls[call], self._fetch(call)) for call in ready]

    def close(self) -> None:
        goodbye = threading.Thread(target=self._let_go, name="goodbye", daemon=True)
        goodbye.start()
        goodbye.join(_GOODBYE_S)

    def _fetch(self, call: Any) -> Event:
        worker = self._calls.pop(call)
        try:
            event: Hello | Report = ray.get(call, timeout=_FETCH_S)
            return event
        except exceptions.RayTaskError as error:  # its message may quote a prompt
            reason = f"it failed with {type(error.cause).__name__}"
        except exceptions.RayError as error:
            kind = type(error).__name__
            reason = _REASONS.get(kind, kind)
        _kill(self._actors.pop(worker))  # one that is only cut off must not go on
        return Lost(reason)

    def _let_go(self) -> None:
        for actor in self._actors.values():
            _kill(actor)
        if self._is_ours:
            ray.shutdown()

    def _check_head(self) -> None:
        """Raises EngineError where the head has been silent for too long."""
        now = time.monotonic()
        if now - self._head_asked < _HEAD_EVERY_S:
            return
        self._head_asked = now
        if _answers(self._head, _HEAD_EVERY_S):
            self._head_seen = now
        elif now - self._head_seen > _HEAD_SILENT_S:
            host, port = self._head
            raise EngineError(
                f"the head of the Ray cluster at {host}:{port} has not answered for "
                f"{now - self._head_seen:.0f} s; start the cluster again; {RESUME}, on Ray or "
                "with --executor local"
            )


def _actor() -> type:
    """The class of a worker's process, which Ray sends there by value, as it does local classes.

    By its name, the worker would look for `pipeline` where the driver was started, and a person
    may have a pipeline.py of their own there.
    """

    class Actor:
        def start(self, packed: bytes) -> Hello:
            import pickle
            from importlib import import_module

            import_module("kvcoppice.own_modules").load("pipeline")
            self._worker: Worker = pickle.loads(packed)()
            hello: Hello = self._worker.start()
            return hello

        def step(self, order: Order) -> Report:
            return self._worker.step(order)

    return Actor


def _fitted(make: EngineFactory, settings: JobSettings, weight: float, share: Share) -> Worker:
    """A worker that fits itself to its share of a machine before it loads torch."""
    if not share.gpus:
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(share.cpus))
    if settings.engine.kv_budget is None and not share.gpus:
        # Each would take half of what is free, and none can see what the others will take.
        budget = psutil.virtual_memory().available // 2 // share.on_a_node
        engine = settings.engine.model_copy(update={"kv_budget": budget})
        settings = settings.model_copy(update={"engine": engine})
    return Worker(lambda: make(settings), weight)


def connect(address: str | None) -> None:
    """Join the cluster at `address`; without one the cluster that Ray itself finds
    (RAY_ADDRESS, or one of this machine), else begin one on this machine.

    Raises UsageError within seconds where there is none.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    where = address or "this machine"
    if address is not None and address not in ("auto", "local"):
        if not _answers(_host_and_port(address), _CONNECT_S):
            raise UsageError(
                f"no Ray cluster answers at {address}; start one (ray start --head), correct "
                "--ray-address, or leave it out to use this machine"
            )
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(int(_CONNECT_S)))
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, exceptions.RayError) as error:
        raise UsageError(f"cannot join a Ray cluster at {where}: {_why(error)}") from None


def _why(error: BaseException) -> str:
    """What to do about it, as far as Ray tells."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    said = " ".join(map(str, chain))
    if "AuthToken" in said or "AuthenticationError" in said:
        return "it wants a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
    if "local Raylet" in said or "Can't find a" in said:
        return "this machine is no part of it; run here: ray start --address=..."
    kind = type(error).__name__
    return f"{kind}; see whether `ray status` works here, or start one: ray start --head"


def share_out(nodes: list[dict[str, float]], settings: FleetSettings, device: str) -> Share:
    """A worker for each GPU where there are any, else one for each machine, or as many as asked.

    `nodes`: resources of each machine. Raises UsageError where it has not that many.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is one of this machine; leave it out with Ray")
    gpus = [0 if device == "cpu" else int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if device == "cuda" and not sum(gpus):
        raise UsageError("the Ray cluster has no GPU; leave out --device cuda")
    room = gpus if sum(gpus) else cpus
    size = settings.num_workers or (sum(gpus) or sum(number > 0 for number in cpus))
    if not 0 < size <= sum(room):
        raise UsageError(
            f"the Ray cluster has {sum(gpus)} GPUs and {sum(cpus)} CPUs, too few for "
            f"{size or 'any'} workers; give a smaller --num-workers or start more machines"
        )
    if sum(gpus):
        return Share(size, 1, 1, max(gpus))
    each = max(c for c in range(1, max(cpus) + 1) if sum(n // c for n in cpus) >= size)
    return Share(size, each, 0, min(size, max(cpus) // each))


def _answers(address: tuple[str, int], timeout_s: float) -> bool:
    try:
        socket.create_connection(address, timeout_s).close()
    except OSError:
        return False
    return True


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "//" in host:
        raise UsageError(f"--ray-address {address} is not like 10.0.0.1:6379, auto or local")
    return host.strip("[]"), int(port)


def _kill(actor: Any) -> None:
    with suppress(ValueError, RuntimeError, exceptions.RayError):  # it is gone, or Ray is
        ray.kill(actor)
