"""Runs and prompts in Google's and Azure's stores, prompts on the web and on the hub."""

from __future__ import annotations

import io
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.errors import InputError, NoInput, RunDirectoryError, StorageError, UsageError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from pipeline.run import plan_job, run_job
from pipeline.settings import JobSettings
from pipeline.status import read_status
from pipeline.storage.object_store import check_options
from pipeline.storage.remote_folder import RemoteFolder, SupersededError
from pipeline.storage.remote_run import RemoteRun
from pipeline.store_settings import ObjectStoreSettings
from tests.storage.clouds import (
    ACCOUNT,
    ACCOUNT_KEY,
    COMMIT,
    HUB_TOKEN,
    AzureHandler,
    GoogleHandler,
    HubHandler,
    Site,
    WebHandler,
    own_certificate,
    serving,
)
from tests.storage.test_object_store import PROMPTS, parquet
from tests.tiny_job import answers, write_prompts

FINGERPRINT = {"input": "abc"}


@dataclass
class Cloud:
    """A store of one kind: its server, a URL in it, and the options that reach it."""

    site: Site
    scheme: str
    options: dict[str, str]

    def at(self, key: str) -> Location:
        return Location(f"{self.scheme}://bucket/{key}", self.settings)

    @property
    def settings(self) -> ObjectStoreSettings:
        return ObjectStoreSettings(storage_options=self.options)

    def names(self, prefix: str = "") -> list[str]:
        return self.site.names(f"bucket/{prefix}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    is_azure = request.param == "az"
    with serving(AzureHandler if is_azure else GoogleHandler) as site:
        options = {"endpoint_url": site.url}
        if is_azure:
            options = {
                "endpoint_url": f"{site.url}/{ACCOUNT}",
                "account_name": ACCOUNT,
                "account_key": ACCOUNT_KEY,
            }
        yield Cloud(site, request.param, options)


def texts(location: Location, tmp_path: Path) -> list[object]:
    copies = ParquetCopies(tmp_path / "copies")
    source = open_source(location, ReadSettings(), copies=copies)
    return [text for batch in source.iter_prompts() for text in batch.contents]


def with_store(settings: JobSettings, cloud: Cloud) -> JobSettings:
    return settings.model_copy(update={"store": cloud.settings})


def test_prompts_are_read_from_objects_folders_and_globs(cloud: Cloud, tmp_path: Path) -> None:
    cloud.site.put("bucket/one.parquet", parquet(PROMPTS))
    cloud.site.put("bucket/in/b.jsonl", b'{"id": "r2", "prompt": "c"}\n')
    cloud.site.put("bucket/in/deep/a.csv", b"id,prompt\nr3,d\n")
    cloud.site.put("bucket/in/_x.csv", b"no prompts")
    assert texts(cloud.at("one.parquet"), tmp_path) == PROMPTS
    assert texts(cloud.at("in/"), tmp_path) == ["c", "d"]
    assert texts(cloud.at("in/**/*.csv"), tmp_path) == ["d"]
    source = open_source(cloud.at("one.parquet"), ReadSettings())
    assert source.take(np.array([3, 0]))["prompt"].to_pylist() == ["good bye", "hello"]


def test_a_run_there_is_that_of_a_folder(
    cloud: Cloud, tmp_path: Path, settings: JobSettings
) -> None:
    prompts = str(write_prompts(tmp_path / "p.parquet", [*PROMPTS, "x"]))
    chosen = with_store(settings, cloud)
    out = cloud.at("deep/out")
    run_job(prompts, str(out), chosen)
    run_job(prompts, tmp_path / "local", settings)
    parts = [
        cloud.site.files[f"bucket/deep/out/{n}"] for n in cloud.names("deep/out/") if "data/" in n
    ]
    rows = pl.concat(pl.read_parquet(io.BytesIO(part)) for part in parts).sort("row_index")
    local = answers(tmp_path / "local")
    assert rows["generated_text"].to_list() == local["generated_text"].to_list()
    assert read_status(out)["status"] == "complete"
    assert run_job(prompts, str(out), chosen).was_complete
    text = json.loads(cloud.site.files["bucket/deep/out/run.json"])
    assert ACCOUNT_KEY not in json.dumps(text)


def test_of_two_that_write_one_goes_on(cloud: Cloud, tmp_path: Path) -> None:
    def take(copies: str) -> RemoteRun:
        folder = RemoteFolder(cloud.at("out"))
        return RemoteRun.take(folder, tmp_path / copies, FINGERPRINT, {"input": {"rows": 1}})

    first = take("a")
    with take("b"):
        with pytest.raises(RunDirectoryError, match="was taken over by process"):
            first.update_manifest(status="running")
    first.close()


def test_conditions_hold_when_many_write_at_once(cloud: Cloud) -> None:
    folder = RemoteFolder(cloud.at("out"))
    etag = folder.put_if("x", b"0", None)
    with pytest.raises(SupersededError):
        folder.put_if("x", b"1", None)
    won: list[bytes] = []

    def write(content: bytes) -> None:
        try:
            folder.put_if("x", content, etag)
            won.append(content)
        except SupersededError:
            pass

    threads = [threading.Thread(target=write, args=(bytes([n]),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    now = folder.read("x")
    assert len(won) == 1 and now is not None and now.content == won[0]
    folder.delete(["x", "x"])
    assert folder.read("x") is None


def test_a_store_that_ignores_conditions_is_refused(cloud: Cloud) -> None:
    cloud.site.ignores_conditions = True
    with pytest.raises(RunDirectoryError, match="ignores conditional writes"):
        RemoteFolder(cloud.at("out")).check_conditions()
    assert cloud.names() == []


def test_levels_of_a_folder(cloud: Cloud) -> None:
    for name in ("a/2026/run.json", "a/2026/data/part", "a/2027/run.json", "b/x"):
        cloud.site.put(f"bucket/{name}", b"x")
    folder = RemoteFolder(cloud.at("a/2026"))
    assert folder.names_beside() == ["2026", "2027"]
    assert folder.names_inside() == ["run.json"]
    assert folder.names() == {"run.json": 1, "data/part": 1}
    assert folder.names("data/") == {"data/part": 1}
    assert folder.beside("2027").names() == {"run.json": 1}


def test_faults_are_one_sentence(cloud: Cloud, tmp_path: Path) -> None:
    def refused(location: Location) -> str:
        with pytest.raises(InputError) as error:
            texts(location, tmp_path)
        assert "\n" not in str(error.value) and ACCOUNT_KEY not in str(error.value)
        return str(error.value)

    other = Location(f"{cloud.scheme}://other/in/", cloud.settings)
    assert "there is no such bucket" in refused(other)
    assert "no object, prefix or match" in refused(cloud.at("nothing.parquet"))
    cloud.site.put("bucket/one.parquet", parquet(PROMPTS))
    cloud.site.is_open = False
    said = refused(cloud.at("one.parquet"))
    assert "refuses the credentials; check" in said
    assert ("AZURE_STORAGE" if cloud.scheme == "az" else "GOOGLE_APPLICATION") in said
    with pytest.raises(StorageError, match="refuses the credentials"):
        RemoteFolder(cloud.at("out")).read("run.json")


def test_an_object_that_is_replaced_while_it_is_read_is_noticed(
    cloud: Cloud, tmp_path: Path
) -> None:
    cloud.site.put("bucket/one.parquet", parquet(PROMPTS))
    source = open_source(cloud.at("one.parquet"), ReadSettings())
    cloud.site.put("bucket/one.parquet", parquet(["hallo", *PROMPTS[1:]]))
    with pytest.raises(InputError, match="changed while it was being read; start again"):
        list(source.iter_prompts())


class _SlowHandler(GoogleHandler):
    """Takes two seconds for a large body."""

    def body(self) -> bytes:
        content = super().body()
        time.sleep(2 if len(content) > 10_000 else 0)
        return content


def test_an_upload_on_a_slow_line_has_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: what took longer than an answer may was sent three times, and failed."""
    monkeypatch.setattr("pipeline.storage.store_client.ANSWER_S", 1)
    (tmp_path / "part").write_bytes(bytes(100_000))
    with serving(_SlowHandler) as site:
        cloud = Cloud(site, "gs", {"endpoint_url": site.url})
        RemoteFolder(cloud.at("out")).put("part", tmp_path / "part")
        assert len(site.files["bucket/out/part"]) == 100_000
        assert site.asked == ["PUT bucket/out/part"]


def test_an_account_must_be_named() -> None:
    with pytest.raises(UsageError, match="no storage account is named; set AZURE_STORAGE_ACCOUNT"):
        RemoteFolder(Location("az://bucket/out"))


# The web.


@pytest.fixture
def web() -> Iterator[Site]:
    with serving(WebHandler) as site:
        yield site


def test_a_file_of_a_web_server_is_read(web: Site, tmp_path: Path) -> None:
    web.put("a b/in.parquet", parquet(PROMPTS))
    web.put("in.csv", b"id,prompt\na,x\n")
    assert texts(Location(f"{web.url}/a%20b/in.parquet"), tmp_path) == PROMPTS
    assert texts(Location(f"{web.url}/in.csv"), tmp_path) == ["x"]


def test_a_server_of_our_own_authority_is_read_where_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = own_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with serving(WebHandler, tls) as site:
        site.put("in.csv", b"id,prompt\na,x\n")
        location = Location(f"{site.url}/in.csv")
        with pytest.raises(InputError, match="certificate.*SSL_CERT_FILE"):
            texts(location, tmp_path)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert texts(location, tmp_path) == ["x"]
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
        with pytest.raises(InputError, match="cannot read the certificates in .*nothing"):
            texts(location, tmp_path)


def test_a_job_may_have_its_prompts_there(web: Site, tmp_path: Path, settings: JobSettings) -> None:
    web.put("in.jsonl", b'{"prompt": "abc"}\n')
    run_job(f"{web.url}/in.jsonl", tmp_path / "out", settings)
    assert answers(tmp_path / "out")["generated_text"].to_list() == ["cba"]
    web.put("in.jsonl", b'{"prompt": "abd"}\n')
    with pytest.raises(RunDirectoryError, match="another input"):
        run_job(f"{web.url}/in.jsonl", tmp_path / "out", settings)


def test_a_server_without_ranges_gives_text_and_no_parquet(web: Site, tmp_path: Path) -> None:
    web.has_ranges = False
    web.put("in.parquet", parquet(PROMPTS))
    web.put("in.csv", b"id,prompt\na,x\n")
    assert texts(Location(f"{web.url}/in.csv"), tmp_path) == ["x"]
    with pytest.raises(InputError, match="gives no parts of files, .*; download it first"):
        texts(Location(f"{web.url}/in.parquet"), tmp_path)


class _Chunked(WebHandler):
    def on_get(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"7\r\nprompt\n\r\n0\r\n\r\n")


class _Broken(WebHandler):
    def on_get(self) -> None:
        self.fail(503, "busy")


class _Moved(WebHandler):
    def on_get(self) -> None:
        if self.place == "in.csv":
            self.answer(302, Location="/there.csv")
        else:
            self.send_file(self.place)


@pytest.mark.parametrize(
    ("handler", "says"),
    [
        (_Chunked, "does not say how long the file is; download it first"),
        (_Broken, "a fault of its own; try again later"),
    ],
)
def test_a_server_of_another_kind_is_one_sentence(
    handler: type[WebHandler], says: str, tmp_path: Path
) -> None:
    with serving(handler) as site, pytest.raises(InputError, match=says):
        texts(Location(f"{site.url}/in.csv"), tmp_path)


def test_a_file_that_has_moved_is_followed(tmp_path: Path) -> None:
    with serving(_Moved) as site:
        site.put("there.csv", b"id,prompt\na,x\n")
        assert texts(Location(f"{site.url}/in.csv"), tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("{}/nothing.csv", "there is no file at"),
        ("{}/folder/", "a URL of the web must look like"),
        ("{}/in.csv?key=SECRET", "a URL of the web must look like .* query"),
        ("http://me:SECRET@127.0.0.1/in.csv", "a URL of the web must look like"),
        ("{}/*.csv", "a web server lists no files"),
        ("http://127.0.0.1:9/in.csv", "cannot be reached; check the network and the URL"),
        ("ftp://127.0.0.1/in.csv", "ftp:// is not supported; use a folder or one of s3://, gs://"),
    ],
)
def test_what_cannot_be_read_of_the_web_is_one_sentence(
    web: Site, tmp_path: Path, url: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as error:
        texts(Location(url.format(web.url)), tmp_path)
    assert "\n" not in str(error.value) and "SECRET" not in str(error.value)


@pytest.mark.parametrize("url", ["https://host/out", "hf://datasets/owner/name"])
def test_nothing_is_written_to_the_web(url: str, settings: JobSettings, tmp_path: Path) -> None:
    prompts = str(write_prompts(tmp_path / "p.parquet", ["x"]))
    with pytest.raises(UsageError, match="is not supported; use a folder, s3://, gs:// or az://"):
        run_job(prompts, url, settings)


# The hub.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with ExitStack() as stack:
        yield stack.enter_context(serving(HubHandler))


def on_hub(hub: Site, path: str, **options: str) -> Location:
    chosen = ObjectStoreSettings(storage_options={"endpoint_url": hub.url, **options})
    return Location(f"hf://datasets/{path}", chosen)


def test_files_of_a_data_set_are_read_at_one_commit(hub: Site, tmp_path: Path) -> None:
    hub.put("owner/data/a.parquet", parquet(PROMPTS))
    hub.put("owner/data/b.csv", b"id,prompt\na,x\n")
    hub.put("owner/README.md", b"---\n---\n")
    assert texts(on_hub(hub, "owner/name/data/a.parquet"), tmp_path) == PROMPTS
    assert texts(on_hub(hub, "owner/name/data/*.csv"), tmp_path) == ["x"]
    assert texts(on_hub(hub, "owner/name@v1"), tmp_path) == [*PROMPTS, "x"]
    resolved = [asked for asked in hub.asked if "/resolve/" in asked]
    assert resolved and all(f"/resolve/{COMMIT}/" in asked for asked in resolved)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("owner/private/a.csv", "knows no such data set, or it is private .hf auth login"),
        ("owner/name@nowhere/a.csv", "has no such revision; check what stands behind the @"),
        ("owner/name/nothing.csv", "no file, folder or match"),
        ("owner", "must look like hf://datasets/owner/name/path"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(
    hub: Site, tmp_path: Path, path: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as error:
        texts(on_hub(hub, path), tmp_path)
    assert "\n" not in str(error.value)


def test_a_token_opens_a_private_data_set_and_is_kept_nowhere(
    hub: Site, tmp_path: Path, settings: JobSettings
) -> None:
    hub.put("owner/a.csv", b"prompt\nabc\n")
    location = on_hub(hub, "owner/private/a.csv", token=HUB_TOKEN)
    chosen = settings.model_copy(update={"store": location.store})
    run_job(str(location), tmp_path / "out", chosen)
    assert answers(tmp_path / "out")["generated_text"].to_list() == ["cba"]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(HUB_TOKEN.encode() in content for content in files)


def test_a_hub_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    away = ObjectStoreSettings(storage_options={"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(InputError, match="the hub does not answer .*; check the network"):
        texts(Location("hf://datasets/owner/name/a.csv", away), tmp_path)


def test_nothing_there_is_no_input(hub: Site, tmp_path: Path) -> None:
    hub.put("owner/README.md", b"x")
    with pytest.raises(NoInput):
        texts(on_hub(hub, "owner/name"), tmp_path)


def test_options_have_their_names_of_each_store() -> None:
    def said(*options: str) -> dict[str, Any]:
        return ObjectStoreSettings(storage_options=list(options)).storage_options  # type: ignore[arg-type]

    assert said("azure_storage_account_name=a", "AZURE_STORAGE_ACCOUNT_KEY=k") == {
        "account_name": "a",
        "account_key": "k",
    }
    assert said("google_service_account=x.json") == {"service_account": "x.json"}
    with pytest.raises(ValueError, match="exclude each other"):
        said("account_key=a", "sas_token=b")


def test_an_option_of_another_store_is_refused(tmp_path: Path, settings: JobSettings) -> None:
    prompts = str(write_prompts(tmp_path / "p.parquet", ["x"]))
    chosen = ObjectStoreSettings(storage_options={"region": "eu-west-1"})
    other = settings.model_copy(update={"store": chosen})
    with pytest.raises(UsageError, match="--storage-options region says nothing of gs://; drop it"):
        run_job(prompts, "gs://bucket/out", other)
    with pytest.raises(UsageError, match="region says nothing of hf://"):
        plan_job("hf://datasets/a/b", other)
    both = {"region": "eu-west-1", "token": HUB_TOKEN, "endpoint_url": "https://there"}
    check_options(
        Location("hf://datasets/a/b", ObjectStoreSettings(storage_options=both)),
        Location("s3://b/out", ObjectStoreSettings(storage_options=both)),
    )
    check_options(Location("here", ObjectStoreSettings(storage_options=both)))
