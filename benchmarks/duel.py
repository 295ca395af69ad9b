"""TRL's DPOTrainer and prefopt on the very same batches, turn by turn in one process.

Trainer's own loop drives: a callback stops its clock after each of its steps, lets prefopt make the same step, and hands
control back. What is timed of TRL is therefore everything that its loop does between two steps (batch, collator, step,
clipping, AdamW, schedule, logging), and of prefopt everything that `fit` does (stream, packing, reference, update, log).

Both sides keep their parameters in one storage, which is put back to the round's start before every turn: all turns of a round
compute the same loss and gradient, which is checked, and memory holds the weights once. Each side has its own AdamW. The next
round starts from what prefopt's last turn made of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

import losses
from benchmarks.measuring import Busy, matmul_rate
from benchmarks.trl_peer import PairTrainer, build_trainer, pair_rows, reference_logps
from prefopt.data.records import Example
from prefopt.machine import keep_freed_memory
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.loading import load_model
from prefopt.models.lora import LoRA
from prefopt.models.protocol import trainable_parameters
from prefopt.optimization import Logging, Optimization
from prefopt.options import default_cache
from prefopt.parallel.strategy import Strategy
from prefopt.recovery import Recovery
from prefopt.reference import ReferenceCache, StartReference
from prefopt.runlog import RunLog
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import _Run

TINY = "tiny"
"""A random Llama of 4 layers and 128 dimensions: what a step costs besides arithmetic."""

LOOP, CACHED = "in the loop", "precomputed"
MODES = (LOOP, CACHED)


@dataclass(frozen=True)
class Contest:
    """What both sides train.

    Args:
        model: a name for `load_model`, or `TINY`.
        batches: the steps, of equally many pairs each. The first one warms both sides up and is not counted.
        lora: rank of adapters on all linear layers; 0 trains all weights.
        learning_rate: constant.
        beta: of DPO.
    """

    model: str
    batches: tuple[tuple[Example, ...], ...]
    lora: int = 0
    learning_rate: float = 1e-5
    beta: float = 0.1

    @property
    def pairs(self) -> int:
        return len(self.batches[0])

    @cached_property
    def longest(self) -> int:
        """Most tokens of a prompt with one of its completions."""
        return max(len(e.prompt_ids) + len(ids) for batch in self.batches for e in batch for ids in e.completion_ids)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer), float32 on the CPU."""
        if self.model == TINY:
            return tiny_model()
        loaded = load_model(self.model, cache=default_cache(), device="cpu")
        return loaded.model, loaded.tokenizer

    def trainer(self, model: Any, tokenizer: Any, dataset: Any, **more: Any) -> PairTrainer:
        """TRL's side."""
        return build_trainer(
            model, tokenizer, dataset, lora=self.lora, pairs=self.pairs, learning_rate=self.learning_rate, beta=self.beta,
            max_length=self.longest, **more,
        )  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One step of one side.

    Args:
        round: 0 is the warm-up.
        side: "trl" or "prefopt".
        mode: how it gets its reference log-probs.
        seconds: of the step.
        pass_seconds: of these, for the reference's forward pass (prefopt in the loop; 0 elsewhere: TRL's is not apart).
        others: share of the machine that other processes used; None where the system does not tell.
        gflops: the machine's matmul rate just before.
        loss, grad_norm: of the step; the norm before clipping.
    """

    round: int
    side: str
    mode: str
    seconds: float
    pass_seconds: float
    others: float | None
    gflops: float
    loss: float
    grad_norm: float


class PrefoptSide:
    """prefopt's half: `fit`'s loop body, one step at a time."""

    def __init__(self, contest: Contest, policy: CausalLMPolicy, reference: FrozenReference) -> None:
        self._contest, self._reference, self._policy = contest, reference, policy
        examples = [example for batch in contest.batches for example in batch]
        self.cache = ReferenceCache(reference)
        self.cache.rows(examples)
        whole = self._stream(examples, self.cache, steps=len(MODES) * len(contest.batches))
        optimization = Optimization(learning_rate=contest.learning_rate, schedule="constant", warmup=0.0)
        loss = losses.get("dpo").bind(beta=contest.beta)
        # A log line at every step: it yields the loss, and costs prefopt a little more than its default of every tenth.
        logging = Logging(log_every=1)
        self.run = _Run(policy, loss, whole, optimization, logging, Recovery(), None, Strategy(), lambda text: None)
        self._log = RunLog(None, "", whole.total_steps)
        self.busy = Busy()

    def _stream(self, examples: Sequence[Example], cache: ReferenceCache, steps: int) -> OfflineStream:
        budget = Budget(batch_size=self._contest.pairs, max_steps=steps, epochs=steps)
        return OfflineStream(examples, kind="pairs", budget=budget, reference=cache, dtype=self._policy.dtype)

    def step(self, batch: Sequence[Example], mode: str) -> tuple[float, float, float]:
        """One update; (seconds for the reference and the stream, loss, gradient norm). `busy` holds the whole."""
        self.busy.start()
        cache = self.cache if mode == CACHED else ReferenceCache(self._reference)
        stream = self._stream(batch, cache, steps=1)
        reference_seconds = self.busy.elapsed()
        self.run.update(next(iter(stream)))
        self.run.after_update(self._log)
        self.busy.stop()
        line = self.run.result.lines[-1]
        return reference_seconds, line["loss"], line["grad_norm"]


class Duel(TrainerCallback):
    """Both sides over the batches of a contest: TRL in the loop, prefopt in the loop, TRL precomputed, prefopt cached, and on.

    Args:
        contest: the batches, each of which both sides train on twice.
        calibration: seconds of matrix products before each turn; 0 measures the rate once, before the first.
        say: told about every round when it is over; None is silent.
    """

    def __init__(self, contest: Contest, *, calibration: float = 0.3, say: Callable[[str], None] | None = None) -> None:
        # Not `keep_freed_memory`, which `prefopt train` sets: kept memory of one side would stand in the other's way.
        self.contest, self._calibration, self._say = contest, calibration, say
        self.turns: list[Turn] = []
        self.overall = Busy()
        model, tokenizer = contest.load()
        # Copied before TRL patches the model's forward.
        ours, frozen, other_frozen = copy.deepcopy(model), *_references(model, contest.lora)
        rows = [example for batch in contest.batches for _ in MODES for example in batch]
        self._trainer = contest.trainer(model, tokenizer, pair_rows(rows), reference=frozen, callbacks=[self])
        policy, reference = _policy(contest, ours, other_frozen, tokenizer)
        share_storage(policy.model, self._trainer.model)
        if frozen is not None and other_frozen is not None:
            share_storage(other_frozen, frozen)
        self._prefopt = PrefoptSide(contest, policy, reference)
        known = reference_logps(self._trainer, contest.batches)
        self._trainer.train_dataset = pair_rows(rows, known)
        self._parameters = trainable_parameters(policy)
        self._start = [parameter.detach().clone() for parameter in self._parameters]
        self._rate = matmul_rate(0.5)
        self._busy = Busy()

    def play(self) -> list[Turn]:
        """All turns, the warm-up's included."""
        with self.overall:
            self._trainer.train()
        return self.turns

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Trainer is about to fetch its first batch."""
        self._begin_trl(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """TRL has made a step: its turn is over, prefopt makes the same step, and TRL goes on."""
        self._busy.stop()
        index = state.global_step - 1
        loss, norm = float(self._trainer.last_loss), float(self._trainer.last_norm)
        self._add(index, "trl", self._busy, 0.0, loss, norm)
        number, mode = self._turn(index)
        self._restore()
        reference_seconds, loss, norm = self._prefopt.step(self.contest.batches[number], mode)
        self._add(index, "prefopt", self._prefopt.busy, reference_seconds if mode == LOOP else 0.0, loss, norm)
        if mode == MODES[-1]:
            self._start = [parameter.detach().clone() for parameter in self._parameters]
            self._tell(number)
        if state.global_step < state.max_steps:
            self._begin_trl(index + 1)

    def _tell(self, number: int) -> None:
        if self._say is not None:
            own = [turn for turn in self.turns if turn.round == number]
            times = ", ".join(f"{turn.side} {turn.mode} {turn.seconds:.1f} s" for turn in own)
            others = max((turn.others or 0.0 for turn in own), default=0.0)
            self._say(f"{f'round {number}' if number else 'warm-up'}: {times}; others used up to {others:.0%} of the machine")

    def _begin_trl(self, index: int) -> None:
        _, mode = self._turn(index)
        self._trainer.precompute_ref_logps = mode == CACHED
        self._restore()
        self._busy.start()

    def _turn(self, index: int) -> tuple[int, str]:
        """(round, mode) of Trainer's step `index`, from 0."""
        return index // len(MODES), MODES[index % len(MODES)]

    @torch.no_grad()
    def _restore(self) -> None:
        """Weights as at the round's start, and the machine's rate at this moment."""
        for parameter, start in zip(self._parameters, self._start, strict=True):
            parameter.copy_(start)
        if self._calibration:
            self._rate = matmul_rate(self._calibration)

    def _add(self, index: int, side: str, busy: Busy, reference_seconds: float, loss: float, norm: float) -> None:
        number, mode = self._turn(index)
        self.turns.append(Turn(number, side, mode, busy.seconds, reference_seconds, busy.share, self._rate, loss, norm))


