"""What a flow is told: the forms of Prefect's UI, made of the settings of `coppice`.

Prefect keeps what is passed to a flow. So a form has no field for a system prompt or for a secret:
those are in a YAML file on the machine, or in a block of Prefect's (`flows.credentials`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from prefect import Flow
from prefect.exceptions import ParameterTypeError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from pipeline.cli.options import HELP, WRITTEN_AS
from pipeline.settings import AuditSettings, JobSettings
from pipeline.settings_file import read_config
from pipeline.store_settings import STORAGE_SECRETS, ObjectStoreSettings

_TEXT = "system_prompt"
_SECRETS = frozenset(STORAGE_SECRETS)
P = ParamSpec("P")
R = TypeVar("R")


class StorageOptions(BaseModel):
    """How an object store is reached; who may, is in a block of credentials."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    endpoint_url: str | None = Field(None, description="Of a store other than AWS's.")
    region: str | None = None
    anonymous: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, said: object) -> object:
        if isinstance(said, dict) and any(str(k).removeprefix("aws_") in _SECRETS for k in said):
            raise ValueError(
                "Prefect would store these secrets; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or name a block of credentials"
            )
        return said


class _Form(BaseModel):
    """Settings by the names of their flags; what is not said is in the file, or the default."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, coerce_numbers_to_str=True)

    config: Path | None = Field(
        None, description="YAML file of more settings, on the machine that does the work."
    )

    @model_validator(mode="before")
    @classmethod
    def _named_as_fields(cls, said: object) -> object:
        if not isinstance(said, dict):
            return said
        named = {str(name).replace("-", "_"): value for name, value in said.items()}
        if named.get(_TEXT) is not None:
            raise ValueError(
                "Prefect keeps a flow's parameters in its database; write the system prompt into "
                "a YAML file of settings and name that as config"
            )
        return {name: value for name, value in named.items() if name != _TEXT}

    def flat(self) -> dict[str, Any]:
        """What was said here over what is said in the file. Raises UsageError."""
        written = {} if self.config is None else read_config(self.config)
        said = self.model_dump(exclude={"config"}, exclude_none=True)
        return written | said


def _form(name: str, sections: list[type[BaseModel]]) -> Any:
    """A form with the fields of these sections, none of which has to be filled in."""
    fields: dict[str, Any] = {}
    for section in sections:
        for field, info in section.model_fields.items():
            if field == _TEXT:
                continue
            kind: Any = str if field in WRITTEN_AS else info.annotation
            kind = StorageOptions if section is ObjectStoreSettings else kind
            default = "" if info.is_required() else f" Default: {info.get_default()}."
            help = HELP[field] + (default if section is not ObjectStoreSettings else "")
            fields[field] = (kind | None, Field(None, description=help))
    return create_model(name, __base__=_Form, __module__=__name__, **fields)


if TYPE_CHECKING:
    JobForm: TypeAlias = _Form
    AuditForm: TypeAlias = _Form
else:
    JobForm = _form("JobForm", [info.annotation for info in JobSettings.model_fields.values()])
    AuditForm = _form("AuditForm", [AuditSettings, ObjectStoreSettings])


class CheckedFlow(Flow[P, R]):
    """A flow whose parameters are checked before Prefect is told them, and not only afterwards."""

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters as their types. Raises ParameterTypeError, which quotes no value.

        Prefect's own check would log what it refuses, so nothing wrong gets as far.
        """
        kinds = inspect.signature(self.fn).parameters
        return super().validate_parameters(
            {
                name: _checked(name, value, kinds[name].annotation)
                for name, value in parameters.items()
            }
        )

    def serialize_parameters(self, parameters: dict[str, Any], **how: Any) -> dict[str, Any]:
        """For Prefect's database. Raises as `validate_parameters`."""
        return super().serialize_parameters(self.validate_parameters(parameters), **how)


def _checked(name: str, value: object, kind: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        found = error.errors(include_input=False, include_context=False)
        said = (".".join(map(str, (name, *one["loc"]))) + ": " + one["msg"] for one in found)
        raise ParameterTypeError(f"{'; '.join(said)}; correct it") from None


def checked_flow(name: str) -> Callable[[Callable[P, R]], CheckedFlow[P, R]]:
    """Make a flow of a function; its result is not kept.

    A runner pickles the function without the names that annotations kept as text would need, so
    modules of flows do not import annotations from __future__.
    """
    return lambda function: CheckedFlow(function, name=name, persist_result=False)
