"""The file of a nightly job, and one night of it. Knows nothing about how a night is done.

The file is flat, like `--config`: the fields of `NightSettings`, and every setting of `coppice run`
and `coppice audit` beside them. Relative paths are below the folder of the file, so that a night
means the same whoever starts it.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.errors import UsageError
from pipeline.forms import Section, say_fault
from pipeline.location import Location, is_url
from pipeline.settings import JobSettings, check_known
from pipeline.settings_file import read_config
from pipeline.store_settings import ObjectStoreSettings

_DATE = re.compile(r"\{date(?::([^{}]*))?\}")
_PATHS = ("input", "output", "publish", "template", "chat_template", "questions", "metrics_file")


class NightSettings(Section):
    """What a night has that a run has not. Paths are absolute, or below `s3://`.

    `catch_up`: unfinished nights of so many days before are finished first.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    input: str = Field(min_length=1)
    output: str = Field(min_length=1)
    publish: str | None = Field(default=None, min_length=1)
    on_no_input: Literal["fail", "skip"] = "fail"
    catch_up: int = Field(default=7, ge=0, le=366)

    @field_validator("input")
    @classmethod
    def _knows_its_placeholders(cls, text: str) -> str:
        unknown = re.search(r"\{[^{}]*\}", _DATE.sub("", text))
        if unknown:
            raise ValueError(f"{unknown[0]} is not known; write {{date}} or {{date:%Y/%m/%d}}")
        return text

    @field_validator("output", "publish")
    @classmethod
    def _adds_the_date_itself(cls, text: str | None) -> str | None:
        if text is not None and "{date" in text:
            raise ValueError("a folder for the date is made in it; leave {date} out")
        return text

    @model_validator(mode="after")
    def _keep_publication_apart(self) -> NightSettings:
        if self.publish is not None:
            check_apart(Location(self.home), Location(self.publish))
        return self

    @property
    def home(self) -> str:
        """Where the run directories of all nights are: OUTPUT/NAME."""
        return f"{self.output.rstrip('/')}/{self.name}"


@dataclass(frozen=True)
class Night:
    """A nightly job on one logical date.

    It is also what a chat template that prints the date takes for now, whenever the night ends.
    """

    settings: NightSettings
    job: JobSettings
    date: datetime.date

    @classmethod
    def on(cls, day: datetime.date, settings: NightSettings, job: JobSettings) -> Night:
        """The night of `day`."""
        clock = datetime.datetime.combine(day, datetime.time())
        tokens = job.tokens.model_copy(update={"clock": clock})
        return cls(settings, job.model_copy(update={"tokens": tokens}), day)

    def reached_by(self, store: ObjectStoreSettings) -> Night:
        """The same night, with these options of object stores over its own."""
        job = self.job.model_copy(update={"store": self.job.store.overridden_by(store)})
        return replace(self, job=job)

    @property
    def input(self) -> str:
        """Path, glob or URL of its prompts, with the date in it."""
        form = self.date.strftime
        return _DATE.sub(lambda found: form(found[1] or "%Y-%m-%d"), self.settings.input)

    @property
    def home(self) -> Location:
        """Where the run directories of all nights of the job are."""
        return Location(self.settings.home, self.job.store)

    @property
    def run(self) -> Location:
        """Its run directory, which the date is the name of."""
        return Location(f"{self.settings.home}/{self.date.isoformat()}", self.job.store)

    @property
    def target(self) -> Location | None:
        """Where it is published, below its date; None: nowhere."""
        path = self.settings.publish
        return None if path is None else Location(path, self.job.store)

    @property
    def awaited_folder(self) -> Path | None:
        """The folder that is there on every day, if it is one of this machine: a mounted disk."""
        if is_url(self.settings.input):
            return None
        parts = Path(self.settings.input).parts
        varies = (i for i, part in enumerate(parts) if "{date" in part or re.search(r"[*?[]", part))
        return Path(*parts[: next(varies, len(parts) - 1)])


def read_night(path: Path, day: datetime.date) -> Night:
    """The night of `day`. Raises UsageError naming file and field."""
    try:
        return _make_night(_with_absolute_paths(read_config(path), path.absolute().parent), day)
    except ValidationError as error:
        raise UsageError(f"{path}: {say_fault(error)}") from None
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def check_apart(runs: Location, target: Location) -> None:
    """Raises ValueError if one lies in the other: readers would meet runs that are not finished."""
    if runs.overlaps(target):
        raise ValueError(f"{target} and {runs}, where runs are, must not lie in one another")


def _make_night(written: dict[str, Any], day: datetime.date) -> Night:
    own = {key: value for key, value in written.items() if key in NightSettings.model_fields}
    rest = {key: value for key, value in written.items() if key not in own}
    check_known(rest, NightSettings.model_fields)
    settings = NightSettings.model_validate({k: v for k, v in own.items() if v is not None})
    if rest.get("model") is None:
        raise UsageError("no model is named; add model: FOLDER or a hub id like org/name")
    if rest.get("num_shards") not in (None, 1):
        raise UsageError("setting num-shards: a night is one run; leave it out")
    job = JobSettings.from_flat(rest)
    if job.tokens.clock is not None:
        raise UsageError("setting clock: that of a night is its date; leave it out")
    return Night.on(day, settings, job)


def _with_absolute_paths(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    def absolute(text: str) -> str:
        return text if is_url(text) else os.path.normpath(folder / os.path.expanduser(text))

    change: dict[str, Callable[[str], str]] = dict.fromkeys(_PATHS, absolute)
    if isinstance(written.get("model"), str) and os.path.isdir(absolute(written["model"])):
        change["model"] = absolute  # else the id of a hub
    return {
        key: change[key](value) if key in change and isinstance(value, str) and value else value
        for key, value in written.items()
    }
