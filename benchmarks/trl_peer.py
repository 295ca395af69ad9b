"""TRL's DPOTrainer as the benchmarks drive it: its own training loop, on token ids that were made elsewhere."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback

from prefopt.data.records import Example

try:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("a comparison with TRL needs it: pip install -e '.[data,peft,bench]'") from error


class PairTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenised already; everything else is TRL's and Trainer's.

    Attributes:
        last_loss: of the newest step, a scalar tensor.
        last_norm: the gradient's norm of that step before clipping, as Trainer computed it.
        scratch: its output folder, which goes when the trainer goes.
    """

    scratch: tempfile.TemporaryDirectory[str] | None = None

    last_loss: Any = None
    last_norm: Any = None

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """TRL would tokenise text here; with other ids than ours, losses could not be compared."""
        return dataset

    def training_step(self, *arguments: Any, **keywords: Any) -> Any:
        """Keeps the loss. `.item()` is left to the reader, outside the time that is measured."""
        self.last_loss = super().training_step(*arguments, **keywords)
        return self.last_loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self.last_norm = super()._clip_grad_norm(model)
        return self.last_norm


def pair_rows(examples: Sequence[Example], reference: Mapping[str, tuple[float, float]] | None = None) -> Dataset:
    """The features that TRL's tokenisation makes: ids of prompt, chosen and rejected, EOS included where it is scored.

    Args:
        examples: pairs.
        reference: (chosen, rejected) reference log-probs by example id, for precomputed references.
    """
    rows = []
    for example in examples:
        chosen, rejected = example.completion_ids
        row: dict[str, Any] = {
            "prompt_ids": list(example.prompt_ids),
            "chosen_ids": list(chosen),
            "rejected_ids": list(rejected),
        }
        if reference is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = reference[example.id]
        rows.append(row)
    return Dataset.from_list(rows)


def build_trainer(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    *,
    reference: Any,
    lora: int,
    pairs: int,
    learning_rate: float,
    beta: float,
    max_length: int,
    precompute: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> PairTrainer:
    """TRL with the settings that are fastest on a CPU, and otherwise its defaults.

    float32, because bf16 (its default) is emulated on most CPUs; no gradient checkpointing (its default), which trades time
    for memory; one fused pass of AdamW. Rows come in their order, so that both sides see the same batches.

    Args:
        model: trained in place.
        tokenizer: for the pad token.
        dataset: of `pair_rows`.
        reference: the frozen model; None under LoRA, or when log-probs are precomputed.
        lora: rank of adapters on all linear layers; 0 trains all weights.
        pairs: of one step.
        learning_rate: constant.
        beta: of DPO.
        max_length: no row may be longer; TRL would cut it.
        precompute: let TRL compute the reference log-probs when it is built.
        callbacks: of Trainer.
    """
    quiet()
    scratch = tempfile.TemporaryDirectory(prefix="prefopt-trl-")
    arguments = DPOConfig(
        output_dir=scratch.name, use_cpu=True, bf16=False, gradient_checkpointing=False,
        optim="adamw_torch_fused", per_device_train_batch_size=pairs, num_train_epochs=1, learning_rate=learning_rate,
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0, beta=beta, max_length=max_length,
        train_sampling_strategy="sequential", precompute_ref_log_probs=precompute, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = PairTrainer(
        model, reference, arguments, train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora_config(lora) if lora else None, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.scratch = scratch
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora_config(rank: int) -> Any:
    """The adapters that prefopt uses: every linear layer but the head, alpha twice the rank, no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


@torch.no_grad()
def reference_logps(trainer: PairTrainer, batches: Sequence[Sequence[Example]]) -> dict[str, tuple[float, float]]:
    """TRL's own reference log-probs by example id, in batches as in training."""
    model = trainer.ref_model or trainer.model
    found: dict[str, tuple[float, float]] = {}
    for batch in batches:
        inputs = trainer.data_collator(pair_rows(batch).to_list())
        chosen, rejected = trainer.compute_ref_log_probs(model, inputs)
        pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
        found.update({example.id: pair for example, pair in zip(batch, pairs, strict=True)})
    return found


def quiet() -> None:
    """Progress bars and advice of the libraries would stand between the tables."""
    import datasets

    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    for name in ("transformers", "trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
