"""Prompts become token ids, and token ids text: the only code that knows what a token says.

The whole rendered prompt is tokenised at once; prefixes are found later, on ids. Knows nothing
about files of prompts, plans or engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, partial
from typing import Any

import numpy as np

from pipeline.prompt_settings import TokenSettings
from pipeline.prompts import ChatPrompt, Content, Message, ScoredPrompt, SegmentedPrompt, TurnPrompt
from pipeline.tokens.answer_text import AnswerText
from pipeline.tokens.chat_encoder import ChatEncoder
from pipeline.tokens.chat_template import find_template
from pipeline.tokens.control_tokens import ControlTokens
from pipeline.tokens.encoded import EncodedBatch, EncodedRows, encode_each
from pipeline.tokens.fingerprint import fingerprint_of
from pipeline.tokens.given import render_given, why_not_given, with_given
from pipeline.tokens.grammar import Grammars
from pipeline.tokens.loading import load_tokenizer
from pipeline.tokens.pairs import EncodedPairs, PairEncoder
from pipeline.tokens.prompt_texts import PromptTexts
from pipeline.tokens.reasoning import ReasoningTags, find_tags, named_tags
from pipeline.tokens.segments import SegmentEncoder
from pipeline.tokens.text_encoder import Overlong, TextEncoder
from pipeline.tokens.tool_calls import ToolCallFormat, find_format
from pipeline.tokens.turns import LaterTurns, SystemMessages, TurnFault


class PromptTokenizer:
    """A loaded tokenizer with the job's settings. `encode_batch` is for one thread at a time."""

    def __init__(self, tokenizer: Any, settings: TokenSettings, name: str = "the model") -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._settings = settings
        self._parses = settings.parse_special_tokens
        self._control = ControlTokens(self._backend)
        self._template = find_template(
            tokenizer, settings.chat_template, settings.clock, settings.chat_template_kwargs
        )
        self._prompts = PromptTexts(
            self._template, settings, lambda: self.find_reasoning(True) is not None, name
        )
        self.vocabulary_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.bos_id: int | None = tokenizer.bos_token_id
        """The token that every text of the model begins with, if there is one."""
        self._texts = TextEncoder(self._backend)
        self._chats = ChatEncoder(self._texts, self._control, self._parses)
        source = None if self._template is None else self._template.source
        self.fingerprint = fingerprint_of(tokenizer, source, settings)

    @classmethod
    def load(cls, model: str, revision: str | None, settings: TokenSettings) -> PromptTokenizer:
        """From a folder or a hub id. Raises ModelError if it cannot be loaded (see `loading`),
        UsageError if a chat template is asked for and there is none."""
        return cls(load_tokenizer(model, revision), settings, model)

    @property
    def clock(self) -> datetime | None:
        """What the chat template takes for now; None if there is none that asks."""
        template = self._template
        return template.clock if template is not None and template.reads_clock else None

    def check_fits(self, are_messages: bool) -> None:
        """Raises UsageError where the settings fit no row: see `encode_batch`."""
        self._prompts.check_fits(are_messages)

    def find_reasoning(self, are_messages: bool) -> ReasoningTags | None:
        """The tags around what the model thinks before it answers; by themselves they are found
        only where a chat template writes the prompts. Raises UsageError for tags that are none."""
        named = self._settings.named_tags
        if named is not None:
            return named_tags(self._tokenizer, *named)
        is_chat = are_messages or self._settings.apply_chat_template
        if self._template is None or not is_chat or self._settings.reasoning_tags == "none":
            return None
        return find_tags(self._tokenizer, self._template.source)

    def encode_batch(
        self, contents: Sequence[Content | None], most_tokens: int | None = None
    ) -> EncodedBatch:
        """Tokenise the whole rendered prompt of each row; None (a rejected row) gives no ids.

        `most_tokens`: rows that are sure to have more are only counted. Tokenising takes a hundred
        times the memory of the text.

        Raises UsageError where the settings fit no row: a conversation, or a system prompt, and
        no chat template.
        """
        rows = EncodedRows([()] * len(contents), most_tokens)
        turns = {row: c for row, c in enumerate(contents) if isinstance(c, TurnPrompt)}
        first = {row: turn.content for row, turn in turns.items() if turn.is_first}
        later = {row: turn.content for row, turn in turns.items() if not turn.is_first}
        parts = {row: c for row, c in enumerate(contents) if isinstance(c, SegmentedPrompt)}
        asking = {row: c for row, c in enumerate(contents) if isinstance(c, ChatPrompt)}
        given = {row: self._prompts.taken(prompt) for row, prompt in asking.items()}
        whole = {row: c for row, c in enumerate(contents) if isinstance(c, str | list)} | first
        whole |= {row: prompt.content for row, prompt in given.items()}
        for row, prompt in given.items():
            if (why := self._why_not(prompt)) is not None:
                rows.errors[row], rows.error_types[row] = why, "BadSamplingParams"
        whole = {row: content for row, content in whole.items() if row not in rows.errors}
        plain = {row: content for row, content in whole.items() if self._prompts.is_plain(content)}
        chats = {row: self._prompts.complete(c) for row, c in whole.items() if row not in plain}
        self._encode_plain(plain, rows)
        self._encode_segments(parts, rows)
        self._encode_chats(chats, {row: prompt.given for row, prompt in given.items()}, rows)
        self._encode_later(later, rows)
        for row in (*parts, *whole, *later):
            if row not in rows.overlong and not len(rows.ids[row]):
                rows.errors.setdefault(row, "the tokenizer makes no token of this prompt")
        self._count_systems({row: chats[row] for row in first if row in chats}, rows)
        return rows.batch()

    def encode_pairs(
        self, contents: Sequence[Content | None], most_tokens: int | None = None
    ) -> EncodedPairs:
        """The requests of each row that is scored; see `PairEncoder.encode`."""
        rows = {row: c for row, c in enumerate(contents) if isinstance(c, ScoredPrompt)}
        is_chat = not all(self._prompts.is_plain(prompt.context) for prompt in rows.values())
        return self._pairs.encode(rows, is_chat, most_tokens)

    @cached_property
    def _pairs(self) -> PairEncoder:
        chat = None if self._template is None else self._prompts.chat
        eos: int | None = self._tokenizer.eos_token_id
        first = eos if self.bos_id is None else self.bos_id
        return PairEncoder(self._texts, self._control, self._parses, first, chat)

    def render(self, content: Content) -> str:
        """The text that is tokenised, in segments or not; of a later turn what it adds, of what is
        scored the context, of questions that of the first. Raises TemplateFault if the template
        refuses."""
        return self._prompts.render(content)

    def count_changed_by_joining(self, contents: Sequence[Content | None]) -> int:
        """How many of these prompts are other tokens in segments than in one piece."""
        apart = [c if isinstance(c, SegmentedPrompt) else None for c in contents]
        joined = [None if c is None else self._prompts.in_one_piece(c) for c in apart]
        ids = [
            np.split(batch.flat, np.cumsum(batch.lengths)[:-1]) if len(contents) else []
            for batch in (self.encode_batch(apart), self.encode_batch(joined))
        ]
        pairs = zip(*ids, strict=True)
        return sum(len(a) > 0 < len(b) and not np.array_equal(a, b) for a, b in pairs)

    def decode_batch(self, token_ids: Sequence[Sequence[int]], specials: bool = False) -> list[str]:
        """The text of each answer."""
        all_ids, skips = [list(ids) for ids in token_ids], not specials
        texts: list[str] = self._backend.decode_batch(all_ids, skip_special_tokens=skips)
        return texts

    def encode_word(self, text: str) -> list[int]:
        """The token ids of a text as it stands within others; control tokens are such."""
        return self._texts.encode([text], parse_specials=True, add_specials=False)[0]

    @cached_property
    def answers(self) -> AnswerText:
        return AnswerText(self._backend)

    @cached_property
    def grammars(self) -> Grammars:
        """What constraints mean in its ids."""
        eos: int | None = self._tokenizer.eos_token_id
        tags = self.find_reasoning(True) or find_tags(self._tokenizer)
        return Grammars(self._backend.to_str(), self.vocabulary_size, eos, tags)

    def looks_rendered(self, texts: Sequence[str]) -> str | None:
        """A warning where prompts hold control tokens as plain text, as a template writes them."""
        if self._parses:
            return None
        found = [token for text in texts if (token := self._control.first_in(text)) is not None]
        if not found:
            return None
        return (
            f"{len(found)} of {len(texts)} sampled prompts hold control tokens such as "
            f"{found[0]!r}, which are read as plain text; if a chat template has rendered the "
            "prompts already, add --parse-special-tokens (and no --apply-chat-template)"
        )

    def later_turns(self, are_messages: bool) -> LaterTurns | None:
        """How a template writes turns; None: each adds its text alone."""
        return self._prompts.later if are_messages or self._settings.apply_chat_template else None

    def _encode_plain(
        self, texts: dict[int, str], rows: EncodedRows, add_specials: bool = True
    ) -> None:
        if not texts:
            return
        self._prompts.refuse_system_prompt()
        encode = partial(self._texts.encode, parse_specials=self._parses, add_specials=add_specials)
        for row, text in list(texts.items()):
            try:
                self._texts.check_length([text], rows.most_tokens)
            except Overlong as error:
                rows.overlong[row] = error.least
                del texts[row]
            except ValueError as error:
                rows.errors[row] = str(error)
                del texts[row]
        encode_each(encode, texts, rows)

    def _encode_chats(
        self, chats: dict[int, list[Message]], given: dict[int, str], rows: EncodedRows
    ) -> None:
        """`given`: what the template is given besides, by row."""
        if chats:
            template, is_given = self._prompts.require_template(), [row in given for row in chats]
            render = partial(render_given, template, is_given)
            self._chats.encode(with_given(chats, given), render, rows)

    def _encode_segments(self, prompts: dict[int, SegmentedPrompt], rows: EncodedRows) -> None:
        if not prompts:
            return
        found = self._segments.encode(prompts, rows.most_tokens)
        for row, segments in found.ids.items():
            rows.ids[row] = np.concatenate(segments)
            rows.segments[row] = [len(ids) for ids in segments]
        for row, fault in found.faults.items():
            rows.errors[row], rows.error_types[row] = str(fault), fault.error_type
        rows.overlong |= found.overlong

    @cached_property
    def _segments(self) -> SegmentEncoder:
        chat = None
        if self._settings.apply_chat_template:
            chat = self._prompts.chat
        else:
            self._prompts.refuse_system_prompt()
        return SegmentEncoder(self._texts, self._control, self._parses, chat)

    def _encode_later(self, turns: dict[int, str | list[Message]], rows: EncodedRows) -> None:
        """What they add, without what is put before every text."""
        plain = {row: content for row, content in turns.items() if self._prompts.is_plain(content)}
        self._encode_plain(plain, rows, add_specials=False)
        chats = {}
        for row in turns.keys() - plain.keys():
            try:
                chats[row] = self._prompts.later.behind(turns[row])
            except TurnFault as fault:
                rows.fail(row, fault)
        if chats:
            self._chats.encode(chats, self._prompts.later.render, rows)

    def _count_systems(self, chats: dict[int, list[Message]], rows: EncodedRows) -> None:
        """Of first turns that have a prompt."""
        for row in [row for row in chats if len(rows.ids[row])]:
            try:
                rows.system_tokens[row] = self._systems.count(chats[row], rows.ids[row])
            except TurnFault as fault:
                rows.fail(row, fault)

    @cached_property
    def _systems(self) -> SystemMessages:
        later = self._prompts.later
        return SystemMessages(later, lambda messages: self.encode_batch([messages]).flat)

    def _why_not(self, prompt: ChatPrompt) -> str | None:
        """Why a row cannot be given what it asks for; None: it can."""
        if prompt.given == "{}":
            return None
        if self._template is None or self._prompts.is_plain(prompt.content):
            return "the row asks for what only a chat template does; add --apply-chat-template"
        can_call = '"tools"' in prompt.given and self.tool_calls is not None
        return why_not_given(self._template, prompt.given, can_call)

    @cached_property
    def tool_calls(self) -> ToolCallFormat | None:
        """How answers call tools; None: nobody says."""
        template = self._template
        if template is None or not {"tools", "messages"} <= template.names:
            return None
        return find_format(self._tokenizer, template.render)
