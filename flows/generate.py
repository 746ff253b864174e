"""The main job as a flow: plan and generate, resumed by Prefect's own retry.

A job that stalls and comes back is retried; one stuck in a call that never returns ends the process
of the flow, which a worker reports as crashed. Run flows in processes of their own, as workers do.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.artifacts import PrefectObserver
from flows.tasks import as_task
from pipeline.run import run_job
from pipeline.settings import JobSettings
from pipeline.terminal.kept_settings import whole_settings


@flow(name="coppice-generate", persist_result=False)
def generate(input: str, output: str, settings: dict[str, Any]) -> dict[str, float]:
    """Generate an answer for every row of `input` into `output`; returns the counters.

    `settings` by flag names, and `config`, the path of a YAML file of more of them: Prefect keeps
    what is passed here, and not what stands there.
    """
    with PrefectObserver() as observer:

        def run() -> dict[str, float]:
            job = JobSettings.from_flat(whole_settings(settings))
            return run_job(input, output, job, observer).counters

        return as_task("generate", run)