def share_storage(ours: nn.Module, theirs: nn.Module) -> None:
    """Lets our parameters live in the memory of theirs, by name.

    Raises:
        ValueError: the two models have different parameters.
    """
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    if own.keys() != other.keys():
        raise ValueError(f"the two models differ in their parameters: {sorted(own.keys() ^ other.keys())[:4]}.")
    for name, parameter in own.items():
        parameter.data = other[name].data


def _references(model: Any, lora: int) -> tuple[Any, Any]:
    """Frozen copies for TRL and for prefopt; none under LoRA, where the reference is the model with adapters off."""
    if lora:
        return None, None
    frozen = copy.deepcopy(model).requires_grad_(False)
    return frozen, copy.deepcopy(frozen)


def _policy(contest: Contest, model: Any, frozen: Any, tokenizer: Any) -> tuple[CausalLMPolicy, FrozenReference]:
    """As `build_policy`, with a frozen model that is given."""
    if contest.lora:
        return build_policy(model, tokenizer, lora=LoRA(r=contest.lora, alpha=2 * contest.lora))
    reference = FrozenReference(CausalLMPolicy(frozen, tokenizer), fingerprint(frozen))
    return CausalLMPolicy(model, tokenizer), reference


def peak_of_trl(contest: Contest, mode: str) -> float:
    """Trains on the contest's batches with TRL alone, for its peak memory; the size of the trainable weights in MB."""
    model, tokenizer = contest.load()
    reference = copy.deepcopy(model) if mode == LOOP and not contest.lora else None
    rows = pair_rows([example for batch in contest.batches for example in batch])
    trainer = contest.trainer(model, tokenizer, rows, reference=reference, precompute=mode == CACHED)
    trainer.train()
    return trainable_mb(trainer.model)


