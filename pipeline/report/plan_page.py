"""A plan as a page that needs nothing else. Knows layout and formats, no arithmetic and no plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.templates import template
from pipeline.report.tree import Box, TreePicture

_WAYS = {
    "in_given_order": "by prefixes, in the given order",
    "in_best_order": "by prefixes, in the best order",
    "at_any_position": "at any position",
    "by_this_mode": "as this job reuses them",
}


def render_plan(title: str, summary: dict[str, Any], boxes: Sequence[Box], num_nodes: int) -> str:
    """`summary` is the content of `plan/summary.json`; `boxes` the largest of `num_nodes` nodes."""
    order = summary["saving_in_given_order"]
    savings = [("coppice: token by token, rows in the order of the tree", summary["saving"])]
    savings += [
        (f"blocks of {size} tokens, no limit", saving)
        for size, saving in summary["saving_by_blocks"].items()
    ]
    documents = summary.get("documents") or {}
    # Where documents are reused at any position, what is computed is not the tree of the prompts.
    is_drawn = documents.get("mode", "prefix") == "prefix"
    picture = TreePicture(tuple(boxes), num_nodes) if is_drawn else None
    cache = f"LRU of {order['cache_tokens']:,} tokens, rows as the file has them"
    if summary.get("conversations"):
        cache += ", later turns aside"
    return template("plan.html.j2").render(
        title=title,
        plan=summary,
        tree=picture,
        tree_svg=Markup(picture.svg if picture else ""),
        documents=[(how, documents[key]) for key, how in _WAYS.items() if documents.get(key)],
        savings=[*savings, (cache, order["saving"])],
    )
