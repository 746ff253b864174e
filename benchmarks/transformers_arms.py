"""What transformers itself offers for many prompts: `generate` and `generate_batch`."""

from __future__ import annotations

import torch
import transformers
from transformers import GenerationConfig

from benchmarks.job import Job
from benchmarks.prompts import Prompts
from pipeline.model.model import LoadedModel, load_model
from pipeline.settings import ModelSettings


def _load(job: Job) -> LoadedModel:
    settings = {"model": job.model, "dtype": job.dtype, "device": "cpu"}
    return load_model(ModelSettings.model_validate(settings))


class GenerateArm:
    """`generate` on batches of like length, longest first, padded on the left."""

    def __init__(self, job: Job) -> None:
        self._model = _load(job).model
        self._rows_at_once = job.rows_at_once
        self.engine = f"transformers {transformers.__version__} generate"

    def generate(self, prompts: Prompts, new_tokens: int) -> Prompts:
        """Token ids by row."""
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        answers: dict[int, list[int]] = {}
        for low in range(0, len(order), self._rows_at_once):
            rows = order[low : low + self._rows_at_once]
            batch = self._generate_batch([prompts[row] for row in rows], new_tokens)
            answers.update(zip(rows, batch, strict=True))
        return [answers[row] for row in range(len(prompts))]

    def counters(self) -> None:
        """It counts nothing."""

    def _generate_batch(self, prompts: Prompts, new_tokens: int) -> Prompts:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            output = self._model.generate(
                ids, attention_mask=mask, do_sample=False,
                max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        return [row.tolist() for row in output[:, width:]]


class ContinuousArm:
    """`generate_batch`: transformers' continuous batching over a paged cache, as it comes."""

    def __init__(self, job: Job) -> None:
        self._model = _load(job).model
        self.engine = f"transformers {transformers.__version__} generate_batch"

    def generate(self, prompts: Prompts, new_tokens: int) -> Prompts:
        """Token ids by row."""
        greedy = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        outputs = list(self._model.generate_batch(prompts, generation_config=greedy).values())
        failed = [o.error for o in outputs if o.error is not None]
        if failed or len(outputs) != len(prompts):
            raise RuntimeError(f"{len(outputs)} of {len(prompts)} rows came back; {failed[:1]}")
        return [o.generated_tokens for o in outputs]

    def counters(self) -> None:
        """It counts nothing."""