def peak_of_prefopt(contest: Contest, mode: str) -> float:
    """The same with prefopt."""
    model, tokenizer = contest.load()
    keep_freed_memory()
    if mode == CACHED and not contest.lora:
        policy = CausalLMPolicy(model, tokenizer)
        side = PrefoptSide(contest, policy, StartReference(policy))
    else:
        lora = LoRA(r=contest.lora, alpha=2 * contest.lora) if contest.lora else None
        side = PrefoptSide(contest, *build_policy(model, tokenizer, lora=lora))
    for batch in contest.batches:
        side.step(batch, mode)
    return trainable_mb(model)


def trainable_mb(model: nn.Module) -> float:
    """Size of the trainable parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 2**20


def tiny_model(vocabulary: int = 4096) -> tuple[Any, Any]:
    """A random Llama of 4 layers and a tokenizer of as many words; the same weights every time."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    words = {"</s>": 0} | {f"w{index}": index for index in range(1, vocabulary)}
    split = Tokenizer(WordLevel(words, unk_token="</s>"))
    split.pre_tokenizer = WhitespaceSplit()
    return LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=split, eos_token="</s>")


def tiny_batches(steps: int, pairs: int, longest: int = 64, seed: int = 0) -> tuple[tuple[Example, ...], ...]:
    """Random pairs of at most `longest` tokens for the tiny model."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        return tuple(torch.randint(1, 4096, (length,), generator=draw).tolist())

    half = longest // 2
    return tuple(
        tuple(
            Example(f"tiny:{step}.{pair}", ids(half // 2, half), (ids(half // 2, half), ids(half // 2, half)))
            for pair in range(pairs)
        )
        for step in range(steps)
    )
