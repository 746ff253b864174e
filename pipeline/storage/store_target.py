"""Publications below `s3://`, each committed by its marker. Knows nothing about runs and audits.

```
 TARGET/<date>/<edition>-<number>/   report.html  report.md  data/part-…
 TARGET/<date>/published.json   names the files above; written last, if nobody else did
```

Nothing can be renamed there, so readers go by the marker: a file that it does not name is not
published.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Any

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.settings import StoreSettings
from pipeline.storage.published import (
    MARKER_NAME,
    Content,
    describe_file,
    marker,
    parse_marker,
)
from pipeline.storage.remote_folder import RemoteFolder, SupersededError


class StoreTarget:
    """See `night.publication.Target`."""

    def __init__(self, target: str, store: StoreSettings) -> None:
        """Raises UsageError if the URL or the library is not there."""
        self._store = store
        self._url = RemoteFolder(target, store).url

    def place(self, date: str) -> str:
        """URL of a publication."""
        return f"{self._url}/{date}"

    def read(self, date: str) -> dict[str, Any] | None:
        """`published.json` of a publication; None if there is none."""
        held = self._folder(date).read(MARKER_NAME)
        return None if held is None else parse_marker(held.content, self.place(date))

    def publish(self, date: str, content: Content) -> None:
        """Upload the files, then the marker that names them; or remove them again."""
        folder = self._folder(date)
        folder.check_conditions()
        held = folder.read(MARKER_NAME)
        found = None if held is None else parse_marker(held.content, self.place(date))
        if found != content.replaces:
            raise _taken(self.place(date))
        own = f"{content.edition}-{secrets.token_hex(4)}"  # two publishers never share a file
        files = {f"{own}/{name}": path for name, path in content.files.items()}
        described = {name: describe_file(path, name) for name, path in files.items()}
        before = folder.names()
        text = marker(content.described, described)
        try:
            for name, path in files.items():
                folder.put(name, path)
            folder.put_if(MARKER_NAME, text, None if held is None else held.etag)
        except SupersededError:
            _roll_back(folder, text, described)
            raise _taken(self.place(date)) from None
        except BaseException:
            _roll_back(folder, text, described)
            raise
        # Listed before the commit: whoever began after it met our marker.
        unnamed = [name for name in before if name != MARKER_NAME and name not in described]
        with suppress(StorageError):  # nobody is told of them any more
            folder.delete(unnamed)

    def _folder(self, date: str) -> RemoteFolder:
        return RemoteFolder(self.place(date), self._store)


def _roll_back(folder: RemoteFolder, text: bytes, described: dict[str, Any]) -> None:
    """Remove what was uploaded, unless the marker is there and only its answer was lost."""
    with suppress(StorageError):  # the next one makes it good
        now = folder.read(MARKER_NAME)
        if now is None or now.content != text:
            folder.delete(described)


def _taken(place: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"somebody else published {place} meanwhile; look there, then run the same command again"
    )
