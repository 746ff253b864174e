"""Trains the model of the study of documents at any position, from scratch.

    python data/train_segment_model.py

A small Llama learns the rows of pipeline/segments/tasks.py under full attention, with two to six
documents a row. Writes the model, its tokenizer and training.json (settings, fingerprint, time,
scores) into data/segment_model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from induction import install_induction
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from train_model import build_optimizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.segments.tasks import (
    END,
    MOST_DOCUMENTS,
    STOP,
    TASKS,
    UNKNOWN,
    VOCABULARY,
    WORDS,
    Row,
    Task,
    Taught,
    draw_row,
    draw_sequence,
    vocabulary,
)  # fmt: skip

MODEL_FOLDER = Path(__file__).resolve().parent / "segment_model"
TAUGHT_SHARE = 1 / 3
WARMUP_STEPS = 50
DECAY_SHARE = 0.3
FEWEST_AT_FIRST = 3  # most documents of the first sequences
POOL = 512  # sequences, sorted by length before they are cut into batches
LOG_STEPS = 50


@dataclass(frozen=True)
class TrainSettings:
    """What a training run depends on, besides the tasks or streams."""

    seed: int
    layers: int
    steps: int
    batch_tokens: int
    learning_rate: float


Train = Callable[[TrainSettings, Path], dict[str, Any]]
"""Writes a model into a folder; what training.json says of it."""


def build_model(layers: int) -> LlamaForCausalLM:
    """An untrained Llama that looks up one link of a chain in each layer after the first."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384 if layers < 4 else 256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    install_induction(model, hops=True)
    return model


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One word a token, between spaces; those of the study."""
    model = models.WordLevel({word: i for i, word in enumerate(words)}, WORDS[UNKNOWN])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=WORDS[END], unk_token=WORDS[UNKNOWN],
        eos_token=WORDS[STOP],
    )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """token_ids, learned [rows, length]: the latter says what is to be predicted."""

    token_ids: Tensor
    learned: Tensor


class Batches:
    """Batches of at most so many tokens, without end, of 2 to `most_documents` documents each."""

    def __init__(self, rng: random.Random, batch_tokens: int) -> None:
        self.most_documents = FEWEST_AT_FIRST
        self._rng = rng
        self._batch_tokens = batch_tokens

    def __iter__(self) -> Iterator[Batch]:
        while True:
            drawn = [self._draw() for _ in range(POOL)]
            drawn.sort(key=lambda sequence: len(sequence.token_ids))
            rows = self._batch_tokens // len(drawn[-1].token_ids)
            groups = [drawn[i : i + rows] for i in range(0, len(drawn), rows)]
            self._rng.shuffle(groups)
            yield from map(pad, groups)

    def _draw(self) -> Taught:
        documents = self._rng.randint(2, self.most_documents)
        return draw_sequence(self._rng, documents, self._rng.random() < TAUGHT_SHARE)


def pad(sequences: list[Taught]) -> Batch:
    """Sequences as one batch, padded on the right; the last is the longest."""
    shape = len(sequences), len(sequences[-1].token_ids)
    ids, learned = torch.full(shape, END), torch.zeros(shape, dtype=torch.bool)
    for i, (token_ids, is_learned) in enumerate(sequences):
        ids[i, : len(token_ids)] = torch.tensor(token_ids)
        learned[i, : len(is_learned)] = torch.tensor(is_learned)
    return Batch(ids, learned)


def learn(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], batch: Batch, rate: float
) -> float:
    """One step at `rate` of the full learning rate; the loss before it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(batch.token_ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[batch.learned[:, 1:]])
    targets = batch.token_ids[:, 1:][batch.learned[:, 1:]]
    loss = functional.cross_entropy(logits.float(), targets)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def fingerprint(seed: int) -> str:
    """SHA-256 of a sample of the training sequences."""
    rng = random.Random(f"fingerprint-{seed}")
    drawn = [draw_sequence(rng, 2 + i % 5, i % 3 == 0).token_ids for i in range(200)]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


