"""Scores the demo model on held-out contexts by plain transformers generation.

    python data/evaluate_model.py

Held out are the contexts: tables, records and passages of a seed stream of their own, with words
and digits which training used in others. Harder, and scored apart: values which are words that
training never saw in any task. Writes "held_out" and "unseen_words" into training.json, each
{task: {format: {n, exact}}}.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import MAX_FACTS, TASKS, Side, Task, draw_topic
from layout import chat_messages, draw_header, plain_prompt
from train_tokenizer import MODEL_FOLDER
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MAX_NEW_TOKENS = 12
MIN_FACTS = 8  # as in the demo prompts
BATCH_ROWS = 25

Scores = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Sitting:
    """What the exams of a score have in common."""

    task: Task
    chat: bool
    side: Side
    seed: int


@dataclass(frozen=True)
class Exam:
    """A held-out prompt, rendered, and its answer."""

    prompt: str
    answer: str


def draw_exams(sitting: Sitting, num_exams: int, tokenizer: PreTrainedTokenizerFast) -> list[Exam]:
    """Return held-out prompts of demo size, each with a context of its own."""
    rng = random.Random(f"held-out-{sitting}")
    exams = []
    for _ in range(num_exams):
        topic = draw_topic(sitting.task, rng, rng.randint(MIN_FACTS, MAX_FACTS), sitting.side)
        item = topic.draw_item(rng)
        question = rng.choice(item.questions)
        header = draw_header(sitting.task, rng)
        prompt = plain_prompt(header, topic, item, question)
        if sitting.chat:
            messages = chat_messages(header, topic, item, question)
            prompt = str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        exams.append(Exam(prompt, question.answer))
    return exams


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str]
) -> list[str]:
    """Return the greedy answers to prompts, without special tokens and outer spaces."""
    tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(prompts), BATCH_ROWS):
        inputs = tokenizer(prompts[start : start + BATCH_ROWS], return_tensors="pt", padding=True)
        with torch.inference_mode():
            outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new_ids = outputs[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_ids, skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exams: list[Exam]
) -> dict[str, float]:
    """Return the number of exams and the share answered exactly."""
    answers = generate_answers(model, tokenizer, [exam.prompt for exam in exams])
    right = sum(answer == exam.answer for answer, exam in zip(answers, exams, strict=True))
    return {"n": len(exams), "exact": right / len(exams)}


def score_all(model_folder: Path, side: Side, num_exams: int, seed: int) -> Scores:
    """Return {task: {format: score}} with values from one side of the word lists."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    scores: Scores = {}
    for task in TASKS:
        scores[task] = {}
        for name, chat in (("plain", False), ("chat", True)):
            exams = draw_exams(Sitting(task, chat, side, seed), num_exams, tokenizer)
            scores[task][name] = score(model, tokenizer, exams)
            print(side, task, name, scores[task][name], flush=True)
    return scores


def main() -> None:
    """Score every task, plain and as chat, and add the scores to training.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--exams", type=int, default=300, help="prompts per task and format")
    args = parser.parse_args()
    path = args.model / "training.json"
    facts = json.loads(path.read_text())
    facts["held_out"] = score_all(args.model, "known", args.exams, args.seed)
    facts["unseen_words"] = score_all(args.model, "unseen", args.exams // 3, args.seed)
    path.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
