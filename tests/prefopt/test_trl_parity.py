"""TRL's DPOTrainer as an independent implementation of a whole run: tokenising, reference, forward, loss, AdamW, schedule.

Both sides start from one saved model and see the same text in the same order; nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from prefopt import algorithms
from prefopt.data.records import Labels, Record
from prefopt.models.causal_lm import build_policy
from prefopt.models.loading import load_model
from prefopt.optimization import Logging, Optimization
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream, epoch_order
from prefopt.tokenize import tokenize
from prefopt.trainer import fit

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL calls what transformers has renamed
]

STEPS, BATCH = 3, 8
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 3e-3, 0.05, 1.0
WORDS = ["<unk>", "</s>", *(f"w{i}" for i in range(20))]


@dataclass(frozen=True)
class Run:
    """What both sides report: the loss before each update, and the weights after the last."""

    losses: list[float]
    gradient_norms: list[float]
    weights: dict[str, torch.Tensor]


def save_start(folder: Path) -> None:
    """A two-layer Llama with random weights, large enough that three updates move the loss visibly."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.save_pretrained(folder)


def text_pairs(count: int) -> list[dict[str, str]]:
    """Prompts of 1 to 9 words, completions of 1 to 7, so that padding and packing differ between the two sides."""
    generator = torch.Generator().manual_seed(1)

    def words(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return " ".join(WORDS[2 + i] for i in torch.randint(0, 20, (length,), generator=generator).tolist())

    return [{"prompt": words(9), "chosen": " " + words(7), "rejected": " " + words(7)} for _ in range(count)]


def run_ours(start: Path, rows: Sequence[dict[str, str]], cache: Path, algorithm: str, **hyper: Any) -> Run:
    records = [
        Record(f"pairs:{i + 1}", row["prompt"], (row["chosen"], row["rejected"]), Labels(ranks=(0, 1)))
        for i, row in enumerate(rows)
    ]
    loaded = load_model(str(start), cache=cache, device="cpu")
    policy, reference = build_policy(loaded.model, loaded.tokenizer)
    setting = algorithms.get(algorithm).setting(**hyper)
    stream = OfflineStream(
        tokenize(records, loaded.tokenizer, max_length=64).examples,
        kind=setting.algorithm.stream,
        budget=Budget(batch_size=BATCH, micro_batch_size=3, max_steps=STEPS),
        reference=ReferenceCache(reference),
    )
    optimization = Optimization(learning_rate=LEARNING_RATE, warmup=0.0, weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
    lines = fit(policy, setting.loss, stream, optimization, logging=Logging(log_every=1)).lines
    weights = {name: value.clone() for name, value in policy.model.state_dict().items()}
    return Run([line["loss"] for line in lines], [line["grad_norm"] for line in lines], weights)


def run_trl(start: Path, rows: Sequence[dict[str, str]], folder: Path, **hyper: Any) -> Run:
    trl = pytest.importorskip("trl", reason="trl (the bench extra) is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets (the data extra) is not installed")
    seen: list[float] = []

    class Recorder(trl.DPOTrainer):  # type: ignore[name-defined,misc]
        """Its log rounds the loss to four digits."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            seen.append(float(loss.detach()))
            return loss

    arguments = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP_NORM,
        max_length=64,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **hyper,
    )
    trainer = Recorder(
        model=transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return Run(seen, norms, dict(trainer.model.state_dict()))


# TRL's "sigmoid" ignores label_smoothing without a word, so cDPO cannot be compared here; its loss has tests of its own.
@pytest.mark.parametrize(
    ("algorithm", "hyper", "peer"),
    [
        ("dpo", {"beta": 0.1}, {"loss_type": ["sigmoid"], "beta": 0.1}),
        ("dpo", {"beta": 0.5}, {"loss_type": ["sigmoid"], "beta": 0.5}),
        ("ipo", {"tau": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    ],
)
def test_three_steps_equal_those_of_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, hyper: dict[str, float], peer: dict[str, Any]
) -> None:
    """Losses to 1e-5 (relative where above 1), gradient norms to 1e-4, weights to a hundredth of the way that they went."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_start(tmp_path / "start")
    rows = text_pairs(STEPS * BATCH)
    ours = run_ours(tmp_path / "start", rows, tmp_path / "cache", algorithm, **hyper)
    # TRL walks through its data set in order; it gets the rows in the order that our stream takes them.
    theirs = run_trl(tmp_path / "start", [rows[i] for i in epoch_order(len(rows), 0, 0)], tmp_path / "trl", **peer)
    assert ours.losses == pytest.approx(theirs.losses, abs=1e-5, rel=1e-5)
    assert ours.gradient_norms == pytest.approx(theirs.gradient_norms, rel=1e-4)
    assert abs(ours.losses[2] - ours.losses[0]) > 1e-3, "the updates must be large enough for the comparison to mean something"
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start").state_dict()
    for name, value in start.items():
        moved = (theirs.weights[name] - value).norm()
        assert (ours.weights[name] - theirs.weights[name]).norm() <= 0.01 * moved, name
