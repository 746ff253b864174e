"""Settings that somebody else keeps, as Prefect's database does: what must not be among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.settings import STORAGE_SECRETS
from pipeline.terminal.options import read_config, split_store

_TEXT = "system_prompt"


def whole_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` over those of the YAML file that their entry `config` names.

    Raises UsageError for a system prompt among the kept ones; what is in the file nobody keeps.
    """
    said = {name.replace("-", "_"): value for name, value in settings.items()}
    if said.get(_TEXT) is not None:
        raise UsageError(
            "Prefect keeps a flow's parameters in its database; write the system prompt into a "
            "YAML file of settings and name that as config"
        )
    check_no_secrets(said)
    config = said.pop("config", None)
    written = {} if config is None else read_config(Path(config))
    return {name.replace("-", "_"): value for name, value in written.items()} | said


def read_kept(path: Path | None) -> dict[str, Any]:
    """What the file says, to be kept. Raises UsageError, also for secrets."""
    settings = {} if path is None else read_config(path)
    check_no_secrets(settings)
    return settings


def check_no_secrets(settings: dict[str, Any]) -> None:
    """Raises UsageError."""
    if split_store(settings)[1].storage_options.keys() & set(STORAGE_SECRETS):
        raise UsageError(
            "Prefect would store the secrets among the storage options; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead"
        )
