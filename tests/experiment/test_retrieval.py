"""Nearest embeddings, the vectors that are kept, and what they miss."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.experiment.neighbours import longest_shared, make_corpus, study_neighbours
from pipeline.experiment.retrieval import EmbeddingIndex, Vectors, keep_vectors
from pipeline.kvstore.folder import EMBEDDINGS_NAME
from pipeline.kvstore.identity import TokenIds
from pipeline.kvstore.tree import common_length


class LetterEncoder:
    """Counts of letters, as unit vectors; remembers what it was asked."""

    def __init__(self, name: str = "letters") -> None:
        self.name = name
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.asked += texts
        counts = np.array([[t.count(c) + 1e-3 for c in "abcdefgh"] for t in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def draw_texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcdefgh"), 12)) for _ in range(count)]


def test_the_nearest_is_what_a_loop_finds() -> None:
    """Seen red: the place among the compared ones instead of that in the index."""
    encoder = LetterEncoder()
    texts = draw_texts(300)
    index = EmbeddingIndex(encoder, encoder.encode(texts))
    for query in draw_texts(40, seed=1):
        scores = [float(encoder.encode([query])[0] @ vector) for vector in index.vectors]
        found = index.nearest(query)
        assert found.score == pytest.approx(max(scores), abs=1e-5)
        assert scores[found.key] == pytest.approx(max(scores), abs=1e-5)
        assert min(found.embed_s, found.search_s) > 0


def test_vectors_that_differ_by_less_than_a_half_can_say_are_told_apart() -> None:
    """Seen red: the scores of the index, which holds vectors of 16 bits."""
    encoder = LetterEncoder()
    wished = encoder.encode(["abcdefgh"])
    nudges = np.random.default_rng(3).normal(0, 5e-4, (6, 8)).astype(np.float32)
    vectors = np.concatenate([encoder.encode(draw_texts(20)), wished + nudges])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = EmbeddingIndex(encoder, vectors)
    for key in range(20, 26):
        assert index.search(vectors[key])[1] == pytest.approx(1.0, abs=1e-6)
        best = int((vectors @ vectors[key]).argmax())
        assert index.search(vectors[key])[0] == best


def test_an_index_takes_unit_vectors_alone() -> None:
    with pytest.raises(ValueError, match="unit vectors"):
        EmbeddingIndex(LetterEncoder(), np.full((2, 8), 2.0, np.float32))
    with pytest.raises(ValueError, match="no prompt is kept"):
        EmbeddingIndex(LetterEncoder(), np.zeros((0, 8), np.float32)).nearest("abc")


def test_kept_vectors_are_computed_once(tmp_path: Path) -> None:
    """Seen red: names that are places instead of hashes of the texts."""
    first = keep_vectors(tmp_path, LetterEncoder(), ["abc", "def"])
    again = LetterEncoder()
    found = keep_vectors(tmp_path, again, ["gh", "def", "abc"])
    assert again.asked == ["gh"]
    assert np.array_equal(found[[2, 1]], first)
    assert b"abc" not in (tmp_path / EMBEDDINGS_NAME).read_bytes()


def test_another_encoders_vectors_are_not_used(tmp_path: Path) -> None:
    keep_vectors(tmp_path, LetterEncoder(), ["abc"])
    other = LetterEncoder("other")
    keep_vectors(tmp_path, other, ["abc"])
    assert other.asked == ["abc"]


@pytest.mark.fault(
    "embeddings beside a KV store altered, cut or not safetensors",
    injected="a bit of a vector flipped; half of the file; text",
    outcome="computed again; no altered vector is searched",
)
@pytest.mark.parametrize("damage", ["flip", "cut", "text"])
def test_altered_vectors_are_computed_again(tmp_path: Path, damage: str) -> None:
    """Seen red: reading without comparing the hash."""
    expected = keep_vectors(tmp_path, LetterEncoder(), ["abc", "def"])
    path = tmp_path / EMBEDDINGS_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    left = {"flip": bytes(content), "cut": bytes(content[: len(content) // 2]), "text": b"abc"}
    path.write_bytes(left[damage])
    encoder = LetterEncoder()
    assert np.array_equal(keep_vectors(tmp_path, encoder, ["abc", "def"]), expected)
    assert encoder.asked == ["abc", "def"]


def encode_letters(texts: Sequence[str]) -> list[TokenIds]:
    return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_shared_prefix_is_what_a_loop_finds(seed: int) -> None:
    """Ids above 255 as well. Seen red: keys of little-endian bytes, which sort otherwise."""
    draw = np.random.default_rng(seed)
    stored = [draw.choice([1, 256, 70000], n).astype(np.uint32) for n in draw.integers(1, 9, 30)]
    keys = sorted(ids.astype(">u4").tobytes() for ids in stored)
    for n in range(1, 9):
        query = draw.choice([1, 256, 70000], n).astype(np.uint32)
        assert longest_shared(keys, query) == max(common_length(ids, query) for ids in stored)


def test_what_the_nearest_misses_is_counted() -> None:
    """Letters say that the shuffled text is nearest; ids, that the other begins alike."""
    stored, asked = ["hgfedcba", "abcdxxxx", "abcd"], ["abcdefgh"]
    row = study_neighbours(LetterEncoder(), encode_letters, (stored, asked), [1, 3])[-1]
    assert (row.stored, row.misses, row.whole_prefixes, row.whole_misses) == (3, 1.0, 1.0, 1.0)
    assert (row.tokens_lost, row.tokens_lost_whole) == (1.0, 1.0)
    row = study_neighbours(LetterEncoder(), encode_letters, (["abcdefg"], asked), [1])[0]
    assert (row.misses, row.whole_misses, row.tokens_lost, row.tokens_lost_whole) == (0, 0, 0, 0)


def test_no_text_that_is_asked_is_stored_whole() -> None:
    texts = [f"{zlib.crc32(bytes([i]))}. Line {i}.\nEnd {i}" for i in range(60)]
    stored, asked = make_corpus(texts, 100, 10)
    assert len(stored) == 100 and len(asked) == 10
    assert not set(stored) & set(asked)
    assert all(any(text.startswith(one) for text in texts) for one in stored)
