"""Model folders as an attacker or a broken download leaves them: refused by name, nothing run."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ModelError
from pipeline.job.job import open_job
from pipeline.model.model import load_model
from pipeline.run import run_job
from pipeline.settings import JobSettings
from tests.tiny_job import answers, write_prompts

Damage = Callable[[Path], object]
EVIL = "open({ran!r}, 'w')\nfrom transformers import LlamaConfig as E\n"


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def config(**fields: Any) -> Damage:
    return lambda folder: edit(folder, "config.json", **fields)


def generation(**fields: Any) -> Damage:
    return lambda folder: edit(folder, "generation_config.json", **fields)


def whole(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def index(**weight_map: Any) -> Damage:
    """Weights that are one step up, and an index beside where they were."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        edit(folder, "model.safetensors.index.json", metadata={}, weight_map=weight_map)

    return damage


def link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return damage


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, ran: Path) -> None:
        self._ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._ran), "w")


def unpickled(folder: Path) -> bytes:
    return pickle.dumps(Payload(folder / "ran"))


def pickle_alone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(unpickled(folder))


def pickle_by_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "part.bin").write_bytes(unpickled(folder))
    names = {"model.embed_tokens.weight": "part.bin"}
    edit(folder, "model.safetensors.index.json", metadata={}, weight_map=names)


def own_code(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "evil.py").write_text(EVIL.format(ran=str(folder / "ran")))
        edit(folder, "config.json", **fields)

    return damage


def tokenizer_code(folder: Path) -> None:
    (folder / "evil.py").write_text(EVIL.format(ran=str(folder / "ran")))
    names = {"AutoTokenizer": ["evil.E", "evil.E"]}
    edit(folder, "tokenizer_config.json", tokenizer_class="Evil", auto_map=names)


def header(length: int) -> Damage:
    def damage(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])

    return damage


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


