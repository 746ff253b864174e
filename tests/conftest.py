"""What several test modules stand on: a tokenizer, a tiny model, processes to kill."""

from __future__ import annotations

import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pyarrow as pa
import pytest

# Before torch is imported, and for all processes that tests start: matrices are tiny here, and
# threads of several processes on two cores would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is compiled is kept, also where a machine is set to forget it: else each worker rewrites all
# assertions, and each process that a test starts compiles all modules.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
gc.disable()  # until all tests are found: what is made until then stays

from pipeline.audit import answer_schemas  # noqa: E402
from pipeline.audit.similarity import Encoder  # noqa: E402
from pipeline.confined import Confined  # noqa: E402
from pipeline.inputs import carriage  # noqa: E402
from pipeline.report import plots  # noqa: E402
from pipeline.settings import JobSettings  # noqa: E402
from pipeline.storage.schema import Parts  # noqa: E402
from pipeline.tokens import chat_template, constraint_check, tool_calls  # noqa: E402
from tests.tiny_job import echo_settings, write_model, write_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tests.torture.victim import Server

# A busy machine is slow now and then, and that is no fault of what is tested.
hypothesis.settings.register_profile("coppice", deadline=None)
hypothesis.settings.load_profile("coppice")

_LOAD_ENCODER = vars(Encoder)["load"]
_TO_SVG = vars(plots)["to_svg"]
_MOST_CHILDREN = 6
_LONGEST = (
    "flows/test_nights", "executor/test_ray", "torture/test_sweep", "engine/test_triton_kernel",
    "engine/test_layer_programs", "experiment/test_paper", "test_demo",
    "attacks/test_conversations_run", "engine/verify/test_told", "benchmarks/test_gpu",
    "engine/test_evicting", "audit/test_evicted", "engine/test_paged_rows", "engine/test_strict",
    "engine/test_turns", "attacks/test_surroundings", "test_hostile", "audit/test_documents",
    "kvcoppice/test_own_modules", "engine/verify/test_stateful_reference",
    "engine/test_spill_cost", "flows/test_flows", "torture/test_stalls", "torture/test_retries",
    "torture/test_kills", "executor/test_ray_head", "torture/test_power_cut",
)  # fmt: skip
"""Files of `tests`, longest first: one that comes last keeps one worker busy while others rest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others as they were."""
    place = {f"tests/{name}.py": at for at, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays for good: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 50)  # what is frozen does not count, so that each full one seems due
    gc.enable()


def pytest_sessionfinish() -> None:
    """Else libraries would say at the exit that they leak."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_locks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests wait for no job of this machine, and no job waits for them."""
    os.environ["COPPICE_LOCKS"] = str(tmp_path_factory.mktemp("locks"))


@pytest.fixture(scope="session", autouse=True)
def no_flushes() -> Iterator[None]:
    """The disk is not waited for: what was flushed and what was not reads the same until the power
    goes, and that tests/torture plays by the calls that it sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # which knows a bad file as well
        yield


@pytest.fixture(scope="session", autouse=True)
def no_encoder() -> Iterator[None]:
    """Audits describe no similarity, for to load MiniLM takes seconds; see `encoder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "load", classmethod(lambda cls, name=None: None))
        yield


@pytest.fixture(scope="module")
def encoder() -> Iterator[None]:
    """Similarities are those of MiniLM, for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "load", _LOAD_ENCODER)
        yield


@pytest.fixture(scope="module")
def one_encoder(encoder: None) -> Iterator[None]:
    """As `encoder`, loaded once."""
    loaded = Encoder.load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "load", classmethod(lambda cls, name=None: loaded))
        yield


@pytest.fixture(scope="session", autouse=True)
def kept_children() -> Iterator[None]:
    """The children that render chats, read and judge answers and compile what they must be serve
    every job that asks for the same: to start one takes up to a second, and nothing that it is
    asked stays in it."""
    children: dict[bytes, Confined] = {}

    def confined(*task: Any) -> Confined:
        key = pickle.dumps(task)
        found = children.pop(key, None) or Confined(*task)
        children[key] = found
        if len(children) > _MOST_CHILDREN:
            del children[next(iter(children))]
        return found

    with pytest.MonkeyPatch.context() as patch:
        for module in (answer_schemas, constraint_check, chat_template, tool_calls):
            patch.setattr(module, "Confined", confined)
        yield


@pytest.fixture(scope="session", autouse=True)
def carried_once() -> Iterator[None]:
    """What came back through Parquet without a row, or with a row of nulls, is not sent again: each
    job asks, nearly all of them with the same types, and it takes a twentieth of their time."""
    comes_back = carriage._comes_back
    known: set[bytes] = set()

    def asked(inputs: pa.Table, parts: Parts) -> bool:
        if any(column.null_count < len(column) for column in inputs.columns):
            return comes_back(inputs, parts)
        key = pickle.dumps((inputs.schema, inputs.num_rows, parts))
        if key not in known and comes_back(inputs, parts):
            known.add(key)
        return key in known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carriage, "_comes_back", asked)
        yield


def _draw_only(name: str, label: str, draw: Callable[[Figure], None]) -> str:
    """As `to_svg`, but what is drawn is not written, which takes ten times as long."""
    from matplotlib.figure import Figure

    draw(Figure())
    return f'<svg viewBox="0 0 1 1" role="img" aria-label="{escape(label)}"></svg>'


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Reports have empty pictures, for three of them take half a second; see `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "to_svg", _draw_only)
        yield


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """Reports are whole, for the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "to_svg", _TO_SVG)
        yield


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tokenizer_folder: Path) -> JobSettings:
    return echo_settings(tokenizer_folder, max_new_tokens=4, rows_per_part=2, fail_on_error="1")


@pytest.fixture(scope="session")
def server() -> Server:
    """One for all tests: Python starts one fork server, with the modules that were named first."""
    from tests.torture.victim import Server  # with torch, which neither every test nor xdist needs

    return Server()


@pytest.fixture(scope="session")
def kernels() -> None:
    """The compiled kernels are loaded: a test with a cache of its own would compile them again,
    which takes 20 s."""
    from pipeline.engine.kernels.native import why_unavailable

    why_unavailable()
