"""The file of a nightly job: what it means, and that every mistake is named with its field."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.errors import UsageError
from pipeline.location import Location
from pipeline.night.settings import check_apart, read_night
from tests.night.job import DAY

WHOLE = {"name": "reviews", "input": "in/{date}/*.parquet", "output": "out", "model": "org/name"}


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "nightly.yaml"
    said = {k.replace("_", "-"): v for k, v in ({**WHOLE, **keys}).items() if v is not None}
    path.write_text(yaml.safe_dump(said))
    return path


def test_a_night_of_all_settings(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = write(
        tmp_path, model="model", publish="/data/published", template="prompt.j2", catch_up=0,
        on_no_input="skip", time_budget="4h", audit_sample="2%", fail_on_error=0.02,
        storage_options={"region": "eu-west-1"},
    )  # fmt: skip
    night = read_night(path, DAY)
    assert night.input == f"{tmp_path}/in/2026-11-22/*.parquet"
    assert str(night.run) == f"{tmp_path}/out/reviews/2026-11-22"
    assert night.awaited_folder == tmp_path / "in"
    assert night.settings.publish == "/data/published"
    assert (night.settings.catch_up, night.settings.on_no_input) == (0, "skip")
    assert night.job.model.model == str(tmp_path / "model")
    assert night.job.read.template == tmp_path / "prompt.j2"
    assert (night.job.write.time_budget, night.job.audit.audit_sample) == (14400.0, "2%")
    assert night.job.store.storage_options == {"region": "eu-west-1"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("/in/{date}.parquet", "/in/2026-11-22.parquet"),
        ("/in/{date:%Y/%m/%d}/x-{date:%y%j}", "/in/2026/11/22/x-26326"),
        ("/in/all.parquet", "/in/all.parquet"),
        ("s3://bucket/{date}/", "s3://bucket/2026-11-22/"),
    ],
)
def test_the_date_is_put_into_the_input(tmp_path: Path, text: str, filled: str) -> None:
    assert read_night(write(tmp_path, input=text), DAY).input == filled


def test_paths_mean_the_same_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen red: paths below the working directory, which is another one for cron."""
    path = write(tmp_path, output="~/nights")
    monkeypatch.setenv("HOME", "/home/team")
    monkeypatch.chdir(tmp_path)
    here = read_night(Path("nightly.yaml"), DAY)
    monkeypatch.chdir("/")
    assert read_night(path, DAY) == here
    assert str(here.run) == "/home/team/nights/reviews/2026-11-22"
    assert here.job.model.model == "org/name"


@pytest.mark.fault(
    "damaged night file",
    injected="every kind of mistake in the file of a nightly job",
    outcome="exit code 2, file and field named, nothing run and nothing served",
)
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"name": None}, "setting name: must be given"),
        ({"input": None}, "setting input: must be given"),
        ({"output": None}, "setting output: must be given"),
        ({"model": None}, "no model is named"),
        ({"name": "a/b"}, "setting name: "),
        ({"name": ".."}, "setting name: "),
        ({"name": 7}, "setting name: must be a text"),
        ({"input": ["a"]}, "setting input: "),
        ({"input": ""}, "setting input: "),
        ({"input": "in/{dat}/x"}, r"setting input: \{dat\} is not known; write \{date\}"),
        ({"output": "out/{date}"}, "setting output: a folder for the date"),
        ({"publish": "pub/{date}"}, "setting publish: a folder for the date"),
        ({"on_no_input": "ignore"}, "setting on-no-input: "),
        ({"catch_up": -1}, "setting catch-up: "),
        ({"catch_up": "a week"}, "setting catch-up: "),
        ({"time_budget": "4 hours"}, "setting time-budget: '4 hours' is not a duration"),
        ({"max_new_tokens": 0}, "setting max-new-tokens: "),
        ({"audit_sample": "some"}, "setting audit-sample: "),
        ({"fail_on_error": 2.5}, "setting fail-on-error: "),
        ({"max_new_token": 7}, "unknown setting 'max-new-token'; did you mean max-new-tokens"),
        ({"publsh": "x"}, "unknown setting 'publsh'; did you mean publish"),
        ({"cron": "0 2 * * *"}, "unknown setting 'cron'; coppice run --help lists them"),
        ({"num_shards": 2}, "setting num-shards: a night is one run"),
        ({"clock": "2026-11-22"}, "setting clock: that of a night is its date"),
        ({"publish": "out"}, "must not lie in one another"),
        ({"publish": "out/reviews"}, "must not lie in one another"),
        ({"publish": "out/reviews/2026-11-22/x"}, "must not lie in one another"),
        ({"publish": "."}, "must not lie in one another"),
        ({"output": "s3://b/out", "publish": "s3://b/out/reviews/"}, "must not lie in one another"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    path = write(tmp_path, **keys)
    with pytest.raises(UsageError, match=says) as error:
        read_night(path, DAY)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"name: [", "is not YAML"), (b"- a\n- b\n", "must be a mapping"), (b"\xff", "is not YAML")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "nightly.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=says):
        read_night(path, DAY)
    with pytest.raises(UsageError, match="cannot read"):
        read_night(tmp_path / "none.yaml", DAY)


@pytest.mark.parametrize(
    "content",
    [
        "system-prompt: [a secret]\n",
        "system-prompt: a secret: text\n",
        "system-prompt: 'a secret\n",
    ],
)
def test_a_mistake_quotes_no_system_prompt(tmp_path: Path, content: str) -> None:
    """Seen red: YAML's own words, which quote the line."""
    path = write(tmp_path)
    path.write_text(path.read_text() + content)
    with pytest.raises(UsageError, match="system-prompt|in line") as error:
        read_night(path, DAY)
    assert "secret" not in str(error.value)


def test_places_beside_one_another_are_apart(tmp_path: Path) -> None:
    check_apart(Location(f"{tmp_path}/out"), Location(f"{tmp_path}/out-published"))
    check_apart(Location(f"{tmp_path}/out"), Location("s3://bucket/out"))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(ValueError, match="one another"):
        check_apart(Location(f"{tmp_path}/out"), Location(f"{tmp_path}/link/x"))


def test_a_leap_day_and_the_year_before(tmp_path: Path) -> None:
    night = read_night(write(tmp_path), datetime.date(2028, 2, 29))
    assert str(night.run).endswith("/2028-02-29")