AUTO_MAP = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}
REFUSED: dict[str, tuple[Damage, str]] = {
    "pickled weights": (pickle_alone, "only pickled weights"),
    "pickled weights named by the index": (pickle_by_index, "is not safetensors"),
    "code in config.json": (own_code(model_type="evil", auto_map=AUTO_MAP), "cannot be read"),
    "code of a tokenizer": (tokenizer_code, "cannot load the tokenizer"),
    "a kernel of the hub": (config(_attn_implementation="a/kernel"), "code of another repository"),
    "an adapter": (whole("adapter_config.json", "{}"), "holds an adapter"),
    "../ in the index": (index(a="../outside.safetensors"), "outside of the folder"),
    "an absolute name in the index": (index(a="/outside.safetensors"), "outside of the folder"),
    "no text in the index": (index(a=7), "outside of the folder"),
    "../ in the config": (config(transformers_weights="../x.safetensors"), "cannot be loaded"),
    "an index without a map": (
        whole("model.safetensors.index.json", "{}"), "index.json cannot be read",
    ),
    "an index that is no JSON": (
        whole("model.safetensors.index.json", "{"), "index.json cannot be read",
    ),
    "a link to weights outside": (link("model.safetensors"), "is a link to a place outside"),
    "a link to a config outside": (link("config.json"), "is a link to a place outside"),
    "a link to a tokenizer outside": (link("tokenizer.json"), "is a link to a place outside"),
    "a header of a terabyte": (header(2**40), "weights cannot be loaded"),
    "a header of 2^64 - 1": (header(2**64 - 1), "weights cannot be loaded"),
    "no header": (header(0), "weights cannot be loaded"),
    "half of the weights": (cut("model.safetensors", 0.5), "weights cannot be loaded"),
    "half of the tokenizer": (cut("tokenizer.json", 0.5), "cannot load the tokenizer"),
    "half of the config": (cut("config.json", 0.5), "cannot"),
    "a billion layers": (config(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "layers in a part of the config": (
        config(text_config={"num_hidden_layers": 10**9}), "num_hidden_layers = 1000000000",
    ),
    "a vocabulary of 10^12": (config(vocab_size=10**12), "vocab_size"),
    "a negative vocabulary": (config(vocab_size=-5), "vocab_size"),
    "a context below zero": (config(max_position_embeddings=-1), "max_position_embeddings"),
    "no heads": (config(num_attention_heads=0), "cannot"),
    "KV heads that do not fit": (config(num_key_value_heads=3), "weights cannot be loaded"),
    "a context of text": (config(max_position_embeddings="x"), "cannot"),
    "a config that is a list": (whole("config.json", "[]"), "cannot"),
    "a config that nests": (whole("config.json", "[" * 100_000), "cannot"),
    "code for a dtype": (config(dtype="os.system"), "cannot"),
    "an EOS of text": (generation(eos_token_id="x"), "eos_token_id"),
    "an EOS of an object": (generation(eos_token_id={"a": 1}), "eos_token_id"),
    "an EOS below zero": (generation(eos_token_id=[1, -1]), "eos_token_id"),
    "a temperature of text": (generation(do_sample=True, temperature="hot"), "temperature"),
    "a temperature below zero": (generation(do_sample=True, temperature=-3.0), "temperature"),
    "a top_k of text": (generation(do_sample=True, top_k="many"), "top_k"),
    "a top_p of 7": (generation(do_sample=True, top_p=7.0), "top_p"),
    "new tokens of text": (generation(max_new_tokens="x"), "generation_config"),
    "new tokens below zero": (generation(max_new_tokens=-3), "generation_config"),
    "new tokens in halves": (generation(max_new_tokens=3.5), "max_new_tokens"),
    "do_sample of text": (generation(do_sample="no", temperature=0.5), "do_sample"),
    "defaults that are a list": (whole("generation_config.json", "[]"), "generation_config"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "p.parquet", ["hello", "there"])


@pytest.mark.fault(
    "pickle-only weights",
    injected="weights that write a file when unpickled: alone, and named by the index",
    outcome="ModelError, exit code 2; not unpickled",
)
@pytest.mark.fault(
    "code in a model's repository",
    injected="auto_map in config and tokenizer, a kernel of the hub, an adapter",
    outcome="ModelError, exit code 2; not run",
)
@pytest.mark.fault(
    "../ names in a model",
    injected="../ and absolute names in the index, ../ in the config",
    outcome="ModelError, exit code 2; nothing outside is opened",
)
@pytest.mark.fault(
    "links out of a model's folder",
    injected="weights, config or tokenizer as a link to a file outside",
    outcome="ModelError, exit code 2; the link is named",
)
@pytest.mark.fault(
    "absurd sizes in a model",
    injected="a billion layers, a vocabulary of 10^12, a header of 2^64 - 1",
    outcome="ModelError, exit code 2; at once",
)
@pytest.mark.fault(
    "missing or partial model",
    injected="half of the weights, tokenizer, config; an index without a map",
    outcome="ModelError, exit code 2; the file is named",
)
@pytest.mark.fault(
    "wrong types in generation defaults",
    injected="text, objects, negative numbers in generation_config.json",
    outcome="ModelError, exit code 2; the field is named",
)
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_model_is_refused_by_name_and_runs_nothing(
    tmp_path: Path, folder: Path, source: Path, case: str
) -> None:
    """Seen red, before the refusal was there: "pickled weights named by the index" (torch.load was
    called), the links (ran), "a billion layers" (hung), each wrong type (unexpected errors)."""
    damage, said = REFUSED[case]
    damage(folder)
    settings = JobSettings.from_flat({"model": str(folder), "max_new_tokens": 2, "device": "cpu"})
    with pytest.raises(ModelError) as refused:
        open_job(str(source), settings)
        load_model(settings.model)
    message = str(refused.value)
    assert said in message and "\n" not in message and len(message) < len(str(folder)) + 400
    assert refused.value.exit_code == 2
    assert not (folder / "ran").exists()


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """So that a missing file means something."""
    pickle.load(io.BytesIO(unpickled(tmp_path))).close()
    assert (tmp_path / "ran").exists()


@pytest.mark.fault(
    "code in a model's repository",
    injected="auto_map beside a model_type that is known",
    outcome="runs with the known class; the code is not",
)
def test_code_beside_a_known_model_is_ignored(folder: Path, source: Path, tmp_path: Path) -> None:
    own_code(auto_map=AUTO_MAP)(folder)
    settings = JobSettings.from_flat({"model": str(folder), "max_new_tokens": 2, "device": "cpu"})
    assert run_job(str(source), tmp_path / "out", settings).rows_failed == 0
    assert not (folder / "ran").exists()


def test_a_folder_of_the_hubs_cache_is_no_link_out(folder: Path, source: Path) -> None:
    """There every file is a link to `blobs`, beside `snapshots`."""
    hub = folder.parent / "models--org--name"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    snapshot = hub / "snapshots" / "c0ffee"
    folder.rename(snapshot)
    for number, path in enumerate([*snapshot.iterdir()]):
        path.rename(hub / "blobs" / str(number))
        path.symlink_to(hub / "blobs" / str(number))
    settings = JobSettings.from_flat({"model": str(snapshot), "engine": "echo"})
    assert open_job(str(source), settings).shape is not None


@pytest.mark.fault(
    "no end-of-sequence token",
    injected="a model whose config names none",
    outcome="each row ends at max_new_tokens with finish_reason length",
)
def test_a_model_without_eos_runs_to_the_limit(folder: Path, source: Path, tmp_path: Path) -> None:
    edit(folder, "config.json", eos_token_id=None)
    edit(folder, "generation_config.json", eos_token_id=None)
    settings = JobSettings.from_flat({"model": str(folder), "max_new_tokens": 9, "device": "cpu"})
    run_job(str(source), tmp_path / "out", settings)
    rows = answers(tmp_path / "out")
    assert rows["finish_reason"].to_list() == ["length"] * 2
    assert rows["completion_tokens"].to_list() == [9, 9]


@pytest.mark.fault(
    "vocabulary mismatch",
    injected="a tokenizer with more ids than the model",
    outcome="ModelError with both numbers, exit code 2",
)
def test_a_tokenizer_of_another_model_is_refused(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    """Seen red: without `_check_vocabulary` (the run went on)."""
    edit(folder, "config.json", vocab_size=9)
    settings = JobSettings.from_flat({"model": str(folder), "device": "cpu", "engine": "echo"})
    with pytest.raises(ModelError, match="token id 21 appears, but the model knows 9 ids"):
        run_job(str(source), tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
