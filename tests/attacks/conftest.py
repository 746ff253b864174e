"""A finished, audited run of a tiny model, and the commands that read one."""

from __future__ import annotations

from tests.night.conftest import audited, done_night, job  # noqa: F401
from tests.storage.conftest import bucket, store, store_server  # noqa: F401
