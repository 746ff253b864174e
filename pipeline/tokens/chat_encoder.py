"""Conversations become token ids. Knows no settings, and of a template only what it writes.

Rows without a control-token string go through as rendered; the others in pieces, so that only the
template's control tokens are such (see `control_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pipeline.errors import is_row_fault
from pipeline.prompts import Message
from pipeline.tokens.chat_template import TemplateFault
from pipeline.tokens.control_tokens import ControlTokens
from pipeline.tokens.encoded import EncodedRows, encode_each
from pipeline.tokens.segments import RenderAll
from pipeline.tokens.text_encoder import Overlong, TextEncoder


class ChatEncoder:
    """`parses`: control tokens in the texts of rows are control tokens."""

    def __init__(self, texts: TextEncoder, control: ControlTokens, parses: bool) -> None:
        self._texts = texts
        self._control = control
        self._parses = parses
        self._encode = partial(texts.encode, parse_specials=True, add_specials=False)

    def encode(
        self, chats: Mapping[int, list[Message]], render: RenderAll, rows: EncodedRows
    ) -> None:
        """Those of the rows that are conversations, by position."""
        whole: dict[int, str] = {}
        hidden = {r: self._control.hide(m) for r, m in chats.items() if self._needs_pieces(m)}
        asked = [hidden[row].messages if row in hidden else chats[row] for row in chats]
        for row, rendered in zip(chats, render(asked), strict=True):
            try:
                if isinstance(rendered, TemplateFault):
                    rows.fail(row, rendered)
                elif row in hidden:
                    pieces = list(self._control.split(rendered, hidden[row].meaning))
                    rows.ids[row] = self._texts.encode_pieces(pieces, rows.most_tokens)
                else:
                    self._texts.check_length([rendered], rows.most_tokens)
                    whole[row] = rendered
            except Overlong as error:
                rows.overlong[row] = error.least
            except (TypeError, ValueError) as error:
                rows.errors[row] = str(error)
            except BaseException as error:
                if not is_row_fault(error):
                    raise
                kind = type(error).__name__
                rows.errors[row] = f"the conversation cannot be tokenised ({kind})"
        encode_each(self._encode, whole, rows)

    def _needs_pieces(self, messages: list[Message]) -> bool:
        return not self._parses and any(
            self._control.occur_in(text) for message in messages for text in message.values()
        )
