"""A model's response template at work, in a process of its own. Knows no tokenizer."""

from __future__ import annotations

import json
from typing import Any

from pipeline.confined import Fault


class ResponseReader:
    """Makes a message of an answer's text, by transformers' own reader of response templates."""

    def __init__(self, template: str) -> None:
        from transformers.utils.chat_parsing import ResponseParser  # seconds, and only here
        from transformers.utils.chat_parsing.response_templates import load_response_template

        self._template = load_response_template(json.loads(template))
        self._parser = ResponseParser

    def __call__(self, text: str) -> str | Fault:
        """The message as JSON."""
        try:
            parser: Any = self._parser(self._template, prefix="")
            parser.feed(text)
            message, _ = parser.finalize()
            return json.dumps(message)
        except Exception as error:  # an answer may be anything, and so may a template
            return Fault(f"the answer cannot be read ({type(error).__name__})")
