"""Which kept prompt is most like a new one, by sentence embedding: the paper's way to a candidate.

FAISS scans all vectors in half precision, half the bytes of float32, and the best of these are
compared in full. The index is made in memory of vectors that we wrote and hashed; no index file is
ever read. Says nothing about whether the candidate's KV may be used: likeness is no prefix.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.kvstore.folder import EMBEDDINGS_NAME
from pipeline.storage.durable import replace_file

Vectors = NDArray[np.float32]
_COMPARED = 8  # rounding to half moves a cosine by less than 1e-3


class TextEncoder(Protocol):
    """Turns texts into unit vectors, float32 [texts, dimensions]."""

    name: str

    def encode(self, texts: Sequence[str]) -> Vectors: ...


class Candidate(NamedTuple):
    """The nearest kept prompt: its place in the index, its cosine, the seconds of both steps."""

    key: int
    score: float
    embed_s: float
    search_s: float


class EmbeddingIndex:
    """Vectors of kept prompts; the key of each is its place. For one thread at a time."""

    def __init__(self, encoder: TextEncoder, vectors: Vectors) -> None:
        """`vectors` [prompts, dimensions], of unit length. Raises ValueError for others."""
        import faiss

        if vectors.ndim != 2 or not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
            raise ValueError("an index holds unit vectors, one a prompt")
        self.encoder = encoder
        self.vectors = np.ascontiguousarray(vectors, np.float32)
        halves, inner = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        self._index: Any = faiss.IndexScalarQuantizer(vectors.shape[1], halves, inner)
        self._index.add(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def nearest(self, text: str) -> Candidate:
        """The kept prompt whose embedding is nearest. Raises ValueError if none is kept."""
        begin = time.perf_counter()
        vector = self.encoder.encode([text])
        embedded = time.perf_counter()
        key, score = self.search(vector[0])
        return Candidate(key, score, embedded - begin, time.perf_counter() - embedded)

    def search(self, vector: Vectors) -> tuple[int, float]:
        """Place and cosine of the nearest vector to this one [dimensions]."""
        if not len(self):
            raise ValueError("no prompt is kept, so none is nearest")
        count = min(_COMPARED, len(self))
        _, found = self._index.search(np.ascontiguousarray(vector[None], np.float32), count)
        scores = self.vectors[found[0]] @ vector
        best = int(scores.argmax())
        return int(found[0, best]), float(scores[best])


def keep_vectors(folder: Path, encoder: TextEncoder, texts: Sequence[str]) -> Vectors:
    """Vectors of these texts, out of `folder` or computed and kept there. Raises StorageError."""
    names = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    known = _read_vectors(folder, encoder.name)
    new = {name: text for name, text in zip(names, texts, strict=True) if name not in known}
    if new:
        known |= dict(zip(new, encoder.encode(list(new.values())), strict=True))
        every, vectors = list(known), np.stack(list(known.values()))
        said = {"encoder": encoder.name, "names": "\n".join(every)}
        said["sha256"] = _digest(every, vectors)
        replace_file(folder / EMBEDDINGS_NAME, save({"vectors": vectors}, said))
    return np.stack([known[name] for name in names])


def _read_vectors(folder: Path, encoder: str) -> dict[str, Vectors]:
    """By name, as they were kept; nothing where they are another encoder's, or altered."""
    try:
        with safe_open(folder / EMBEDDINGS_NAME, "numpy") as file:
            metadata = file.metadata() or {}
            vectors: Vectors = file.get_tensor("vectors")
    except (OSError, SafetensorError):
        return {}
    names = metadata.get("names", "").split("\n")
    if metadata.get("encoder") != encoder or metadata.get("sha256") != _digest(names, vectors):
        return {}
    return dict(zip(names, vectors, strict=True))


def _digest(names: Sequence[str], vectors: Vectors) -> str:
    digest = hashlib.sha256("\n".join(names).encode())
    digest.update(repr(vectors.shape).encode() + np.ascontiguousarray(vectors).tobytes())
    return digest.hexdigest()
