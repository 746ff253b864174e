"""Engines for workers of the tests' cluster: found there by their names, told what to do by files.

A worker is another process, so what a test wants of it goes through a folder, named by the
environment variable `FOLDER` at the time when the cluster began.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.engine.base import NO_HOOKS, Engine, EngineHooks, RunControl
from pipeline.engine.load import make_engine
from pipeline.plan.plan import Plan
from pipeline.records import Completion
from pipeline.settings import JobSettings
from tests.job.carrying_engine import CarryingEngine

FOLDER = "COPPICE_TEST_WORKERS"


def folder() -> Path:
    return Path(os.environ[FOLDER])


def make_watched(settings: JobSettings) -> Engine:
    """The engine that a job gets, with eyes and ears: `<pid>.worker` appears in the folder, each
    answer waits for as many seconds as `pace` says, and a prompt that is in `poison` kills."""
    engine = make_engine(settings)
    folder().joinpath(f"{os.getpid()}.worker").touch()
    generate = engine.generate

    def watched(
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        poison = _read("poison")
        for completion in generate(plan, sequences, control):
            ids = plan.prompt_token_ids(completion.sequence).tolist()
            if poison and poison == " ".join(map(str, ids)):
                os.kill(os.getpid(), signal.SIGKILL)
            folder().joinpath(f"{os.getpid()}.answered").touch()
            time.sleep(float(_read("pace") or 0))
            yield completion

    engine.generate = watched  # type: ignore[method-assign]
    return engine


def make_carrying(settings: JobSettings) -> Engine:
    """One without a model, whose turns tell what was given up."""
    return CarryingEngine()


def _read(name: str) -> str:
    path = folder() / name
    return path.read_text() if path.exists() else ""
