"""Publications in a bucket, each committed by its marker. Knows nothing about runs and audits.

```
 TARGET/<date>/<edition>-<number>/   report.html  report.md  data/part-…
 TARGET/<date>/published.json   names the files above; written last, if nobody else did
```

Nothing can be renamed there, so readers go by the marker: a file that it does not name is not
published.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pipeline.errors import RunDirectoryError, StorageError
from pipeline.location import Location
from pipeline.night.published import MARKER, Content, describe_file, marker
from pipeline.storage.remote_folder import RemoteFolder, SupersededError


class StoreTarget:
    """See `night.publication.Target`."""

    def __init__(self, target: Location) -> None:
        """Raises UsageError if the URL or the library is not there."""
        self._folder = RemoteFolder(target)

    def location(self, date: str) -> str:
        """URL of a publication."""
        return f"{self._folder.url}/{date}"

    def read(self, date: str) -> dict[str, Any] | None:
        """`published.json` of a publication; None if there is none."""
        held = self._folder.read(f"{date}/{MARKER.name}")
        return None if held is None else MARKER.parse(held.content, self.location(date))

    def check(self, date: str) -> None:
        """See `night.publication.Target`; writes an object and removes it."""
        self._folder.check_conditions()

    def publish(self, date: str, content: Content) -> None:
        """Upload the files, then the marker that names them; or remove them again."""
        folder, name = self._folder, f"{date}/{MARKER.name}"
        folder.check_conditions()
        held = folder.read(name)
        found = None if held is None else MARKER.parse(held.content, self.location(date))
        if found != content.replaces:
            raise _taken(self.location(date))
        own = f"{content.edition}-{secrets.token_hex(4)}"  # two publishers never share a file
        files = {f"{own}/{name}": path for name, path in content.files.items()}
        text = marker(content.described, {n: describe_file(path, n) for n, path in files.items()})
        before = folder.names(f"{date}/")
        try:
            for file, path in files.items():
                folder.put(f"{date}/{file}", path)
            folder.put_if(name, text, None if held is None else held.etag)
        except SupersededError:
            self._roll_back(date, text, files)
            raise _taken(self.location(date)) from None
        except BaseException:
            self._roll_back(date, text, files)
            raise
        # Listed before the commit: whoever began after it met our marker.
        unnamed = [other for other in before if other != name]
        with suppress(StorageError):  # nobody is told of them any more
            folder.delete(unnamed)

    def _roll_back(self, date: str, text: bytes, files: Iterable[str]) -> None:
        """Remove what was uploaded, unless the marker is there and only its answer was lost."""
        with suppress(StorageError):  # the next one makes it good
            now = self._folder.read(f"{date}/{MARKER.name}")
            if now is None or now.content != text:
                self._folder.delete(f"{date}/{file}" for file in files)


def _taken(location: str) -> RunDirectoryError:
    return RunDirectoryError(
        f"somebody else published {location} meanwhile; look there, then run the same command again"
    )
