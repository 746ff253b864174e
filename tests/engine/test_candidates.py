"""Tokens drawn from the likeliest few equal those drawn from a sort of all, whatever the logits.

`drawn_by_sorting` is how tokens were drawn before there were candidates, word for word.

Red with: rows never left open where the mass lies beyond the candidates, where the token ties with
the last candidate, where top-p ends at a border, where the noise lies on one; ties in the order in
which topk gives them; weights added over all tokens where top-k cuts; two logits that float64's
exponential makes equal ordered by logit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine import candidates
from pipeline.engine.sampling import draw_tokens
from pipeline.records import SamplingParams

Draw = Callable[[Tensor, Sequence[SamplingParams], NDArray[np.float64]], tuple[Tensor, Tensor]]
LAWS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=0.8, top_p=0.9, top_k=50),
    SamplingParams(temperature=0.7, top_k=40),
]


def drawn_by_sorting(
    logits: Tensor, params: Sequence[SamplingParams], noise: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    logits = logits.double()
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device, dtype=logits.dtype)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=logits.dtype)
    top_k = torch.tensor([p.top_k or logits.shape[1] for p in params], device=device)
    probs = torch.softmax(logits / temperature.unsqueeze(1), -1)
    probs, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=device)
    probs = probs.masked_fill(rank >= top_k.unsqueeze(1), 0.0)
    probs = probs / probs.sum(-1, keepdim=True)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= top_p.unsqueeze(1), 0.0)
    cumulative = probs.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    threshold = torch.from_numpy(noise).to(logits.device).unsqueeze(1) * total
    rank = torch.searchsorted(cumulative, threshold, right=True)
    last = torch.searchsorted(cumulative, total)
    rank = torch.minimum(rank, last).clamp_(max=logits.shape[1] - 1)
    return order.gather(1, rank).squeeze(1), total.squeeze(1)


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that happens with hundreds happens with a handful, and nearly every row is left open."""
    monkeypatch.setattr(candidates, "_FEWEST", 4)
    monkeypatch.setattr(candidates, "_GROWTH", 3)
    monkeypatch.setattr(candidates, "_CACHED", 100)
    yield


@st.composite
def rows_of_logits(draw: st.DrawFn) -> Tensor:
    """Peaked and flat, with ties, with equal exponentials, with tokens and rows ruled out."""
    rows, vocabulary = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 15, 16, 17, 60, 200]))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 1e-12, 0.1, 1.0, 4.0, 30.0, 3e4]))
    logits = torch.randn(rows, vocabulary, generator=chance) * spread
    step = draw(st.sampled_from([0.0, 0.25, 2.0]))
    if step:  # many ties
        logits = (logits / step).round() * step
    absent = draw(st.sampled_from([0.0, 0.5, 0.98, 1.0]))
    logits[torch.rand(logits.shape, generator=chance) < absent] = -torch.inf
    if draw(st.integers(0, 9)) == 0:
        logits[0, draw(st.integers(0, vocabulary - 1))] = draw(
            st.sampled_from([torch.nan, torch.inf])
        )
    return logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


LAW = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-4, 0.01, 0.3, 0.8, 1.0, 1.7, 100.0]),
    top_p=st.one_of(st.sampled_from([1.0, 0.5, 0.3, 0.1, 0.9, 1e-9]), st.floats(1e-12, 1.0)),
    top_k=st.one_of(st.none(), st.integers(1, 70), st.just(2**31 - 1)),
)
NOISE = st.one_of(
    st.floats(0.0, 1.0, exclude_max=True),
    st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.75, 1.0 - 2.0**-53]),
)


@given(st.data(), rows_of_logits())
@settings(max_examples=200)
@pytest.mark.usefixtures("few_candidates")
def test_any_rows_draw_what_sorting_draws(data: st.DataObject, logits: Tensor) -> None:
    rows = len(logits)
    params = data.draw(st.lists(LAW, min_size=rows, max_size=rows))
    noise = np.array(data.draw(st.lists(NOISE, min_size=rows, max_size=rows)))
    assert_same_tokens(logits, params, noise)


