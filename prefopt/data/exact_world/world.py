"""A world: its prompts, tokenizer, hidden reward and samples, and the exact score of any causal language model in it.

Shapes: G prompts, C completions, N prefixes, T token limit, S symbols, V = S + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prefopt.data.exact_world import labels as pair_labels
from prefopt.data.exact_world import nature, solve
from prefopt.data.exact_world.layout import Layout
from prefopt.data.records import Example, Labels, Record
from prefopt.errors import ConfigError, DataError

EOS = "<eos>"
_LARGEST_TABLE = 5_000_000


@dataclass(frozen=True)
class WorldConfig:
    """Which world.

    Args:
        seed: draws prompts, source and hidden reward.
        prompts: number of prompts, of lengths `prompt_lengths` in turn.
        symbols: number of symbols (letters from a), EOS not counted.
        max_completion_length: most tokens of a completion, EOS included; tokenise and sample with this limit.
        prompt_lengths: symbols of a prompt.

    Raises:
        ConfigError: numbers that make no world, or one too large to enumerate.
    """

    seed: int = 0
    prompts: int = 16
    symbols: int = 6
    max_completion_length: int = 5
    prompt_lengths: tuple[int, ...] = (2, 3, 4)

    def __post_init__(self) -> None:
        if self.seed < 0 or self.prompts < 1 or not 2 <= self.symbols <= 26 or self.max_completion_length < 1:
            raise ConfigError(f"expected seed >= 0, prompts >= 1, 2 to 26 symbols and max_completion_length >= 1, got {self}.")
        if not self.prompt_lengths or min(self.prompt_lengths) < 1:
            raise ConfigError(f"prompt_lengths needs at least one length, all positive, got {self.prompt_lengths}.")
        strings = sum(self.symbols**length for length in range(self.max_completion_length + 1))
        if strings * self.prompts > _LARGEST_TABLE:
            raise ConfigError(
                f"{strings:,} completions x {self.prompts} prompts are over {_LARGEST_TABLE:,}; lower the limit or the symbols."
            )
        used = sum(self.symbols ** -self.prompt_lengths[i % len(self.prompt_lengths)] for i in range(self.prompts))
        if used > 1:
            raise ConfigError(
                f"{self.prompts} prompts of lengths {self.prompt_lengths} cannot all differ at their start; use longer prompts."
            )

    @classmethod
    def tabular(cls, seed: int = 0) -> WorldConfig:
        """A world for convergence tests: 4 prompts, 3 symbols, at most 3 tokens, so 40 completions and 3,120 pairs."""
        return cls(seed=seed, prompts=4, symbols=3, max_completion_length=3)


@dataclass(frozen=True)
class ExactEvaluation:
    """Exact measures of a policy, one value per prompt [G] float64.

    Args:
        reward: expected hidden reward.
        kl: KL(policy || reference) of whole completions, nats.
        entropy: of whole completions, nats.
        length: expected tokens, EOS included.
        eos_share: probability of ending by EOS rather than at the limit.
        pair_accuracy: see `solve.pair_accuracy`.
    """

    reward: Tensor
    kl: Tensor
    entropy: Tensor
    length: Tensor
    eos_share: Tensor
    pair_accuracy: Tensor

    def means(self) -> dict[str, float]:
        """Each measure averaged over prompts."""
        return {name: float(values.mean()) for name, values in vars(self).items()}


class ExactWorld:
    """One world: `layout` orders its completions, `rewards` [G, C] is hidden, `source_next_logps` [G, N, V] made its text."""

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = config or WorldConfig()
        seed, symbols = self.config.seed, self.config.symbols
        self.layout = Layout(symbols, self.config.max_completion_length)
        self.prompt_ids = nature.draw_prompts(seed, self.config.prompts, symbols, self.config.prompt_lengths)
        self.prompts = tuple(self.layout.text(ids) for ids in self.prompt_ids)
        self.source_next_logps = nature.draw_source(seed, self.prompt_ids, self.layout)
        source_logps = self.layout.path_sums(self.source_next_logps)
        self.rewards = nature.draw_rewards(seed, self.config.prompts, self.layout, source_logps)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a letter, EOS last and also the pad token; none is added, so concatenated texts give concatenated ids."""
        vocabulary = {self.layout.text([symbol]): symbol for symbol in range(self.config.symbols)}
        # Without an unknown token a letter outside the symbols is an error rather than something else's id.
        core = Tokenizer(WordLevel({**vocabulary, EOS: self.layout.eos}))
        core.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
        core.decoder = Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False)

    def model_config(self) -> LlamaConfig:
        """A two-layer Llama of about 71,000 parameters whose softmax is over exactly the symbols and EOS."""
        return LlamaConfig(
            vocab_size=self.config.symbols + 1,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=max(self.config.prompt_lengths) + self.config.max_completion_length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=self.layout.eos,
            # An embedding at padding_idx gets no gradient, and EOS is the pad token.
            pad_token_id=None,
        )

    def next_logps(self, model: torch.nn.Module, batch_size: int = 4096) -> Tensor:
        """Next-symbol log-probs of a causal LM after every prompt and prefix [G, N, V] float64, on the CPU.

        Plain forward passes over rows of equal length (no padding, positions from 0) with every string of T - 1 symbols; each
        prefix is read off the first string that begins with it. Independent of the shared forward, so it also checks that. A
        policy lends its model by `with policy.plain_attention() as model`.

        Raises:
            ConfigError: the model's vocabulary is not this world's.
        """
        symbols, limit, layout = self.config.symbols, self.config.max_completion_length, self.layout
        leaves = layout.ids[layout.starts[limit - 1] : layout.starts[limit], : limit - 1]
        device = next(model.parameters()).device
        table = torch.empty(len(self.prompts), layout.prefixes, symbols + 1, dtype=torch.float64)
        by_length: dict[int, list[int]] = {}
        for g, prompt in enumerate(self.prompt_ids):
            by_length.setdefault(len(prompt), []).append(g)
        with _evaluation_mode(model), torch.no_grad():
            for length, members in by_length.items():
                prompts = torch.tensor([self.prompt_ids[g] for g in members])
                rows = torch.cat([prompts.repeat_interleave(len(leaves), 0), leaves.repeat(len(members), 1)], dim=1)
                parts = [
                    model(input_ids=part.to(device), use_cache=False).logits[:, length - 1 :].double().cpu()
                    for part in rows.split(batch_size)
                ]
                logits = torch.cat(parts)
                if logits.shape[-1] != symbols + 1:
                    raise ConfigError(
                        f"the model's vocabulary has {logits.shape[-1]} entries; expected {symbols + 1} (symbols and EOS). "
                        f"Build the model from ExactWorld.model_config()."
                    )
                logps = logits.log_softmax(-1).unflatten(0, (len(members), len(leaves)))
                for depth in range(limit):
                    stride = symbols ** (limit - 1 - depth)
                    table[members, layout.starts[depth] : layout.starts[depth + 1]] = logps[:, ::stride, depth]
        return table

    def sequence_logps(self, next_logps: Tensor) -> Tensor:
        """Log-probs of all completions [G, C] from next-symbol log-probs [G, N, V]; checked to sum to one."""
        logps = self.layout.path_sums(next_logps)
        solve.check_normalised(logps.detach())
        return logps

    def evaluate(self, logps: Tensor, reference_logps: Tensor) -> ExactEvaluation:
        """Every exact measure of a policy against a reference, both [G, C]."""
        return ExactEvaluation(
            reward=solve.expected(self.rewards, logps),
            kl=solve.kl(logps, reference_logps),
            entropy=solve.entropy(logps),
            length=solve.expected(self.layout.lengths.double(), logps),
            eos_share=solve.expected(self.layout.terminated.double(), logps),
            pair_accuracy=solve.pair_accuracy(logps, reference_logps, self.rewards),
        )

    def reward_of(self, prompt_index: int, completion_ids: Sequence[int]) -> float:
        """The hidden reward of token ids: EOS-terminated, or cut at the limit. Raises DataError for anything else."""
        return float(self.rewards[prompt_index, self.layout.index(completion_ids)])

    def reward_text(self, prompt: str, completion: str) -> float:
        """The hidden reward of a completion as text, without EOS: shorter than the limit means that EOS ended it.

        Raises:
            DataError: not a prompt of this world, a letter outside its symbols, or more symbols than the limit.
        """
        if prompt not in self.prompts:
            raise DataError(f"{prompt!r} is not a prompt of this world; its prompts are {', '.join(self.prompts)}.")
        ids = [ord(letter) - ord("a") for letter in completion]
        ending = [self.layout.eos] if len(ids) < self.layout.limit else []
        if any(not 0 <= symbol < self.config.symbols for symbol in ids):
            raise DataError(f"{completion!r} has a letter outside {self.layout.text(range(self.config.symbols))!r}.")
        return self.reward_of(self.prompts.index(prompt), [*ids, *ending])

    def source_records(self, n: int, seed: int) -> list[Record]:
        """`n` samples of the source with one completion each, to train the reference on; the first m are those of `n=m`."""
        rng = nature.generator(seed, nature.SAMPLES, self.config.seed)
        numbers = rng.random((n, 2))
        prompts = np.minimum((numbers[:, 0] * len(self.prompts)).astype(np.int64), len(self.prompts) - 1)
        drawn = pair_labels.sample_completions(self.layout.path_sums(self.source_next_logps), prompts, numbers[:, 1])
        return [
            self._record(f"exact-source:{self.config.seed}:{seed}:{row}", int(g), (int(c),), Labels())
            for row, (g, c) in enumerate(zip(prompts, drawn, strict=True))
        ]

    def sample_pairs(
        self, reference_logps: Tensor, n: int, *, labels: str = "bt", temperature: float = 1.0, seed: int
    ) -> pair_labels.SampledPairs:
        """The pairs of `pairs` as indices, for work on tables."""
        model = pair_labels.parse_labels(labels, temperature)
        return pair_labels.sample_pairs(self.layout, self.rewards, reference_logps, n, model, (seed, self.config.seed))

    def pairs(
        self, reference_logps: Tensor, n: int, *, labels: str = "bt", temperature: float = 1.0, seed: int
    ) -> list[Record]:
        """`n` preference pairs from the reference as records, best first; the hidden reward is not in them.

        Pairs of two seeds are independent, so rows get their role (policy, tuning, judge, test) by seed or by a range of one
        seed, and each record's key is its own id: all roles share the prompts, as evaluation is exact.

        Args:
            reference_logps: [G, C], from `sequence_logps`.
            labels: a label model, see `parse_labels`.
            temperature: of the Bradley-Terry labeller; higher is noisier.
        """
        pairs = self.sample_pairs(reference_logps, n, labels=labels, temperature=temperature, seed=seed)
        soft = pairs.soft_labels.tolist() if pairs.soft_labels is not None else [None] * n
        rows = zip(pairs.prompt.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), soft, strict=True)
        return [
            self._record(f"exact:{self.config.seed}:{seed}:{row}", g, (chosen, rejected), Labels(ranks=(0, 1), soft_label=p))
            for row, (g, chosen, rejected, p) in enumerate(rows)
        ]

    def exact_soft_pairs(
        self, reference_logps: Tensor, *, labels: str = "bt", temperature: float = 1.0
    ) -> pair_labels.PopulationPairs:
        """The population that `pairs` samples from, every pair with its probability; for small worlds such as `tabular`."""
        model = pair_labels.parse_labels(labels, temperature)
        return pair_labels.exact_soft_pairs(self.layout, self.rewards, reference_logps, model)

    def example(self, record: Record) -> Example:
        """A record's token ids as this world defines them; what tokenising with a limit of T tokens must give."""
        prompt, completions = str(record.prompt), [str(text) for text in record.completions]
        ids = [[ord(letter) - ord("a") for letter in text] for text in completions]
        ended = tuple(tuple(body if len(body) == self.layout.limit else [*body, self.layout.eos]) for body in ids)
        return Example(record.id, tuple(ord(letter) - ord("a") for letter in prompt), ended, record.labels)

    def _record(self, id: str, prompt: int, completions: tuple[int, ...], labels: Labels) -> Record:
        return Record(
            id, self.prompts[prompt], tuple(self.layout.texts[c] for c in completions), labels, key=id, source="exact"
        )


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
