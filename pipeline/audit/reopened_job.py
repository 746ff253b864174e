"""The job of a run directory, opened again by what it recorded, or found to be another one now."""

from __future__ import annotations

from pipeline.errors import InputError, ModelError, RunDirectoryError
from pipeline.job.job import Job, open_job
from pipeline.job.recorded import recall_settings
from pipeline.model.identity import THREADS
from pipeline.storage.run_directory import RunDirectory
from pipeline.store_settings import ObjectStoreSettings


def reopen_job(directory: RunDirectory, store: ObjectStoreSettings | None = None) -> Job:
    """The job of a run directory, from what it recorded. Raises as `check_same`."""
    manifest = directory.read_manifest()
    settings = recall_settings(directory)
    if "argument" not in manifest.get("input", {}):
        raise RunDirectoryError(f"{directory.name} does not say how it was made; run the job again")
    settings = settings.model_copy(
        update={"store": settings.store.overridden_by(store or settings.store)}
    )
    return check_same(open_job(manifest["input"]["argument"], settings), directory)


def check_same(job: Job, directory: RunDirectory) -> Job:
    """The job, if it is that of the run directory. Raises InputError or ModelError if it is not."""
    now, before = job.fingerprint, directory.read_manifest()["fingerprint"]
    if now["input"] != before.get("input"):
        raise InputError(
            f"{job.input} has changed since the run in {directory.name}; "
            "bring the old file back, or run the new one into another folder"
        )
    # An audit computes both sides of every comparison itself, with the threads that it has.
    names = [*now, *(name for name in before if name not in now)]
    changed = [n for n in names if n != THREADS and now.get(n) != before.get(n)]
    read, scoring, reuse = job.settings.read, job.settings.scoring, job.settings.reuse
    files = {"template": read.template, "questions": scoring.questions, "adapter": reuse.adapter}
    for what, path in files.items():
        if what in changed:
            raise InputError(
                f"the {what} in {path} changed since the run in {directory.name}; bring the old "
                "file back"
            )
    if changed:
        raise ModelError(
            f"{job.settings.model.model} is not the model of the run in {directory.name} any more: "
            f"{changed[0]} differs; bring the old one back"
        )
    return job
