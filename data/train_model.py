"""Trains the demo model, a small Llama, from scratch on generated documents.

    python data/train_model.py

Expects the tokenizer in the folder (train_tokenizer.py). The loss is taken on answers only. A
level of the curriculum ends when every task is answered well enough; the corpus is endless, so
answers counted while training were never seen before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import TASKS
from documents import LEVELS, REPEAT, Batch, draw_document, iter_batches
from induction import install_induction
from torch.nn import functional
from train_tokenizer import MAX_POSITIONS, MODEL_FOLDER
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PROMOTION = 0.9  # share of right answers, in every task, at which the next level begins
FINISHED = 0.98  # the same on the last level, at which the learning rate begins to fall
SCORE_MEMORY = 0.9  # of the running share of right answers, per batch
WARMUP_STEPS = 50
LOG_STEPS = 20
SAVE_STEPS = 200


@dataclass(frozen=True)
class TrainSettings:
    """What a training run depends on, besides the corpus and the tokenizer."""

    seed: int
    max_steps: int
    decay_steps: int
    batch_tokens: int
    learning_rate: float
    num_threads: int


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about three million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    install_induction(model)
    return model


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and Adam for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(
        matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def predict(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return logits for the learned tokens alone, [learned tokens, vocabulary]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(batch.token_ids[:, :-1], use_cache=False).last_hidden_state
        logits: torch.Tensor = model.lm_head(hidden[batch.learned[:, 1:]])
    return logits.float()


def count_right(batch: Batch, is_right: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Return {task: (right, all)} of a batch: first tokens of answers, or repeated tokens."""
    begins = batch.learned[:, 1:] & ~batch.learned[:, :-1]
    begins |= torch.tensor([task == REPEAT for task in batch.tasks])[:, None] & batch.learned[:, 1:]
    is_right = is_right[begins[batch.learned[:, 1:]]]
    rows = begins.nonzero()[:, 0]
    counts: dict[str, tuple[int, int]] = {}
    for task in (REPEAT, *TASKS):
        of_task = torch.tensor([row_task == task for row_task in batch.tasks])[rows]
        counts[task] = int(is_right[of_task].sum()), int(of_task.sum())
    return counts


class Curriculum:
    """The level of the corpus and the learning rate: both follow the running share of right ones.

    The rate warms up, holds until the last level is mastered or the steps run out, and then falls
    to zero, which ends the training.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.decay_steps = settings.decay_steps
        self.decay_from = settings.max_steps - settings.decay_steps
        self.level = 0
        self.scores = dict.fromkeys((REPEAT, *TASKS), 0.0)
        self.begun_at_step = [0]

    def update(self, step: int, counts: dict[str, tuple[int, int]]) -> bool:
        """Take the counts of a step in; return whether a new level begins."""
        for task, (right, learned) in counts.items():
            if learned:
                old = self.scores[task]
                self.scores[task] = SCORE_MEMORY * old + (1 - SCORE_MEMORY) * right / learned
        if self.level == len(LEVELS) - 1:
            if min(self.scores[task] for task in TASKS) >= FINISHED:
                self.decay_from = min(self.decay_from, step)
            return False
        taught = [REPEAT] if LEVELS[self.level].repeat_share == 1.0 else list(TASKS)
        if min(self.scores[task] for task in taught) < PROMOTION:
            return False
        self.level += 1
        self.scores = dict.fromkeys(self.scores, 0.0)
        self.begun_at_step.append(step + 1)
        return True

    def learning_rate_factor(self, step: int) -> float:
        """Return the share of the full learning rate at a step."""
        left = 1 - (step - self.decay_from) / self.decay_steps
        return max(0.0, min(1.0, (step + 1) / WARMUP_STEPS, left))


def fingerprint(tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    """Return the SHA-256 of a sample of the training tokens of every level."""
    digest = hashlib.sha256()
    for i, level in enumerate(LEVELS):
        rng = random.Random(f"fingerprint-{seed}-{i}")
        for _ in range(100):
            digest.update(json.dumps(draw_document(level, rng, tokenizer).token_ids).encode())
    return digest.hexdigest()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save weights and configurations; generation ends at the end of a text or of a turn."""
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)


class Learner:
    """The model with its optimizers: takes one step a batch."""

    def __init__(self, model: LlamaForCausalLM, learning_rate: float, curriculum: Curriculum):
        self.model = model
        self.optimizers = build_optimizers(model, learning_rate)
        factor = curriculum.learning_rate_factor
        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]

    def take_step(self, batch: Batch) -> tuple[float, dict[str, tuple[int, int]]]:
        """Learn from a batch; return its loss and what was right before."""
        logits = predict(self.model, batch)
        targets = batch.token_ids[:, 1:][batch.learned[:, 1:]]
        loss = functional.cross_entropy(logits, targets)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return loss.item(), count_right(batch, logits.argmax(-1) == targets)


def train(settings: TrainSettings, out: Path) -> dict[str, object]:
    """Train, save into `out`, and return the facts of the run."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.num_threads)
    rng = random.Random(f"train-{settings.seed}")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = build_model(tokenizer)
    curriculum = Curriculum(settings)
    learner = Learner(model, settings.learning_rate, curriculum)
    batches = iter_batches(LEVELS[0], rng, tokenizer, settings.batch_tokens)
    step, num_tokens, start = 0, 0, time.monotonic()
    while curriculum.learning_rate_factor(step) > 0:
        batch = next(batches)
        loss, counts = learner.take_step(batch)
        num_tokens += batch.token_ids.numel()
        if curriculum.update(step, counts):
            level = LEVELS[curriculum.level]
            batches = iter_batches(level, rng, tokenizer, settings.batch_tokens)
        if step % LOG_STEPS == 0:
            log = {"step": step, "level": curriculum.level, "loss": round(loss, 3),
                   "tokens": num_tokens, "seconds": round(time.monotonic() - start)}  # fmt: skip
            scores = {task: round(score, 3) for task, score in curriculum.scores.items()}
            print(json.dumps(log | scores), flush=True)
        if step % SAVE_STEPS == SAVE_STEPS - 1:
            save(model, tokenizer, out)
        step += 1
    save(model, tokenizer, out)
    return {
        **asdict(settings),
        "steps": step,
        "tokens": num_tokens,
        "seconds": math.ceil(time.monotonic() - start),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_sha256": fingerprint(tokenizer, settings.seed),
        "torch": torch.__version__,
        "levels": [asdict(level) for level in LEVELS],
        "level_begun_at_step": curriculum.begun_at_step,
    }


def main() -> None:
    """Train the model and write training.json beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=MODEL_FOLDER, help="folder of tokenizer and model"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--decay-steps", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    settings = TrainSettings(
        args.seed,
        args.max_steps,
        args.decay_steps,
        args.batch_tokens,
        args.learning_rate,
        args.threads,
    )
    facts = train(settings, args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
