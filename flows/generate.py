"""One job as a flow: plan and generate, resumed by Prefect's own retry.

A job that stalls and comes back is retried; one stuck in a call that never returns ends the process
of the flow, which a worker reports as crashed. Run flows in processes of their own, as workers do.
"""

from flows.artifacts import PrefectObserver
from flows.credentials import find_credentials
from flows.parameters import JobForm, checked_flow
from flows.tasks import as_task
from pipeline.errors import UsageError
from pipeline.run import run_job
from pipeline.settings import JobSettings


@checked_flow("coppice-generate")
def generate(
    input: str, output: str, settings: JobForm, credentials: str | None = None
) -> dict[str, float]:
    """Generate an answer for every row of `input` into `output`; returns the counters.

    `credentials`: a block of S3 credentials of this name.
    """
    with PrefectObserver() as observer:

        def run() -> dict[str, float]:
            flat = settings.flat()
            if "model" not in flat:
                raise UsageError("no model is named; fill in model, or name it in the file config")
            job = JobSettings.from_flat(flat)
            store = job.store.overridden_by(find_credentials(credentials))
            return run_job(
                input, output, job.model_copy(update={"store": store}), observer
            ).counters

        return as_task("generate", run)