@pytest.mark.usefixtures("few_candidates")
def test_rounding_decides_as_it_does_when_all_are_sorted() -> None:
    """Whole numbers as weights, top-p and noise right on the borders between two tokens."""
    chance = np.random.default_rng(0)
    for _ in range(300):
        weights = chance.integers(1, 9, (4, 60)) * (chance.random((4, 60)) < 0.2)
        weights[:, 0] = 9
        borders = np.cumsum(-np.sort(-weights), 1) / weights.sum(1, keepdims=True)
        logits = torch.from_numpy(np.log(weights, where=weights > 0, out=np.full((4, 60), -np.inf)))
        top_p, noise = borders[:, :8].T[chance.integers(0, 8, 4), range(4)], borders[:, 1]
        for kept in (top_p.clip(max=1.0), np.ones(4)):
            params = [SamplingParams(temperature=1.0, top_p=float(p)) for p in kept]
            assert_same_tokens(logits, params, np.minimum(noise / kept, 1 - 2.0**-53))


@pytest.mark.usefixtures("few_candidates")
def test_unequal_logits_that_are_equally_likely_keep_the_order_of_their_ids() -> None:
    """float64 rounds away what is added to the distance from the likeliest one."""
    logits = torch.full((1, 60), -20.0)
    logits[0, 30], logits[0, 20:23] = 1.0, torch.tensor([1e-20, 2e-20, 3e-20])
    law = SamplingParams(temperature=1.0)
    found = set()
    for noise in np.linspace(0.0, 0.999, 40):
        assert_same_tokens(logits, [law], np.array([noise]))
        found.add(int(draw_tokens(logits, [law], np.array([noise]))[0]))
    assert found == {30, 20, 21, 22}


def assert_same_tokens(
    logits: Tensor, params: Sequence[SamplingParams], noise: NDArray[np.float64]
) -> None:
    token_ids, mass = draw_tokens(logits, params, noise)
    expected, expected_mass = drawn_by_sorting(logits, params, noise)
    assert torch.equal(mass.isfinite(), expected_mass.isfinite())
    means = mass.isfinite()
    assert torch.equal(token_ids[means], expected[means])


@pytest.mark.parametrize("vocabulary", [1000, 1100, 49_152, 131_072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabularies_of_models_draw_what_sorting_draws(
    vocabulary: int, dtype: torch.dtype
) -> None:
    params = [*LAWS, SamplingParams(temperature=1.3, top_k=300), SamplingParams(temperature=0.01)]
    logits = model_logits(len(params), vocabulary).to(dtype)
    noise = np.random.default_rng(vocabulary).random(len(params))
    assert_same_tokens(logits, params, noise)


def model_logits(rows: int, vocabulary: int) -> Tensor:
    """Falling as a language model's do: about half of the mass in ten tokens, a long tail."""
    chance = torch.Generator().manual_seed(rows)
    rank = torch.rand(rows, vocabulary, generator=chance).argsort(-1) + 1
    return -1.4 * rank.float().log() + 12 + 0.3 * torch.randn(rank.shape, generator=chance)


class BytesTouched(TorchDispatchMode):
    """Bytes of the operands and results of all operations, but of what stays in the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        operands = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)]
        results = [x for x in torch.utils._pytree.tree_leaves(result) if is_tensor(x)]
        for x in [*operands, *results]:
            if x.numel() > candidates._CACHED:
                self.count += x.numel() * x.element_size()
        return result


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def bytes_a_logit(draw: Draw, logits: Tensor, law: SamplingParams) -> float:
    noise = np.random.default_rng(1).random(len(logits)) * 0.5
    with BytesTouched() as touched:
        draw(logits, [law] * len(logits), noise)
    return touched.count / logits.numel()


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_sampling_touches_the_logits_thrice_at_most_and_not_fifty_times(
    law: SamplingParams,
) -> None:
    """A logit is 4 bytes. Sorting all of them touches some 200 for each."""
    logits = model_logits(16, 49_152)
    assert bytes_a_logit(drawn_by_sorting, logits, law) > 150
    assert bytes_a_logit(draw_tokens, logits, law) <= 12


def test_candidates_are_faster_than_a_sort_on_this_processor() -> None:
    logits = model_logits(16, 49_152)
    for law in LAWS:
        noise = np.random.default_rng(2).random(len(logits))
        draws: list[Draw] = [draw_tokens, drawn_by_sorting]
        ours, theirs = (seconds(d, logits, law, noise) for d in draws)
        assert ours < theirs / 2, f"{law}: {ours:.3f} s, {theirs:.3f} s by sorting"


def seconds(draw: Draw, logits: Tensor, law: SamplingParams, noise: NDArray[np.float64]) -> float:
    """The least processor time of two tries: others may be at work on this machine."""
    times = []
    for _ in range(2):
        begin = time.process_time()
        draw(logits, [law] * len(logits), noise)
        times.append(time.process_time() - begin)
    return min(times)
