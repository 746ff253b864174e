"""What a flow keeps from Prefect, whose database has all parameters, log lines and errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import CoppiceError, EngineError, UsageError, place_of
from pipeline.settings import STORAGE_SECRETS
from pipeline.terminal.options import read_config, split_store

_TEXT = "system_prompt"


def whole_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` over those of the YAML file that their entry `config` names.

    Raises UsageError for a system prompt among the parameters; in the file Prefect does not see it.
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


def check_no_secrets(settings: dict[str, Any]) -> None:
    """Raises UsageError for secrets among a flow's parameters."""
    if split_store(settings)[1].storage_options.keys() & set(STORAGE_SECRETS):
        raise UsageError(
            "Prefect would store the secrets among the storage options; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead"
        )


@contextmanager
def without_text() -> Iterator[None]:
    """Let no message out that may quote a prompt, nor the errors that led to one."""
    try:
        yield
    except CoppiceError as error:
        raise error from None
    except Exception as error:
        remedy = "run the same job by coppice --debug run to see the whole traceback"
        raise EngineError(f"{place_of(error)}; {remedy}") from None
