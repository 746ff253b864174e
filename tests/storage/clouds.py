"""Stand-ins for Google's and Azure's stores, a web server and the hub, by their HTTP alone.

What they do is what the stores' own pages say of the requests that obstore makes: Azure's Put Blob,
Get Blob, Delete Blob and List Blobs, Google's XML API with its generations, ranges and conditions
of RFC 9110. Amazon's store is moto, see `buckets`.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT = "account"
ACCOUNT_KEY = "c2VjcmV0LW9mLXRoZS10ZXN0cw=="
HUB_TOKEN = "hf_secret_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Site:
    """What a server holds and what was asked of it. `is_open`: whether credentials are good."""

    files: dict[str, bytes] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    is_open: bool = True
    has_ranges: bool = True
    ignores_conditions: bool = False
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.generations[name] = max(self.generations.values(), default=0) + 1

    def etag(self, name: str) -> str:
        mark = f"{self.generations[name]}-{hashlib.sha256(self.files[name]).hexdigest()[:12]}"
        return f'"{mark}"'

    def names(self, prefix: str) -> list[str]:
        return sorted(n.removeprefix(prefix) for n in self.files if n.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: ClassVar[Site]

    def log_message(self, *_: Any) -> None:
        pass

    @property
    def place(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def query(self) -> dict[str, str]:
        found = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        return {name: values[0] for name, values in found.items()}

    def answer(self, status: int, content: bytes = b"", /, **headers: str) -> None:
        self.send_response(status)
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        for name, text in ({"Content-Length": str(len(content))} | given).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code></Error>".encode())

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def describe(self, name: str) -> dict[str, str]:
        return {
            "ETag": self.site.etag(name),
            "Last-Modified": formatdate(self.site.generations[name], usegmt=True),
            "x-goog-generation": str(self.site.generations[name]),
        }

    def send_file(self, name: str) -> None:
        """A GET or HEAD with If-Match and Range."""
        site = self.site
        if name not in site.files:
            self.fail(404, "NoSuchKey")
            return
        content, headers = site.files[name], self.describe(name)
        wanted = self.headers.get("If-Match")
        if wanted not in (None, "*", headers["ETag"]):
            self.fail(412, "PreconditionFailed")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not site.has_ranges:
            headers["Content-Length"] = str(len(content))
            self.answer(200, content, **headers)
            return
        start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
        piece = content[start:stop]
        span = f"bytes {start}-{start + len(piece) - 1}/{len(content)}"
        headers["Content-Length"] = str(len(piece))
        self.answer(206, piece, **headers, Content_Range=span)

    def handle_one(self) -> None:
        self.site.asked.append(f"{self.command} {self.place}")
        if not self.site.is_open:
            self.body()
            self.fail(403, "AccessDenied")
            return
        getattr(self, f"on_{self.command.lower()}")()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_one

    def on_get(self) -> None:
        self.send_file(self.place)

    def on_head(self) -> None:
        self.send_file(self.place)


class _Bucket(_Handler):
    """What Google's and Azure's have in common: conditions of a PUT, and levels of a listing."""

    def condition(self) -> str | None:
        """The tag that must be there now, empty for none; None: no condition."""
        raise NotImplementedError

    def tag(self, name: str) -> str:
        raise NotImplementedError

    def on_put(self) -> None:
        content, name, wanted = self.body(), self.place, self.condition()
        with self.site.lock:
            now = self.tag(name) if name in self.site.files else ""
            if wanted is not None and wanted != now and not self.site.ignores_conditions:
                self.fail(412, "ConditionNotMet")
                return
            self.site.put(name, content)
            headers = self.describe(name)
        self.answer(201, **headers)

    def on_delete(self) -> None:
        with self.site.lock:
            if self.site.files.pop(self.place, None) is None:
                self.fail(404, "NoSuchKey")
                return
        self.answer(202)

    def level(self, bucket: str) -> tuple[list[str], list[str]]:
        """(keys, common prefixes) of a listing."""
        prefix, mark = self.query.get("prefix", ""), self.query.get("delimiter")
        keys = [f"{prefix}{key}" for key in self.site.names(f"{bucket}/{prefix}")]
        if not mark:
            return keys, []
        deep = [key for key in keys if mark in key[len(prefix) :]]
        folders = {prefix + key[len(prefix) :].split(mark)[0] + mark for key in deep}
        return [key for key in keys if key not in deep], sorted(folders)


class GoogleHandler(_Bucket):
    """`/bucket/key`, and `/bucket?list-type=2`."""

    def condition(self) -> str | None:
        wanted = self.headers.get("x-goog-if-generation-match")
        return "" if wanted == "0" else wanted

    def tag(self, name: str) -> str:
        return str(self.site.generations[name])

    def on_get(self) -> None:
        bucket = self.place.rstrip("/")
        if "/" in bucket:
            self.send_file(bucket)
            return
        if bucket != "bucket":
            self.fail(404, "NoSuchBucket")
            return
        keys, folders = self.level(bucket)
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.site.files[f'{bucket}/{key}'])}"
            f"</Size><LastModified>2026-11-28T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(self.site.etag(f'{bucket}/{key}'))}</ETag></Contents>"
            for key in keys
        )
        entries += "".join(
            f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in folders
        )
        self.answer(200, f"<ListBucketResult>{entries}</ListBucketResult>".encode())


class AzureHandler(_Bucket):
    """`/account/container/blob`, and `?restype=container&comp=list`."""

    @property
    def place(self) -> str:
        return super().place.removeprefix(f"{ACCOUNT}/")

    def condition(self) -> str | None:
        if self.headers.get("If-None-Match") == "*":
            return ""
        return self.headers.get("If-Match")

    def tag(self, name: str) -> str:
        return self.site.etag(name)

    def on_get(self) -> None:
        if not self.headers.get("Authorization", "").startswith(f"SharedKey {ACCOUNT}:"):
            self.fail(403, "AuthenticationFailed")
            return
        if self.query.get("comp") != "list":
            self.send_file(self.place)
            return
        bucket = self.place.rstrip("/")
        if bucket != "bucket":
            self.fail(404, "ContainerNotFound")
            return
        keys, folders = self.level(bucket)
        blobs = "".join(
            f"<Blob><Name>{escape(key)}</Name><Properties>"
            f"<Last-Modified>Sat, 28 Nov 2026 00:00:00 GMT</Last-Modified>"
            f"<Etag>{escape(self.site.etag(f'{bucket}/{key}'))}</Etag>"
            f"<Content-Length>{len(self.site.files[f'{bucket}/{key}'])}</Content-Length>"
            f"<Content-Type>application/octet-stream</Content-Type></Properties></Blob>"
            for key in keys
        )
        blobs += "".join(f"<BlobPrefix><Name>{escape(p)}</Name></BlobPrefix>" for p in folders)
        text = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>"
        self.answer(200, text.encode())

    def on_post(self) -> None:
        """A batch of deletions, each answered by itself."""
        asked = re.findall(rb"Content-ID: (\d+).*?DELETE (\S+) HTTP", self.body(), re.S | re.I)
        answers = []
        for number, path in asked:
            name = unquote(urlsplit(path.decode()).path).lstrip("/").removeprefix(f"{ACCOUNT}/")
            with self.site.lock:
                found = self.site.files.pop(name, None)
            said = "202 Accepted" if found is not None else "404 The specified blob does not exist."
            code = "" if found is not None else "x-ms-error-code: BlobNotFound\r\n"
            answers.append(
                f"--answers\r\nContent-Type: application/http\r\nContent-ID: {number.decode()}"
                f"\r\n\r\nHTTP/1.1 {said}\r\n{code}\r\n"
            )
        text = "".join(answers) + "--answers--\r\n"
        self.answer(202, text.encode(), Content_Type="multipart/mixed; boundary=answers")


class HubHandler(_Handler):
    """The data set owner/name at one commit; private ones want the token."""

    def on_get(self) -> None:
        place = self.place
        if "private" in place and self.headers.get("Authorization") != f"Bearer {HUB_TOKEN}":
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif match := re.fullmatch(r"datasets/owner/\w+/resolve/([^/]+)/(.*)", place):
            name = f"owner/{match[2]}"
            if self.command == "GET" or name in self.site.files:
                self.send_file(name)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        elif re.fullmatch(r"api/datasets/owner/\w+(/revision/[^/]+)?", place):
            if place.endswith("/nowhere"):
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            else:
                info = {"id": "owner/name", "sha": COMMIT, "siblings": [], "tags": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        elif match := re.fullmatch(r"api/datasets/owner/\w+/tree/([^/]+)(?:/(.*))?", place):
            self.list_tree(match[2] or "")
        else:
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    on_head = on_get

    def list_tree(self, folder: str) -> None:
        below = f"{folder}/" if folder else ""
        names = [n for n in self.site.names("owner/") if n.startswith(below)]
        entries: list[dict[str, Any]] = []
        for name in names:
            content = self.site.files[f"owner/{name}"]
            mark = hashlib.sha1(content).hexdigest()
            is_deep = "/" in name.removeprefix(below)
            if is_deep and self.query.get("recursive", "").lower() != "true":
                path = below + name.removeprefix(below).split("/")[0]
                entries.append({"type": "directory", "oid": mark, "size": 0, "path": path})
            else:
                entries.append({"type": "file", "oid": mark, "size": len(content), "path": name})
        once = list({entry["path"]: entry for entry in entries}.values())
        self.answer(200, json.dumps(once).encode(), Content_Type="application/json")


@contextmanager
def serving(handler: type[_Handler], tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    """A server on a port of its own, while the context lasts."""
    site = Site()
    own = type(handler.__name__, (handler,), {"site": site})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        site.url = site.url.replace("http:", "https:")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


WebHandler = _Handler


def own_certificate(folder: Path) -> Path:
    """A certificate for 127.0.0.1 that is signed by itself, with its key behind it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    where = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    built = x509.CertificateBuilder(
        issuer_name=name, subject_name=name, public_key=key.public_key(),
        serial_number=1, not_valid_before=now - timedelta(days=1),
        not_valid_after=now + timedelta(days=1),
    ).add_extension(where, critical=False)  # fmt: skip
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(pem) + secret)
    return path
