"""Web servers that lie, stall, send on or stop in the middle: the file, or one sentence in time."""

from __future__ import annotations

import gzip
import io
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CoppiceError, InputError
from pipeline.inputs.parquet_copies import ParquetCopies
from pipeline.inputs.prompt_source import open_source
from pipeline.location import Location
from pipeline.prompt_settings import ReadSettings
from tests.storage.clouds import WebHandler, serving

CSV = b"id,prompt\na,x\nb,y\n"


def texts(url: str, tmp_path: Path) -> list[object]:
    copies = ParquetCopies(tmp_path / "copies")
    source = open_source(Location(url), ReadSettings(), copies)
    return [text for batch in source.iter_prompts() for text in batch.contents]


def parquet(rows: int = 20_000) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": [f"prompt {i}" for i in range(rows)]}), sink)
    return sink.getvalue()


class _Cut(WebHandler):
    """Says more than it sends."""

    def on_get(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(CSV)
        self.close_connection = True


class _CutOnce(WebHandler):
    """Answers the first question whole, as of its size, and cuts all later ones."""

    def on_get(self) -> None:
        if len(self.site.asked) == 1:
            self.answer(200, CSV)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(CSV)))
            self.end_headers()
            self.wfile.write(CSV[:8])
            self.close_connection = True


class _Loop(WebHandler):
    def on_get(self) -> None:
        self.answer(302, Location=f"/again/{len(self.site.asked)}/in.csv")


class _Away(WebHandler):
    def on_get(self) -> None:
        self.answer(302, Location="file:///etc/passwd")


class _Nowhere(WebHandler):
    def on_get(self) -> None:
        self.answer(302)


class _Page(WebHandler):
    """A page of its own where there is no such file, as many sites have one."""

    def on_get(self) -> None:
        self.answer(200, b"<!DOCTYPE html><html>not found</html>", Content_Type="text/html")


class _Empty(WebHandler):
    def on_get(self) -> None:
        self.answer(200, b"")


class _Forbidden(WebHandler):
    def on_get(self) -> None:
        self.fail(403, "no")


class _Gone(WebHandler):
    def on_get(self) -> None:
        self.fail(410, "no")


class _Many(WebHandler):
    def on_get(self) -> None:
        self.answer(429, b"slow down", Retry_After="1")


class _Garbage(WebHandler):
    def on_get(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")
        self.close_connection = True


class _Changing(WebHandler):
    """Another file at each question."""

    def on_get(self) -> None:
        self.site.put(self.place, CSV + b"c,z%d\n" % len(self.site.asked))
        self.send_file(self.place)


@pytest.mark.parametrize(
    "handler",
    [
        _Cut, _CutOnce, _Loop, _Away, _Nowhere, _Page, _Empty, _Forbidden, _Gone, _Many, _Garbage,
        _Changing,
    ],
)  # fmt: skip
def test_a_server_that_does_not_do_its_work_is_one_sentence(
    handler: type[WebHandler], tmp_path: Path
) -> None:
    begin = time.monotonic()
    with serving(handler) as site, pytest.raises(InputError) as error:
        texts(f"{site.url}/in.csv", tmp_path)
    said = str(error.value)
    assert "\n" not in said and "passwd" not in said, said
    assert not {"error", "bucket"} & {*said.lower().split()}, said
    assert time.monotonic() - begin < 45
    if handler is not _Page:  # which is text, and so may be rows
        assert not list((tmp_path / "copies").glob("*.parquet"))


class _Zipped(WebHandler):
    """Packs what it sends, as it was not asked to."""

    def on_get(self) -> None:
        self.answer(200, gzip.compress(CSV), Content_Encoding="gzip")


def test_a_file_that_is_packed_on_its_way_is_read_or_refused(tmp_path: Path) -> None:
    with serving(_Zipped) as site:
        try:
            assert texts(f"{site.url}/in.csv", tmp_path) == ["x", "y"]
        except InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "path",
    ["a//in.csv", "a/../in.csv", "./in.csv", "a%2Fin.csv", "a/%2e%2e/in.csv", "%00.csv", "%ff.csv",
     "[in].csv", "in.csv#part", "ä.csv", "%zz.csv", "in.CSV", "in.txt", "in"],
)  # fmt: skip
def test_a_path_of_any_kind_is_that_file_or_one_sentence(path: str, tmp_path: Path) -> None:
    with serving(WebHandler) as site:
        for name in ("a/in.csv", "in.csv", "[in].csv", "ä.csv", "a//in.csv"):
            site.put(name, CSV)
        try:
            assert texts(f"{site.url}/{path}", tmp_path) == ["x", "y"]
        except CoppiceError as error:
            assert isinstance(error, InputError) and "\n" not in str(error)
            assert "Error" not in str(error), error


class _Slow(WebHandler):
    """A byte at a time, and then none."""

    def on_get(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CSV)))
        self.end_headers()
        for byte in CSV[:5]:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(0.2)
        time.sleep(40)


@pytest.mark.slow
def test_a_server_that_stalls_is_left_in_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    with serving(_Slow) as site, pytest.raises(InputError, match="cannot be reached"):
        texts(f"{site.url}/in.csv", tmp_path)
    assert time.monotonic() - begin < 60


class _ShortRange(WebHandler):
    """Half of each range, and says so."""

    def on_get(self) -> None:
        whole = self.site.files[self.place]
        asked = self.headers.get("Range")
        if asked is None:
            self.send_file(self.place)
            return
        start, stop = map(int, asked.removeprefix("bytes=").split("-"))
        piece = whole[start : start + max(1, (stop + 1 - start) // 2)]
        span = f"bytes {start}-{start + len(piece) - 1}/{len(whole)}"
        self.answer(206, piece, Content_Range=span)


class _WrongRange(WebHandler):
    """Other bytes than it was asked for, and says nothing of it."""

    def on_get(self) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.send_file(self.place)
            return
        start, stop = map(int, asked.removeprefix("bytes=").split("-"))
        self.answer(
            206, b"\0" * (stop + 1 - start),
            Content_Range=f"bytes {start}-{stop}/{len(self.site.files[self.place])}",
        )  # fmt: skip


@pytest.mark.parametrize("handler", [_ShortRange, _WrongRange])
def test_ranges_that_are_not_what_was_asked_for(handler: type[WebHandler], tmp_path: Path) -> None:
    with serving(handler) as site:
        site.put("in.parquet", parquet())
        try:
            found = texts(f"{site.url}/in.parquet", tmp_path)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert found == [f"prompt {i}" for i in range(20_000)]
