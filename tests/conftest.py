"""`pytest --import FILE` puts the losses of a user's own file under the laws; fixtures that drive the command line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--import",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file that registers losses (repeatable); --import=FILE where no path of tests is given",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--import"):
        path = Path(name)
        if not path.is_file():
            raise pytest.UsageError(f"--import {name}: no such file; give the path of a Python file that registers losses.")
        spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@dataclass(frozen=True)
class Done:
    """What a command line left behind. `flat` is its output with line breaks and table borders taken out."""

    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        return " ".join(self.out.replace("│", " ").split())

    @property
    def last(self) -> str:
        return self.out.splitlines()[-1]


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that train: the exact world's reference is trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> Iterator[Run]:
    """Runs a command line in this process."""
    import torch

    from prefopt.cli import main
    from prefopt.tasks import exact

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small are slower on several
    monkeypatch.setenv("PREFOPT_CACHE", str(shared_cache))
    monkeypatch.setenv("COLUMNS", "120")
    # Any reference will do for tests of the command line; a hundred times less of its training.
    monkeypatch.setattr(exact, "START_BUDGET", replace(exact.START_BUDGET, max_steps=3))
    monkeypatch.setattr(exact, "START_SAMPLES", 768)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Done(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def new_losses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses that a test imports vanish with it."""
    from losses import registry

    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    return None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a one-layer Llama and a tokenizer of one token a word: a, b, c and d."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    folder = tmp_path_factory.mktemp("models") / "tiny"
    words = ["<unk>", "</s>", "a", "b", "c", "d"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def pair_rows(count: int = 200) -> list[dict[str, Any]]:
    """Pairs with prompts of their own: enough rows for every role."""
    prompts = [" ".join(letters) for letters in product("abcd", repeat=5)][:count]
    return [{"prompt": f"{prompt} ", "chosen": "c a", "rejected": "d d b"} for prompt in prompts]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (dicts, or bytes as they are) to a file."""

    def write(rows: Sequence[Any], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
        return path

    return write


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    return pair_rows()
