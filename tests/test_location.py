"""Where something is and how it is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.location import Location
from pipeline.store_settings import ObjectStoreSettings

SECRETS = {"access_key_id": "AKIA-MINE", "secret_access_key": "hush"}
STORE = ObjectStoreSettings(storage_options=SECRETS)


@pytest.mark.parametrize("show", [repr, str, "{}".format])
def test_no_text_of_a_location_holds_a_secret(show: object) -> None:
    assert callable(show)
    said = show(Location("s3://bucket/run", STORE))
    assert "s3://bucket/run" in said and not any(secret in said for secret in SECRETS.values())


def test_paths_of_one_file_and_urls_of_one_folder_have_one_canonical_text(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    run = Location(tmp_path / "run")
    assert Location(f"{tmp_path}/link/").canonical == run.canonical == str(run)
    assert Location("s3://b/run/").canonical == Location("s3://b/run", STORE).canonical
    assert Location(f"{tmp_path}/link/x").overlaps(run) and run.overlaps(run)
    assert not Location(tmp_path / "run-published").overlaps(run)


def test_the_endpoint_is_the_options_or_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://there:1")
    own = ObjectStoreSettings(storage_options={"endpoint_url": "http://own:2"})
    assert Location("s3://b/x", own).endpoint == "http://own:2"
    assert Location("s3://b/x").endpoint == "http://there:1"
