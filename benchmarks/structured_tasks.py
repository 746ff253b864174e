"""Ten schemas as extraction and classification jobs have them, and prompts that ask for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import polars as pl

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string", "maxLength": 24}
_DATE: Schema = {"type": "string", "format": "date"}
_DOCUMENT = "The quick brown fox met a lazy dog near old mill number {0}. " * 4
_MONEY: Schema = {"type": "number", "minimum": 0, "maximum": 100000}


def _of(**properties: Schema) -> Schema:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def _list(items: Schema, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most}


CLASSIFICATION: dict[str, Schema] = {
    "sentiment": _of(label={"enum": ["positive", "negative", "neutral"]}),
    "topic": _of(topic={"enum": ["sports", "politics", "science", "business", "arts"]}),
    "urgency": _of(
        is_urgent={"type": "boolean"},
        department={"enum": ["billing", "support", "sales", "legal"]},
    ),
    "language": _of(language={"enum": ["en", "de", "fr", "es", "it", "pl", "tr", "zh", "ja"]}),
}
EXTRACTION: dict[str, Schema] = {
    "contact": _of(
        first_name=_TEXT, last_name=_TEXT, email_address=_TEXT, telephone_number=_TEXT,
        company_name=_TEXT, postal_code={"type": "string", "pattern": "^[0-9]{5}$"},
    ),
    "invoice": _of(
        invoice_number=_TEXT, invoice_date=_DATE, due_date=_DATE,
        currency={"enum": ["EUR", "USD", "GBP"]}, total_amount=_MONEY, value_added_tax=_MONEY,
        line_items=_list(_of(description=_TEXT, quantity={"type": "integer", "minimum": 1,
                                                           "maximum": 99}, unit_price=_MONEY), 2),
    ),
    "event": _of(
        event_title=_TEXT, start_date=_DATE, end_date=_DATE,
        location=_of(city=_TEXT, country=_TEXT),
        is_online={"type": "boolean"}, expected_attendance={"type": ["integer", "null"],
                                                            "minimum": 0, "maximum": 9999},
    ),
    "product": _of(
        product_name=_TEXT, brand=_TEXT, category={"enum": ["tools", "toys", "food", "clothes"]},
        price=_MONEY, in_stock={"type": "boolean"}, colours=_list({"enum": ["red", "blue"]}, 2),
    ),
    "paper": _of(
        title=_TEXT, publication_year={"type": "integer", "minimum": 1900, "maximum": 2030},
        authors=_list(_of(given_name=_TEXT, family_name=_TEXT), 2),
        open_access={"type": "boolean"},
    ),
    "vacancy": _of(
        job_title=_TEXT, seniority={"enum": ["junior", "senior", "lead"]},
        is_remote={"type": "boolean"},
        salary_range=_of(minimum=_MONEY, maximum=_MONEY), required_skills=_list(_TEXT, 2),
    ),
}  # fmt: skip
SCHEMAS = CLASSIFICATION | EXTRACTION


@dataclass(frozen=True)
class Task:
    """Rows that ask for one of these schemas, one schema after the other."""

    name: str
    schemas: dict[str, Schema]

    def frame(self, rows: int) -> pl.DataFrame:
        """`id`, `prompt`, `form`: the schema of each row as JSON text."""
        names = list(self.schemas)
        asked = [names[i % len(names)] for i in range(rows)]
        texts = [_DOCUMENT.format(i % 97) for i in range(rows)]
        return pl.DataFrame({
            "id": [f"r{i}" for i in range(rows)],
            "prompt": [f"Give the {name} of the following text as JSON.\n\n{text}\n\n{i}:\n"
                       for i, (name, text) in enumerate(zip(asked, texts, strict=True))],
            "form": [json.dumps(self.schemas[name]) for name in asked],
        })  # fmt: skip


TASKS = (
    Task("classification", CLASSIFICATION),
    Task("extraction", EXTRACTION),
    Task("all ten", SCHEMAS),
)
