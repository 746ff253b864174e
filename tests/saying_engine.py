"""A tokenizer with tags and a chat template, and an engine that says what a test wants it to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline.engine.base import NO_HOOKS, EngineHooks, RunControl
from pipeline.engine.echo_engine import EchoEngine
from pipeline.plan.plan import Plan
from pipeline.records import Completion, Timing
from tests.tokens.conftest import save_tokenizer

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls %}"
    "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
OPENING = (
    TEMPLATE.replace("<think>\n\n</think>\n\n", "").replace(
        "'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'"
    )
    + "{# </think> #}"
)
"""Opens the reasoning itself."""


def save_thinking_tokenizer(folder: Path, template: str = TEMPLATE, *special: str) -> Path:
    """A byte-level tokenizer with tags of reasoning and calls as tokens of their own; `special`:
    further control tokens."""
    save_tokenizer(folder, template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.add_tokens([AddedToken(t, special=True) for t in special], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


class Saying(EchoEngine):
    """Says of each input row the text that `said` has for it, and then the end; of those in `cut`
    without an end."""

    def __init__(self, folder: Path, said: Mapping[int, str], cut: Sequence[int] = ()) -> None:
        super().__init__()
        self._backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
        self._said, self._cut = said, cut
        self.prompts: dict[int, str] = {}
        self.prompt_ids: dict[int, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def text(self, row: int, sample: int) -> str:
        return self._said[row]

    def generate(
        self,
        plan: Plan,
        sequences: NDArray[np.int64],
        control: RunControl,
        hooks: EngineHooks = NO_HOOKS,
    ) -> Iterator[Completion]:
        for sequence in sequences.tolist():
            row = int(plan.sequences.row[sequence])
            ids = self.prompt_ids[row] = plan.table[row].tolist()
            self.prompts[row] = self._backend.decode(ids, skip_special_tokens=False)
            end = [] if row in self._cut else self.encode("<|im_end|>")
            text = self.text(row, int(plan.sequences.sample[sequence]))
            said = (*self.encode(text), *end)
            yield Completion(sequence, said, "stop" if end else "length", 0, Timing())
