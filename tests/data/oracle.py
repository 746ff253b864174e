"""Answers a prompt from its text alone; written apart from the generator, to check it."""

from __future__ import annotations

import re


def table(text: str, heading: str) -> dict[str, str]:
    """The rows under the one heading that begins so."""
    (rows,) = re.findall(rf"^{heading}.*:\n((?:- .+\n)+)", text, flags=re.MULTILINE)
    return dict(line[2:].split(" ", 1) for line in rows.splitlines())


def classify(text: str, key: str) -> str:
    heading = {"team": "Teams", "priority": "Priorities", "channel": "Channels"}[key]
    rows = table(text, heading)
    (ticket,) = re.findall(r"^Ticket \d+\n(.+)$", text, flags=re.MULTILINE)
    (found,) = {word for word in re.findall(r"\w+", ticket) if word in rows}
    return rows[found]


def extract(text: str, key: str) -> str:
    (value,) = re.findall(rf"^- {key} (.+)$", text, flags=re.MULTILINE)
    return str(value)


def complete(text: str, beginning: str) -> str:
    (value,) = re.findall(rf"(?:^|\. ){beginning} ([^.,;]+)[.,;]", text, flags=re.MULTILINE)
    return str(value)


def solve(task: str, context: str, key: str) -> str:
    return {"classify": classify, "extract": extract, "answer": complete}[task](context, key)


def solve_plain(task: str, prompt: str) -> str:
    """The answer to a plain prompt: its last line is the key, after "Answer: "."""
    context, key = prompt.rsplit("\nAnswer: ", 1)
    return solve(task, context.rsplit("\nQuestion: ", 1)[0] + "\n", key)


def solve_messages(task: str, messages: list[dict[str, str]]) -> str:
    """The answer to a system and a user message: the user's last line is the question."""
    text = "\n".join(message["content"] for message in messages)
    context, question = text.rsplit("\nQuestion: ", 1)
    return solve(task, context + "\n", question.rsplit("? ", 1)[-1])
