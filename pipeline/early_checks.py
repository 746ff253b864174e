"""All that can be found wrong with a job before its first row is read, in one list.

What needs the input's columns, the tokenizer or the model's config is checked when these are
opened, by `job.open_job`; what needs the device, while it is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from pipeline.audit.similarity import Encoder
from pipeline.engine.load import check_strict
from pipeline.errors import UsageError, install_extra
from pipeline.kvstore.folder import check_store
from pipeline.location import Location
from pipeline.model.hub import check_model_exists
from pipeline.model.weights import check_int8
from pipeline.settings import JobSettings
from pipeline.storage.run_location import check_location

_NEEDED: tuple[tuple[str, str, Callable[[JobSettings], bool]], ...] = (
    ("--executor ray", "ray", lambda s: s.fleet.executor == "ray"),
    ("--engine vllm", "vllm", lambda s: s.model.engine == "vllm"),
)  # fmt: skip


def check_early(output: Location, settings: JobSettings) -> None:
    """Raises UsageError and its kin, of the first of these that is at fault."""
    checks: tuple[Callable[[], None], ...] = (
        lambda: _check_name(output),
        lambda: _check_packages(settings),
        lambda: check_location(output),
        lambda: check_model_exists(settings.model),
        lambda: check_strict(settings),
        lambda: check_int8(settings.model),
        lambda: _check_kv_store(settings),
        lambda: Encoder.check(settings.audit.audit_encoder),
    )
    for check in checks:
        check()


def _check_name(output: Location) -> None:
    try:
        output.absolute.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the output {output} has a name that is not UTF-8, which Parquet's readers cannot "
            "open; choose another one"
        ) from None


def _check_packages(settings: JobSettings) -> None:
    for flag, package, is_needed in _NEEDED:
        if is_needed(settings) and find_spec(package) is None:
            raise UsageError(f"{flag} needs {package}; {install_extra(package)}")


def _check_kv_store(settings: JobSettings) -> None:
    if settings.recycle.kv_store is not None:
        check_store(settings.recycle.kv_store)
