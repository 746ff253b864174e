"""Options of object stores: used, checked, and never shown."""

from __future__ import annotations

import pytest

from pipeline.errors import UsageError
from pipeline.settings import JobSettings

SECRETS = {"access_key_id": "canary-id", "secret_access_key": "canary-key"}


@pytest.mark.parametrize(
    "written",
    [
        {"region": "eu-west-1", "anonymous": False} | SECRETS,
        ["AWS_REGION=eu-west-1", "anonymous=false", *(f"{k}={v}" for k, v in SECRETS.items())],
    ],
)
def test_secrets_of_a_store_are_used_and_never_shown(written: object) -> None:
    settings = JobSettings.from_flat({"model": "m", "storage-options": written})
    assert settings.store.storage_options["secret_access_key"] == "canary-key"
    dumped = settings.model_dump(mode="json")
    assert dumped["store"] == {"storage_options": {"region": "eu-west-1", "anonymous": "false"}}
    for shown in (str(dumped), settings.model_dump_json(), repr(settings), str(settings)):
        assert "canary" not in shown
    again = JobSettings.model_validate(dumped)  # as the audit does it, with the secrets again
    secrets = JobSettings.from_flat({"model": "m", "storage-options": SECRETS})
    assert again.store.overridden_by(secrets.store) == settings.store


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["regoin=canary"], "no option 'regoin'; known are endpoint_url, region"),
        (["canary"], "name=value"),
        (7, "name=value"),
        (["access_key_id=canary"], "give both"),
        (["endpoint_url=http://me:canary@host"], "endpoint_url must look like"),
        (["anonymous=canary"], "true or false"),
    ],
)
def test_a_wrong_storage_option_is_named_without_its_value(written: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        JobSettings.from_flat({"model": "m", "storage_options": written})
    assert "setting storage-options" in str(error.value) and "canary" not in str(error.value)
