"""The layers that settings are merged from: flags over a YAML file over defaults; and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import UsageError
from pipeline.forms import say_fault
from pipeline.scoring_settings import CHOICES_COLUMN
from pipeline.settings import JobSettings
from pipeline.settings_file import read_config
from pipeline.store_settings import ObjectStoreSettings, parse_storage_options

Section = TypeVar("Section", bound=BaseModel)


def merge(flags: dict[str, Any], config: Path | None) -> JobSettings:
    """Flags over the YAML file over the defaults. Raises UsageError naming field or file."""
    said, written = _said(flags), {} if config is None else read_config(config)
    if len(said.get("choices", ())) == 1:  # a flag that is given once has them all
        (said["choices"],) = said["choices"]
    merged = written | said
    if "storage_options" in written.keys() & said.keys():
        # The file says where the store is, a flag brings the key: neither drops the other.
        try:
            below, above = (parse_storage_options(x["storage_options"]) for x in (written, said))
        except ValueError as error:
            raise UsageError(f"setting storage-options: {error}") from None
        merged["storage_options"] = below | above
    return JobSettings.from_flat(merged)


def merge_scores(flags: dict[str, Any], config: Path | None) -> JobSettings:
    """As `merge`; where nothing says what is scored, it is the column of choices."""
    written = {} if config is None else read_config(config)
    return merge(flags | choices_unless_said(written | _said(flags)), config)


def _said(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value not in (None, [])}


def choices_unless_said(said: Mapping[str, Any]) -> dict[str, str]:
    """The column of choices, where settings do not say what is scored."""
    names = {name.replace("-", "_") for name, value in _said(said).items() if value is not False}
    asked = {"choices_column", "choices", "continuation_column", "prompt_logprobs", "questions"}
    return {} if names & asked else {"choices_column": CHOICES_COLUMN}


def split_store(flags: dict[str, Any]) -> tuple[dict[str, Any], ObjectStoreSettings]:
    """The other flags, and how an object store is reached. Raises UsageError."""
    names = {name for name in flags if name.replace("-", "_") in ObjectStoreSettings.model_fields}
    others = {name: value for name, value in flags.items() if name not in names}
    return others, merge_section(ObjectStoreSettings, {name: flags[name] for name in names})


def merge_section(section: type[Section], flags: dict[str, Any]) -> Section:
    """One section of the settings from its flags alone. Raises UsageError."""
    try:
        said = {name.replace("-", "_"): value for name, value in _said(flags).items()}
        return section(**said)
    except ValidationError as error:
        raise UsageError(say_fault(error, ("storage_options",))) from None


def to_flat(settings: JobSettings) -> dict[str, Any]:
    """The inverse of `JobSettings.from_flat`, in the flags' spelling."""
    dumped = settings.model_dump(mode="json")
    return {
        name.replace("_", "-"): value
        for section in dumped.values()
        for name, value in section.items()
    }
