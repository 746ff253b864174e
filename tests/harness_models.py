"""Our model of lm-evaluation-harness and its own `hf` model on embedded models, and requests as it
makes them. Whoever imports this is skipped where the harness is not installed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # before `datasets` is imported
pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvcoppice.evaluation.model import CoppiceLM  # noqa: E402

__all__ = [
    "CONTEXTS", "CONTINUATIONS", "MODEL", "PAIRS", "SMALL_MODEL", "CachingLM", "CoppiceLM",
    "TaskManager", "load", "load_theirs", "requests_of", "simple_evaluate",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "data" / "demo_model"
SMALL_MODEL = ROOT / "data" / "segment_model"
CONTEXTS = (
    "The harbour of Corran exports",
    "Question: what is it?\nAnswer: ",
    "Marta ties a knot. \n\t",
    "",
    " \n ",
    "<|endoftext|>A text that begins as a missing context is written:",
    "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n",
)
CONTINUATIONS = (" salt", "salt", " salt and wool", "<|endoftext|>", " 7", "\n\nQ", "é ☃")


def load(model: Path = MODEL, **options: Any) -> CoppiceLM:
    return CoppiceLM(str(model), **{"dtype": "float32", "device": "cpu"} | options)


def load_theirs(model: Path = MODEL) -> Any:
    pytest.importorskip("accelerate", reason="the harness's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)


def requests_of(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(kind, doc={}, arguments=one, idx=i, metadata=("small", i, 1))
        for i, one in enumerate(arguments)
    ]


PAIRS = requests_of(
    "loglikelihood",
    *((context, text) for context in CONTEXTS if context.strip() for text in CONTINUATIONS),
    *(("", text) for text in CONTINUATIONS if text != "<|endoftext|>"),
    ("word " * 1500, " more"),
    ("a", " of" * 1000),
)
