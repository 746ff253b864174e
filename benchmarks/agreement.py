"""How far two engines gave the same tokens. In bfloat16 a near-tie may fall either way, and what
follows it then differs; so this is information there, and a test only in float32."""

from __future__ import annotations


def agreement(
    prompts: list[list[int]], token_ids: list[list[int]], ours: dict[tuple[int, ...], list[int]]
) -> dict[str, float]:
    """Shares of rows that are identical, of tokens that are (by position), of first tokens."""
    pairs = [(ours[tuple(p)], given) for p, given in zip(prompts, token_ids, strict=True)]
    tokens = [a == b for left, right in pairs for a, b in zip(left, right, strict=False)]
    most = sum(max(len(left), len(right)) for left, right in pairs)
    return {
        "rows": sum(left == right for left, right in pairs) / len(pairs),
        "tokens": sum(tokens) / most,
        "first_tokens": sum(left[:1] == right[:1] for left, right in pairs) / len(pairs),
    }
