"""Trains the model of the study of conversations, from scratch.

    python data/train_stateful_model.py

A small Llama learns streams of pipeline/stateful/streams.py that end within its window of 256
tokens: facts of all ages are asked for. Writes the model, its tokenizer and training.json
(settings, fingerprint, time, scores) into data/stateful_model. A training that is called again goes
on from its last checkpoint, a file beside that folder which the end removes.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from induction import install_induction
from train_model import build_optimizers
from train_segment_model import Batch, TrainSettings, build_tokenizer, learn, pad, train_by_flags
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.segments.tasks import Taught
from pipeline.stateful.streams import (
    ANSWER,
    END,
    STOP,
    VOCABULARY,
    WINDOW,
    Turn,
    draw_lengths,
    draw_lesson,
    draw_stream,
    vocabulary,
)  # fmt: skip

MODEL_FOLDER = Path(__file__).resolve().parent / "stateful_model"
WARMUP_STEPS = 50
DECAY_SHARE = 0.3
SHORTEST = 96  # tokens of the first sequences
GROWING_SHARE = 0.2
LOG_STEPS = 50
SAVE_STEPS = 200


def build_model(layers: int) -> LlamaForCausalLM:
    """An untrained Llama whose rotary angles make distances beyond the window new to it."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=STOP,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    install_induction(model)
    return model


class Training:
    """A run: model, optimizers and what was drawn, up to the last step taken."""

    def __init__(self, settings: TrainSettings, checkpoint: Path) -> None:
        torch.manual_seed(settings.seed)
        self.model = build_model(settings.layers)
        self.optimizers = build_optimizers(self.model, settings.learning_rate)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self._settings, self._checkpoint = settings, checkpoint
        if checkpoint.exists():
            self._load()

    def run(self) -> Iterator[float]:
        """The loss of each step that is left; checkpoints are written on the way."""
        settings = self._settings
        while self.step < settings.steps:
            began = time.monotonic()
            batch = draw_batch(settings, self.step)
            left = (settings.steps - self.step) / (settings.steps * DECAY_SHARE)
            rate = min(1.0, (self.step + 1) / WARMUP_STEPS, left)
            loss = learn(self.model, self.optimizers, batch, rate)
            self.step += 1
            self.tokens += batch.token_ids.numel()
            self.seconds += time.monotonic() - began
            if self.step % SAVE_STEPS == 0:
                self._save()
            yield loss

    def _save(self) -> None:
        state = {
            "settings": asdict(self._settings),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "at": (self.step, self.tokens, self.seconds),
        }
        written = self._checkpoint.with_suffix(".new")
        torch.save(state, written)
        written.replace(self._checkpoint)

    def _load(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        if state["settings"] != asdict(self._settings):
            raise SystemExit(f"{self._checkpoint} is of other settings; remove it to begin anew")
        self.model.load_state_dict(state["model"])
        for optimizer, held in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self.step, self.tokens, self.seconds = state["at"]


def draw_batch(settings: TrainSettings, step: int) -> Batch:
    """Of one step: it depends on nothing before it, so that a run can go on from anywhere."""
    rng = random.Random(f"stateful-{settings.seed}-{step}")
    grown = min(1.0, step / (GROWING_SHARE * settings.steps))
    most = int(SHORTEST + grown * (WINDOW - SHORTEST))
    lessons = [Taught(*draw_lesson(rng, most)) for _ in range(settings.batch_tokens // most)]
    return pad(sorted(lessons, key=lambda lesson: len(lesson.token_ids)))


def fingerprint(seed: int) -> str:
    """SHA-256 of a sample of the training sequences."""
    rng = random.Random(f"fingerprint-{seed}")
    drawn = [draw_lesson(rng, WINDOW).token_ids for _ in range(200)]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def draw_streams(count: int, seed: str, tokens: int = WINDOW) -> list[list[Turn]]:
    """Held-out streams that end at about so many tokens; all turns have the same lengths."""
    rng = random.Random(f"held-out-{seed}")
    lengths = draw_lengths(rng, tokens)
    return [draw_stream(rng, lengths) for _ in range(count)]


@torch.inference_mode()
def score(model: LlamaForCausalLM, streams: list[list[Turn]]) -> list[tuple[int, int, bool]]:
    """(place of the question's end, age of the fact, whether its value comes out) of each turn."""
    ids = [[t for turn in s for t in (*turn.prompt, turn.fact.value, STOP)] for s in streams]
    said = model(torch.tensor(ids), use_cache=False).logits.argmax(-1)
    found, place = [], 0
    for number, first in enumerate(streams[0]):
        end = place + len(first.prompt) - 1
        for row, stream in zip(said, streams, strict=True):
            turn = stream[number]
            found.append((end, turn.age, int(row[end]) == turn.fact.value))
        place += len(first.prompt) + ANSWER
    return found


def score_all(model: LlamaForCausalLM, count: int, seed: str) -> dict[str, Any]:
    """{within, beyond}: shares that are right by age, of so many streams of four windows, at full
    attention; within: of turns that end inside of the window."""
    found = score(model, draw_streams(count, seed, 4 * WINDOW))
    within: dict[int, list[bool]] = {}
    beyond: dict[int, list[bool]] = {}
    for end, age, is_right in found:
        some = within if end < WINDOW else beyond
        some.setdefault(age // 64 * 64 if end < WINDOW else age // 256 * 256, []).append(is_right)
    return {
        name: {str(age): round(sum(hits) / len(hits), 4) for age, hits in sorted(by_age.items())}
        for name, by_age in (("within", within), ("beyond", beyond))
    }


def train(settings: TrainSettings, out: Path) -> dict[str, object]:
    """Train, save into `out`, and return the facts of the run."""
    torch.set_num_threads(1)
    checkpoint = out.with_suffix(".checkpoint")
    training = Training(settings, checkpoint)
    losses: list[float] = []
    for loss in training.run():
        losses.append(loss)
        if training.step % LOG_STEPS == 0:
            log: dict[str, Any] = {
                "step": training.step, "tokens": training.tokens,
                "loss": round(sum(losses) / len(losses), 4), "seconds": round(training.seconds),
            }  # fmt: skip
            losses.clear()
            if training.step % (4 * LOG_STEPS) == 0:
                log |= score_all(training.model, 20, "while training")
            print(json.dumps(log), flush=True)
    model = training.model.to(torch.bfloat16)
    model.save_pretrained(out)
    build_tokenizer(vocabulary()).save_pretrained(out)
    facts = {
        **asdict(settings),
        "window": WINDOW,
        "tokens": training.tokens,
        "seconds": round(training.seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "data_sha256": fingerprint(settings.seed),
        "torch": torch.__version__,
        "held_out": score_all(model.float(), 200, "at the end"),
    }
    checkpoint.unlink(missing_ok=True)
    return facts


if __name__ == "__main__":
    train_by_flags(__doc__, MODEL_FOLDER, 3000, train)
