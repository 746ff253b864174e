"""Command-line flags derived from the settings, and what each means.

A flag has the name and type of its settings field; every flag defaults to "not said", so that
`layers` can tell it from what a file says. Knows nothing about what a command does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic_core import PydanticUndefinedType

from pipeline.forms import write_duration, write_size
from pipeline.settings import SECTIONS

PANELS = {
    "model": "Model",
    "read": "Input",
    "tokens": "Prompt text",
    "sampling": "Sampling (a row's own columns win)",
    "plan": "Plan",
    "engine": "Device memory and batches (never change an answer)",
    "reuse": "Documents (all but prefix change answers)",
    "conversations": "Conversations (an evictor changes answers)",
    "scoring": "Scores (of given texts; no answer is generated)",
    "write": "Output",
    "fleet": "Machines",
    "recycle": "KV of earlier runs",
    "monitor": "Monitoring",
    "audit": "Audit",
    "store": "Object store",
    "cost": "Costs",
}
"""What the flags of each section of the settings are listed under."""

HELP = {
    "model": "Model folder or hub id.",
    "revision": "Commit, tag or branch of a hub model.",
    "engine": "prefix shares; vllm is vLLM; naive shares nothing.",
    "engine_options": "For vLLM: tensor_parallel_size=2; may be repeated.",
    "dtype": "Of weights and KV: float32 or bfloat16; auto: as saved.",
    "weights": "int8: linear layers in 8 bits, faster on a CPU.",
    "device": "auto, cpu, cuda or cuda:1.",
    "prompt_column": "Column of prompt text (found: prompt).",
    "messages_column": "Column of conversations (found: messages).",
    "segments_column": "Column of prompts in segments (found: segments).",
    "documents_column": "Column of documents before the prompt (found: documents).",
    "template": "A Jinja file that makes prompts of the columns.",
    "json_schema_column": "Column of JSON schemas, one a row.",
    "reorder_fields": "Reorder the template's fields so that rows share more.",
    "id_column": "Column of row ids (found: id, custom_id).",
    "limit": "Only the first N rows.",
    "system_prompt": "A system message put before every row.",
    "chat_template": "A Jinja file instead of the model's own template.",
    "clock": "What a template that prints the date takes for now (today).",
    "apply_chat_template": "Treat each prompt as one user message.",
    "parse_special_tokens": "Let control tokens in the text be control tokens.",
    "chat_template_kwargs": "For the template: enable_thinking=false; may be repeated.",
    "reasoning_tags": "Around reasoning: auto, none, or two like <think>,</think>.",
    "max_new_tokens": "Most tokens of an answer.",
    "temperature": "0 is greedy.",
    "top_p": "Keep the likeliest tokens of this total probability.",
    "top_k": "Keep the k likeliest tokens.",
    "seed": "Of the sampling's random numbers.",
    "stop": "End an answer before this text; may be repeated.",
    "ignore_eos": "Do not end at the end-of-sequence token.",
    "n": "Samples of each row, in the column samples.",
    "logprobs": "Log-probabilities, and of so many likeliest tokens: 0 to 20.",
    "presence_penalty": "Against tokens that the answer has: -2 to 2.",
    "frequency_penalty": "The same, for each time that it has them.",
    "generation_options": "Instead of the model's: min_p=0.1; may be repeated.",
    "json_schema": "A file: each answer is JSON of this schema.",
    "regex": "Each answer matches this expression as a whole.",
    "grammar": "A file in Lark's notation; its rule `start` is the answer.",
    "thinking_budget": "Most tokens of thinking; then its end is forced.",
    "min_prefix_tokens": "Shortest prefix that gets KV of its own.",
    "plan_memory": "Memory for planning; token ids lie on disk.",
    "num_shards": "Cut the job into N parts; say which one by --shard.",
    "shard": "Do only this part, from 0 to N - 1.",
    "on_overlong": "Prompts that exceed the model's context.",
    "max_batch_tokens": "Most prompt tokens of one forward pass.",
    "max_rows": "Most rows that decode together.",
    "kv_budget": "Memory for KV, like 8GiB. Default: half of what is free.",
    "kernels": "auto: the fastest here; torch: nothing compiled.",
    "fidelity": "strict: the same bits in any batch, shared or not.",
    "busy_device": "While another job has the device: wait, fail or share it.",
    "threads": "Of a CPU. Default: one a core, fewer beside busy programs.",
    "reuse": "Of documents: prefix is exact, the others at any position.",
    "epic_tokens": "Of each document, computed again; for epic (8).",
    "blend_share": "Of document tokens, computed again; for cacheblend (15%).",
    "adapter": "Folder of trained tokens; for kvlink and packet.",
    "document_context": "Encode documents below the preamble, or alone.",
    "document_order": "best: as rows share most, which changes prompts.",
    "calibration_rows": "Rows computed both ways before the run; 0: none.",
    "min_agreement": "Least share of them with the same answer.",
    "max_kl": "Most divergence of them, in nats.",
    "on_disagreement": "Where they miss it: fall back to prefix, abort or warn.",
    "conversation_column": "Column of conversations' ids (found: conversation_id).",
    "turn_column": "Column of the turns' numbers (found: turn).",
    "evict": "What a long history gives up; none is exact.",
    "budget_tokens": "Tokens that a conversation keeps. Default: 0.9 of the window.",
    "evict_to": "Share of them that an eviction leaves.",
    "sink_tokens": "First tokens that stay; for sink-recent (4).",
    "gist_tokens": "First tokens that stay; for gist, gist-recent (512).",
    "evict_unit": "Single tokens, or whole turns, the oldest first.",
    "positions": "gap: where tokens were; rerotate: side by side; auto: both.",
    "on_full": "evict, or error: a turn that needs it fails.",
    "max_degenerate": "Most turns that may repeat themselves: 2%.",
    "spill_memory": "For conversations that give way. Default: 1/4 of what is free.",
    "choices_column": "Column of lists of choices (score finds: choices).",
    "choices": "The same choices for every row: yes,no; or repeat it.",
    "continuation_column": "Column of one text to be scored.",
    "prompt_logprobs": "Score the prompts themselves: their perplexity.",
    "questions": "YAML file of questions to ask of every row.",
    "question_order": "Questions before or behind a row's text; auto: what shares more.",
    "normalize": "Compare choices by their mean: none, a token's, a byte's.",
    "rows_per_part": "Rows of one output file; a part is a checkpoint.",
    "preserve_order": "Parts in input order (answers wait in memory).",
    "explode": "A row of the output for each sample, with sample_index.",
    "fail_on_error": "Rows that may fail: a share (1%, 0.01) or a count (50).",
    "time_budget": "Stop by then, resumable: 4h30m, 90s.",
    "stall_timeout": "End, resumable, if nothing moves so long; 0: never.",
    "executor": "local: here; ray: on a cluster, one worker a device.",
    "num_workers": "Workers on Ray. Default: all GPUs, or all machines.",
    "ray_address": "Of the cluster: host:port, auto, local (found by Ray).",
    "kv_store": "Load KV of prefixes from this folder, and keep it there.",
    "kv_store_budget": "Most bytes of it; the least used go first.",
    "metrics_port": "Serve Prometheus metrics here: 9464, 0.0.0.0:9464.",
    "metrics_file": "Write them into this .prom file every 10 s.",
    "audit_sample": "Rows to audit: a share (1%) or a count (200); every group gets one.",
    "audit_min_exact": "Share that must be identical or near ties: 99%, 0.99.",
    "audit_free_running": "Rows that the baseline also generates freely.",
    "audit_arms": "Rows that are also batched, shared and spoilt; 0: none.",
    "audit_encoder": "Sentence encoder for the similarity column.",
    "storage_options": "Of a store, like region=eu-west-1; may be repeated.",
    "price_per_hour": "What an hour of all machines costs, in any currency.",
}
"""What each setting means, in a sentence."""
# Fields that a person writes with a unit, or in one of two ways: the settings parse the text.
WRITTEN_AS = {
    "kv_budget": "size", "kv_store_budget": "size", "plan_memory": "size",
    "time_budget": "duration", "stall_timeout": "duration",
    "clock": "time",
    "fail_on_error": "rows", "audit_sample": "rows", "audit_min_exact": "share",
    "blend_share": "share", "min_agreement": "share",
    "evict_to": "share", "max_degenerate": "share", "spill_memory": "size",
    "json_schema": "path", "grammar": "path",
    "engine_options": "name=value", "storage_options": "name=value",
    "chat_template_kwargs": "name=value", "reasoning_tags": "tags",
}  # fmt: skip

Command = Callable[..., None]


def takes_settings(*sections: str) -> Callable[[Command], Command]:
    """Give a command one flag per field of `sections`; it receives them as the dict `flags`."""
    fields = [(section, name) for section in sections for name in SECTIONS[section].model_fields]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**arguments: Any) -> None:
            denied = [name for _, name in fields if arguments.pop(f"no_{name}", False)]
            flags = {name: arguments.pop(name) for _, name in fields} | dict.fromkeys(denied, False)
            command(**arguments, flags=flags)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "flags"]
        added = [p for section, name in fields for p in _parameters(section, name)]
        # `inspect.signature` prefers __signature__, and Typer asks it.
        call.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        del call.__wrapped__
        return call

    return decorate


def _parameters(section: str, name: str) -> list[inspect.Parameter]:
    """The flag of a field; and one that takes back a yes of the file, which no help lists."""
    field, flag = SECTIONS[section].model_fields[name], name.replace("_", "-")
    asked = _plain(field.annotation)
    kind = asked if asked in (bool, list[str]) else str  # the settings know how to read the rest
    option = typer.Option(
        f"--{flag}",
        help=f"{HELP[name]}{_choices(name, asked)}{_default(name, field.default)}",
        rich_help_panel=PANELS[section],
        metavar=_metavar(name, asked),
        show_default=False,
        autocompletion=_completion(asked),
    )
    added = [_keyword(name, None, Annotated[kind | None, option])]
    if kind is bool:
        denial = typer.Option(f"--no-{flag}", hidden=True)
        added.append(_keyword(f"no_{name}", False, Annotated[bool, denial]))
    return added


def _keyword(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def describe_setting(section: str, name: str) -> str:
    """What a setting means, its choices, and how it is written; not its default."""
    asked = _plain(SECTIONS[section].model_fields[name].annotation)
    kind = "" if asked is bool else f" {_metavar(name, asked)}"
    return f"{HELP[name]}{_choices(name, asked)}{kind.replace(' <choice>', '')}"


def _completion(asked: Any) -> Callable[[str], list[str]] | None:
    """What a shell completes the value with; None: as it thinks fit."""
    if not (words := _words(asked)):
        return None
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def _words(asked: Any) -> tuple[str, ...]:
    return get_args(asked) if get_origin(asked) is Literal else ()


def _choices(name: str, asked: Any) -> str:
    words = _words(asked)
    return "" if all(word in HELP[name] for word in words) else f" One of: {', '.join(words)}."


def _default(name: str, value: Any) -> str:
    """As a person would write it; nothing where there is none, or where the help says it."""
    if value is None or isinstance(value, bool | tuple | dict | PydanticUndefinedType):
        return ""
    if WRITTEN_AS.get(name) == "size":
        return f" Default: {write_size(value)}."
    is_duration = WRITTEN_AS.get(name) == "duration"
    return f" Default: {write_duration(value) if is_duration else value}."


def _metavar(name: str, asked: Any) -> str:
    """Short: the room is better spent on help. A flag that is on or off has no value to name."""
    if asked is bool:
        return ""
    if get_origin(asked) is Literal:
        return "<choice>"
    kinds = {int: "number", float: "number", Path: "path", list[str]: "text"}
    return f"<{WRITTEN_AS.get(name) or kinds.get(asked, 'text')}>"


def _plain(annotation: Any) -> Any:
    """`int | None` -> int, tuples and mappings -> list[str]; literals and scalars as they are."""
    if get_origin(annotation) in (Union, UnionType):
        return _plain(next(a for a in get_args(annotation) if a is not type(None)))
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    return list[str] if get_origin(annotation) in (tuple, dict) else annotation
