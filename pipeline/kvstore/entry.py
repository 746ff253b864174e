"""The KV of one entry: written once, mapped, checked. Knows nothing about trees and budgets."""

from __future__ import annotations

import errno
import math
import mmap
import os
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from pipeline.kvstore.header import BadEntry, Head, read_head
from pipeline.kvstore.identity import TokenIds
from pipeline.private_folder import NotPrivate, check_private
from pipeline.storage.durable import write_stream

# Values looked through together; for so few torch starts no threads, which would wait for each
# other longer than they work.
_CHUNK = 1 << 15
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which `mmap` has no name for


class MappedEntry(NamedTuple):
    """An entry, its bytes in the page cache. `kv`: [layers, 2, kv_heads, high - low, head_dim].

    Writing to `kv` changes this process's copy, never the file. It stays valid when the file is
    removed. `inode` tells a file from a later one of the same name.
    """

    head: Head
    token_ids: TokenIds
    kv: Tensor
    inode: int


def encode_kv(kv: Tensor) -> tuple[Tensor, str] | None:
    """The KV as bytes on the CPU, and their checksum; None where a value is not finite."""
    flat = kv.detach().to("cpu").contiguous().view(-1)
    return (flat.view(torch.uint8), _checksum(flat)) if _is_finite(flat) else None


def write_entry(path: Path, head: Head, token_ids: TokenIds, kv_bytes: Tensor) -> None:
    """Write a file that must not exist yet, and flush it. Raises OSError."""
    ids = token_ids.astype("<u4").tobytes()
    write_stream(path, [head.encode() + ids, kv_bytes.numpy().data])


def map_entry(path: Path) -> MappedEntry:
    """Map an entry; its KV is not checked yet. Raises BadEntry, OSError."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        check_private(os.fstat(file), path)
        head, token_ids = read_head(file)
        mapped = mmap.mmap(file, head.file_bytes, access=mmap.ACCESS_COPY)
        inode = os.fstat(file).st_ino
        # Mapped pages are read in small pieces; asked for at once they come four times as fast.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED)
    except NotPrivate as error:
        raise BadEntry(str(error)) from error
    finally:
        os.close(file)
    _populate(mapped)
    dtype = getattr(torch, head.dtype)
    count = head.kv_bytes // dtype.itemsize
    kv = torch.frombuffer(mapped, dtype=dtype, count=count, offset=head.kv_offset)
    return MappedEntry(head, token_ids, kv.view(head.kv_shape), inode)


def check_entry(entry: MappedEntry) -> None:
    """Raises BadEntry unless the KV is what was written, and so finite.

    The checksum is one against accidents (a flipped bit, a lost block, half a file), not against
    somebody who can write to the folder: he could write a matching one, so nobody else may.
    """
    if _checksum(entry.kv.view(-1)) != entry.head.checksum:
        raise BadEntry("its KV is not what was written")


def _populate(mapped: mmap.mmap) -> None:
    """Bring the file in now: a disk that fails is an OSError here, and SIGBUS at first use."""
    try:
        mapped.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # an older kernel: the pages come as they are used
            raise


def _checksum(flat: Tensor) -> str:
    """32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(flat.view(torch.uint8).numpy().data)


def _is_finite(flat: Tensor) -> bool:
    """A sum of finite values may overflow, so it only tells which chunks to look at closely."""
    return all(
        math.isfinite(chunk.sum().item()) or bool(torch.isfinite(chunk).all())
        for chunk in torch.split(flat, _CHUNK)
    )
