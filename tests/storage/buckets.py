"""An object store in this process, and what tests do to it behind the program's back."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer

from pipeline.errors import StorageError
from pipeline.storage.remote_folder import RemoteFolder

REGION = "us-east-1"
KEY_ID = "AKIAEXAMPLE"
SECRET = "secret-of-the-tests"
_NUMBERS = count(1)  # of buckets: all servers of a process share what they keep


class Store:
    """A server that speaks S3, on a port of its own."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=REGION,
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
        )

    def stop(self) -> None:
        self._server.stop()

    def new_bucket(self) -> str:
        """The name of an empty bucket that no other test has."""
        name = f"bucket-{next(_NUMBERS)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def get(self, bucket: str, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        lister = self.client.get_paginator("list_objects_v2")
        pages = lister.paginate(Bucket=bucket, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def copy(self, bucket: str, source: str, target: str) -> None:
        """Every object below one prefix below another as well."""
        for key in self.keys(bucket, source):
            self.put(bucket, target + key.removeprefix(source), self.get(bucket, key))

    def delete(self, bucket: str, key: str) -> None:
        self.client.delete_object(Bucket=bucket, Key=key)

    def remove_bucket(self, bucket: str) -> None:
        """Also while somebody writes to it."""
        while True:
            for key in self.keys(bucket):
                self.delete(bucket, key)
            with suppress(ClientError):
                self.client.delete_bucket(Bucket=bucket)
                return

    @contextmanager
    def revoked(self) -> Iterator[None]:
        """Meanwhile no credentials are good."""
        self._check_credentials("0")
        try:
            yield
        finally:
            self._check_credentials("inf")

    def _check_credentials(self, after: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=after.encode(),
            headers={"Content-Type": "text/plain"},
        )
        with urllib.request.urlopen(request):
            pass


def use_store(patch: pytest.MonkeyPatch, url: str) -> None:
    """Credentials and address as a user would set them, and nothing of this machine's own."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_CONFIG_FILE", "/dev/null")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_DEFAULT_REGION", REGION)
    patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_ENDPOINT_URL", url)


class FailingStore:
    """Counts what is asked of stores and fails number `fail_at` (from 0); None: only counts.

    `answered`: the store did what it was asked, and only its answer was lost.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, fail_at: int | None = None, answered: bool = False
    ) -> None:
        self.calls: list[str] = []
        real = RemoteFolder._ask

        def ask(folder: RemoteFolder, what: str, operation: str, *about: Any, **how: Any) -> Any:
            self.calls.append(f"{operation} {about[0]}")
            if len(self.calls) - 1 != fail_at:
                return real(folder, what, operation, *about, **how)
            if answered:
                real(folder, what, operation, *about, **how)
            raise StorageError(f"cannot {what}: the store cannot be reached; check the network")

        patch.setattr(RemoteFolder, "_ask", ask)
