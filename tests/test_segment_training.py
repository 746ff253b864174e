"""`coppice segments train-packet` and `train-links`: a table in, an adapter out."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.errors import InputError, UsageError
from pipeline.model.adapter import load_adapter
from pipeline.model.identity import hash_model_folder, identify_model
from pipeline.settings import ModelSettings
from tests.tiny_job import write_model, write_prompts

RUN = CliRunner()
FEW = ["--held-out", "4", "--batch", "8", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows of two documents, one without any, and one that is too long."""
    rng = random.Random(1)
    words = ["blue", "green", "fish", "tree", "house"]
    documents = [[" ".join(rng.choices(words, k=4)) for _ in range(2)] for _ in range(16)]
    prompts: list[str | None] = ["what?"] * 18
    path = tmp_path_factory.mktemp("table") / "in.parquet"
    return write_prompts(path, prompts, documents=[*documents, [], ["x" * 5000]])


def call(*arguments: str | Path) -> str:
    done = RUN.invoke(app, ["segments", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_packet_is_trained_from_a_table(model: Path, table: Path, tmp_path: Path) -> None:
    out = tmp_path / "packet"
    arguments: list[str | Path] = ["train-packet", table, "--model", model, "--soft-tokens", "2"]
    arguments += ["--rows", "12", "--epochs", "2", *FEW]
    said = call(*arguments, "-o", out)
    assert "held-out KL from full attention" in said
    adapter = load_adapter(out, identify_model(ModelSettings(model=str(model))), 32)
    card = adapter.card
    assert (card.mode, card.soft_tokens, card.most_documents, card.seed) == ("packet", 2, 2, 0)
    assert adapter.rows.shape == (4, 32) and card.drift is None
    assert card.training["epochs"] == 2 and "soft_tokens" not in card.training
    call(*arguments, "-o", tmp_path / "again")
    again = load_adapter(tmp_path / "again", card.model, 32)
    assert again.digest == adapter.digest
    with pytest.raises(UsageError, match="holds an adapter already"):
        call(*arguments, "-o", out)


def test_links_alone_leave_the_model_as_it_is(model: Path, table: Path, tmp_path: Path) -> None:
    held, out = hash_model_folder(model), tmp_path / "links"
    call("train-links", table, "--model", model, "-o", out, "--frozen", "--soft-tokens", "2",
         "--steps", "2", *FEW)  # fmt: skip
    adapter = load_adapter(out, {"model": held, "revision": None}, 32)
    assert adapter.rows.shape == (80, 32) and adapter.card.drift == 0.0
    assert hash_model_folder(model) == held and not (out / "model").exists()


def test_a_model_that_is_trained_with_links_is_another(
    model: Path, table: Path, tmp_path: Path
) -> None:
    out = tmp_path / "links"
    call("train-links", table, "--model", model, "-o", out, "--soft-tokens", "2", "--steps", "2",
         "--learning-rate", "0.01", *FEW)  # fmt: skip
    identity = identify_model(ModelSettings(model=str(out / "model")))
    assert load_adapter(out, identity, 32).card.drift is not None
    old, new = (AutoModelForCausalLM.from_pretrained(x) for x in (model, out / "model"))
    changed = [
        not torch.equal(a, b) for a, b in zip(old.parameters(), new.parameters(), strict=True)
    ]
    assert all(changed)
    assert (out / "model" / "tokenizer.json").exists()


def test_too_few_rows_and_a_table_without_documents_are_refused(
    model: Path, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="there are 16 rows with documents, .* needs 128"):
        call("train-packet", table, "--model", model, "-o", tmp_path / "out")
    plain = write_prompts(tmp_path / "plain.parquet", ["a", "b"])
    with pytest.raises(InputError, match="neither a column 'segments' nor 'documents'"):
        call("train-packet", plain, "--model", model, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
