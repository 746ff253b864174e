"""What a template prints in a process of its own is what `transformers` prints."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipeline.confined import Confined
from pipeline.tokens.chat_renderer import ChatRenderer
from tests.tokens.conftest import CHATML

TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ 'é<&>' | tojson }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% break %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}{{ dict(a=1).a }}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\n y {{ tools is none }}{{ documents }}",
    "undefined": "{{ nothing }}{% if tools %}t{% endif %}{{ messages[0].get('name', '-') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "bold": "{{ '<b>' ~ messages[0].content | upper | trim }}",
}
CHATS = [
    [{"role": "user", "content": " hällo <x> "}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u", "name": "n"},
        {"role": "assistant", "content": "a", "reasoning": "why"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_are_those_of_transformers(folder: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [
        tokenizer.apply_chat_template(
            chat, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
        )
        for chat in CHATS
    ]
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    renderer = Confined(ChatRenderer, (TEMPLATES[name], tokens, datetime.now(), 10.0), 12.0)
    assert renderer.map(CHATS) == expected
