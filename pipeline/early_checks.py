"""All that can be found wrong with a job before its first row is read, in one list.

What needs the input's columns, the tokenizer or the model's config is checked when these are
opened, by `job.open_job` with `job/job_checks.py`; what needs the device, while it is taken.
"""

from __future__ import annotations

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


def check_early(output: Location, settings: JobSettings) -> None:
    """Raises UsageError and its kin, of the first of these that is at fault."""
    _check_name(output)
    _check_package("ray", "--executor ray", settings.fleet.executor == "ray")
    _check_package("vllm", "--engine vllm", settings.model.engine == "vllm")
    check_location(output)
    check_model_exists(settings.model)
    check_strict(settings)
    check_int8(settings.model)
    if settings.recycle.kv_store is not None:
        check_store(settings.recycle.kv_store)
    Encoder.check(settings.audit.audit_encoder)


def _check_name(output: Location) -> None:
    try:
        output.absolute.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the output {output} has a name that is not UTF-8, which Parquet's readers cannot "
            "open; choose another one"
        ) from None


def _check_package(package: str, flag: str, is_needed: bool) -> None:
    if is_needed and find_spec(package) is None:
        raise UsageError(f"{flag} needs {package}; {install_extra(package)}")
