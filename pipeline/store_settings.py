"""What a person can choose about object stores: how they are reached, and which of it is secret."""

from __future__ import annotations

import re

from pydantic import ConfigDict, Field, field_serializer, field_validator

from pipeline.forms import Section, named_values

STORAGE_SECRETS = (
    "access_key_id", "secret_access_key", "session_token", "account_key", "sas_token", "token",
)  # fmt: skip
STORAGE_OPTIONS = (
    "endpoint_url", "region", "anonymous", "service_account", "account_name", *STORAGE_SECRETS,
)  # fmt: skip
_PREFIXES = ("aws_", "azure_storage_", "google_")


def parse_storage_options(value: object) -> dict[str, str]:
    """`["region=eu-west-1"]`, one such text, or a mapping, as a mapping; later ones win.

    `aws_region` is `region`, and so on. Raises ValueError, which never quotes a value: it may be
    a secret.
    """
    options: dict[str, str] = {}
    for key, content in named_values(value):
        name = str(key).strip().lower().replace("-", "_")
        name = next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)
        if name not in STORAGE_OPTIONS:
            raise ValueError(f"there is no option {key!r}; known are {', '.join(STORAGE_OPTIONS)}")
        options[name] = str(content).lower() if isinstance(content, bool) else str(content)
    return options


class ObjectStoreSettings(Section):
    """How an object store is reached, to read and to write; decides no answer.

    Secrets are in no dump and no repr: run.json and `--print-config` never hold them. What is
    not given is taken from the environment variables and files that each store's own tools use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    storage_options: dict[str, str] = Field(default={}, repr=False)

    @field_validator("storage_options", mode="before")
    @classmethod
    def _options(cls, value: object) -> dict[str, str]:
        options = parse_storage_options(value)
        endpoint = options.get("endpoint_url")
        if endpoint is not None and not re.fullmatch(r"https?://[^/@\s]+(/[^@\s?#]*)?", endpoint):
            raise ValueError("endpoint_url must look like https://host:port, without a password")
        if options.get("anonymous", "true") not in ("true", "false"):
            raise ValueError("anonymous is true or false")
        if "account_key" in options and "sas_token" in options:
            raise ValueError("account_key and sas_token exclude each other; drop one")
        if ("access_key_id" in options) != ("secret_access_key" in options):
            raise ValueError("access_key_id and secret_access_key belong together; give both")
        return options

    @field_serializer("storage_options")
    def _without_secrets(self, options: dict[str, str]) -> dict[str, str]:
        return {name: text for name, text in options.items() if name not in STORAGE_SECRETS}

    def overridden_by(self, other: ObjectStoreSettings) -> ObjectStoreSettings:
        """These options, and those of `other` over them."""
        return ObjectStoreSettings(storage_options=self.storage_options | other.storage_options)
