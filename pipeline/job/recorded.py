"""The settings of a run, as its directory keeps them for the audit. Knows nothing about rows.

`run.json` is made to be shown: it holds no text of a prompt. The system prompt, which the audit
needs again, lies beside it in a file that only its owner may read. What the run took for now is
recorded too: a resume and an audit have the same prompts, on whatever day.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import RunDirectoryError, UsageError
from pipeline.forms import say_fault
from pipeline.job.job import Job
from pipeline.location import Location
from pipeline.model.identity import describe_versions
from pipeline.settings import SECTIONS, JobSettings, check_known
from pipeline.storage.manifest import MANIFEST_NAME
from pipeline.storage.run_directory import SYSTEM_PROMPT_NAME, RunDirectory
from pipeline.storage.run_location import find_manifest
from pipeline.store_settings import ObjectStoreSettings

_PATHS = {
    "tokens": "chat_template", "read": "template", "reuse": "adapter", "scoring": "questions"
}  # fmt: skip
"""Settings that are paths and decide answers, by section."""


def describe_job(job: Job) -> dict[str, Any]:
    """What `run.json` says about a job besides its fingerprint; paths are meant for the audit."""
    tokens = job.settings.tokens.model_copy(update={"system_prompt": None})
    asked = job.source.columns.questions
    return {
        "settings": job.settings.model_copy(update={"tokens": tokens}).model_dump(mode="json"),
        "versions": describe_versions(),
        "device": {
            "asked_for": job.settings.model.device,
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
        },
        **({"questions": [one.record() for one in asked]} if asked else {}),
        "input": {
            "argument": Location(job.input).absolute,
            "rows": job.source.num_rows,
            "files": job.source.summary or "1 file is read",
        },
    }


def keep_system_prompt(directory: RunDirectory, settings: JobSettings) -> None:
    """Write it into the directory, unless it is there. Raises StorageError."""
    text = settings.tokens.system_prompt
    if text is not None and not (directory.root / SYSTEM_PROMPT_NAME).exists():
        directory.write_text(SYSTEM_PROMPT_NAME, text)


def recall_settings(directory: RunDirectory) -> JobSettings:
    """The settings of the run. Raises RunDirectoryError if the directory does not say them."""
    manifest = directory.read_manifest()
    if "settings" not in manifest:
        raise RunDirectoryError(f"{directory.name} does not say how it was made; run the job again")
    try:
        settings = JobSettings.model_validate(manifest["settings"])
    except ValidationError as error:
        where = ".".join(str(step)[:80] for step in error.errors()[0]["loc"])
        raise RunDirectoryError(
            f"{directory.name}/{MANIFEST_NAME} is damaged (settings.{where}: no such setting or "
            "value); bring a copy of it back, or move the folder away and run again"
        ) from error
    if manifest["fingerprint"].get("system_prompt") is None:
        return settings
    try:
        text = (directory.root / SYSTEM_PROMPT_NAME).read_bytes().decode()
    except (OSError, UnicodeError) as error:
        raise RunDirectoryError(
            f"{directory.root / SYSTEM_PROMPT_NAME} is gone or damaged; write the system prompt of "
            "the run into it"
        ) from error
    tokens = settings.tokens.model_copy(update={"system_prompt": text})
    return settings.model_copy(update={"tokens": tokens})


def with_absolute_paths(settings: JobSettings) -> JobSettings:
    """Settings that mean the same from any working directory: they are recorded and read again."""
    changed = dict(settings)
    for section, name in _PATHS.items():
        path = getattr(changed[section], name)
        if path is not None:
            changed[section] = changed[section].model_copy(update={name: path.absolute()})
    if Path(settings.model.model).is_dir():
        model = os.path.abspath(settings.model.model)
        changed["model"] = settings.model.model_copy(update={"model": model})
    return settings.model_copy(update=changed)


def with_changes(
    settings: JobSettings, changes: Mapping[str, Any], store: ObjectStoreSettings
) -> JobSettings:
    """The settings with some changed, flat as flags have them (None: not said), and a store's
    options over those that were recorded, which hold no secret. Raises UsageError."""
    said = {name.replace("-", "_"): v for name, v in changes.items() if v not in (None, [])}
    check_known(said)
    try:
        changed = {
            name: type(section).model_validate(section.model_dump() | own)
            for name, section in settings
            if (own := {key: said[key] for key in type(section).model_fields if key in said})
        }
        changed["store"] = settings.store.overridden_by(store)
        return JobSettings.model_validate(dict(settings) | changed)
    except ValidationError as error:
        raise UsageError(say_fault(error, ("store", "system_prompt"), SECTIONS)) from None


def with_recorded_clock(output: Location, settings: JobSettings) -> JobSettings:
    """The settings with the clock of the run in `output`, where there is one and none is said.

    Raises RunDirectoryError, StorageError.
    """
    manifest = None if settings.tokens.clock else find_manifest(output)
    if manifest is None or "settings" not in manifest:
        return settings
    clock = JobSettings.model_validate(manifest["settings"]).tokens.clock
    tokens = settings.tokens.model_copy(update={"clock": clock})
    return settings.model_copy(update={"tokens": tokens})