@torch.inference_mode()
def score(model: LlamaForCausalLM, rows: list[Row], is_apart: bool) -> float:
    """Share of the rows whose value is right; `is_apart`: documents do not see each other."""
    right = 0
    for row in rows:
        ids = [*row.preamble, *(t for d in row.documents for t in d), *row.question]
        part = [0] * len(row.preamble)
        part += [i + 1 for i, d in enumerate(row.documents) for _ in d] + [0] * len(row.question)
        parts, at = torch.tensor(part), torch.arange(len(ids))
        sees = at <= at[:, None]
        if is_apart:  # the question sees all; a document sees the preamble and itself
            is_question = at >= len(ids) - len(row.question)
            sees &= (parts == parts[:, None]) | (parts == 0) | is_question[:, None]
        mask = torch.zeros(1, 1, len(ids), len(ids)).masked_fill(~sees, float("-inf"))
        logits = model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0, -1]
        right += int(logits.argmax()) == row.answer[0]
    return right / len(rows)


def draw_rows(task: Task, count: int, seed: str) -> list[Row]:
    """Held-out rows with three to six documents."""
    rng = random.Random(f"held-out-{task}-{seed}")
    return [draw_row(task, rng, 3 + i % (MOST_DOCUMENTS - 2)) for i in range(count)]


def score_all(model: LlamaForCausalLM, count: int, seed: str) -> dict[str, Any]:
    """{task: {full, apart}}: with full attention, and with documents encoded apart."""
    scores: dict[str, Any] = {}
    for task in TASKS:
        rows = draw_rows(task, count, seed)
        scores[task] = {"full": score(model, rows, False), "apart": score(model, rows, True)}
    return scores


def train(settings: TrainSettings, out: Path) -> dict[str, object]:
    """Train, save into `out`, and return the facts of the run."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    rng = random.Random(f"segments-{settings.seed}")
    model = build_model(settings.layers)
    optimizers = build_optimizers(model, settings.learning_rate)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    batches = Batches(rng, settings.batch_tokens)
    endless = iter(batches)
    tokens, start = 0, time.monotonic()
    losses: list[float] = []
    for step in range(settings.steps):
        grown = FEWEST_AT_FIRST + 12 * step // settings.steps  # all six from a quarter on
        batches.most_documents = min(MOST_DOCUMENTS, grown)
        left = (settings.steps - step) / (settings.steps * DECAY_SHARE)
        batch = next(endless)
        rate = min(1.0, (step + 1) / WARMUP_STEPS, left)
        losses.append(learn(model, optimizers, batch, rate))
        tokens += batch.token_ids.numel()
        if step % LOG_STEPS == LOG_STEPS - 1:
            log = {"step": step + 1, "tokens": tokens, "loss": sum(losses) / len(losses),
                   "seconds": round(time.monotonic() - start)}  # fmt: skip
            losses.clear()
            if step % (4 * LOG_STEPS) == 4 * LOG_STEPS - 1:
                log |= score_all(model, 60, "while training")
                model.save_pretrained(out)
            print(json.dumps(log), flush=True)
    seconds = math.ceil(time.monotonic() - start)
    model.save_pretrained(out)
    build_tokenizer(vocabulary()).save_pretrained(out)
    return {
        **asdict(settings),
        "tokens": tokens,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_sha256": fingerprint(settings.seed),
        "torch": torch.__version__,
        "held_out": score_all(model, 500, "at the end"),
    }


def train_by_flags(description: str | None, folder: Path, steps: int, train: Train) -> None:
    """What the command line says is trained, and training.json written beside the model."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=folder, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    settings = TrainSettings(
        args.seed, args.layers, args.steps, args.batch_tokens, args.learning_rate
    )
    facts = train(settings, args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts["held_out"]))


if __name__ == "__main__":
    train_by_flags(__doc__, MODEL_FOLDER, 4000, train)
