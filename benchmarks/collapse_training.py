"""Rewards trained by `rank_utility`: free ones, a network's over made prompts, and a reward model's on ranked lists.

P prompts, K completions, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import losses
from benchmarks.collapse_exact import Array
from losses import rank_utility_loss
from prefopt.data.records import Example
from prefopt.data.sources import load
from prefopt.errors import DataError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.optimization import Optimization
from prefopt.rewards import RewardModelScorer
from prefopt.streams import Budget, OfflineStream
from prefopt.tokenize import tokenize
from prefopt.trainer import fit

OFFSET = 0.1
"""The loss's own: the smaller, the steeper is a tie, and the smaller are the steps that training can take."""

_FEATURES, _HIDDEN = 8, 128
_LONGEST = 64  # tokens of a completion


@dataclass(frozen=True)
class Trained:
    """Rewards of P prompts' completions after training.

    Args:
        rewards: [P, K] in (0, 1), best completion first.
        utility_ids: [P].
    """

    rewards: Array
    utility_ids: Array

    def of(self, utility: int) -> Array:
        """[P', K] rewards of the prompts with this utility."""
        return self.rewards[self.utility_ids == utility]


def train_table(utility: str, *, prompts: int = 2, completions: int = 120, steps: int = 1000, seed: int = 0) -> Trained:
    """A reward for each completion by itself: what a model reaches that can give any reward to anything."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(prompts, completions, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.zeros(prompts, dtype=torch.long)
    return _train([table], lambda: table, ids, utility, learning_rate=0.1, steps=steps)


def train_network(utility: str, *, prompts: int = 8, completions: int = 120, steps: int = 2000, seed: int = 0) -> Trained:
    """One network for all prompts, told a completion's features and its prompt's; what it has to learn is each prompt's order.

    Completions have random features [P, K, F], which every prompt weighs in its own way. Prompts take turns in which of the
    utilities they use.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(prompts, completions, _FEATURES, generator=generator)
    taste = torch.randn(prompts, _FEATURES, generator=generator)
    features = _best_first(features, torch.einsum("pkf,pf->pk", features, taste))
    inputs = torch.cat([features, taste[:, None].expand_as(features)], -1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(2 * _FEATURES, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1)
        )
    ids = torch.arange(prompts) % len(utility.split(","))
    return _train(
        list(network.parameters()), lambda: network(inputs).squeeze(-1), ids, utility, learning_rate=3e-3, steps=steps
    )


def _best_first(features: Tensor, quality: Tensor) -> Tensor:
    order = quality.argsort(1, descending=True)
    return features.gather(1, order[..., None].expand_as(features))


def _train(
    parameters: list[Tensor],
    rewards: Callable[[], Tensor],
    ids: Tensor,
    utility: str,
    *,
    learning_rate: float,
    steps: int,
) -> Trained:
    """Adam with a learning rate that falls to 0, on all prompts at once; `rewards` gives [P, K], best first."""
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        found = rewards()
        ranks = torch.arange(found.shape[1]).expand_as(found)
        loss = rank_utility_loss(found, ranks, torch.ones_like(found), ids, utility=utility, offset=OFFSET).mean()
        optimizer.zero_grad()
        loss.backward()
        # The slopes at ties are many times those elsewhere: without a limit the first steps throw rewards to the ends.
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return Trained(torch.sigmoid(rewards()).double().numpy(), ids.numpy())


def read_lists(source: str, tokenizer: Any, count: int, utilities: int = 1) -> list[Example]:
    """The first `count` lists of a file or folder that are as long as its first and can be learned whole, best first.

    No two completions of a list are tied, or equal once they are cut: such a list has another optimum. Where the file gives no
    `utility_id`, prompts take turns.

    Raises:
        DataError: fewer of them.
    """
    found = tokenize(load((source,)).records, tokenizer, max_length=4 * _LONGEST, max_completion_length=_LONGEST).examples
    length = len(found[0].completion_ids)
    lists = [
        example
        for example in found
        if example.labels.ranks == tuple(range(length)) and len(set(example.completion_ids)) == length
    ]
    if len(lists) < count:
        raise DataError(f"{source}: {count} lists of {length} without ties are needed, {len(lists)} were found.")
    return [_with_utility(example, index % utilities) for index, example in enumerate(lists[:count])]


def _with_utility(example: Example, turn: int) -> Example:
    known = example.labels.utility_id
    return replace(example, labels=replace(example.labels, utility_id=turn if known is None else known))


def small_llama(vocabulary: int, seed: int = 0) -> Any:
    """Two layers of 128: enough to know some dozens of lists by heart."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def train_reward_model(
    model: Any, tokenizer: Any, lists: Sequence[Example], utility: str, *, learning_rate: float, epochs: int
) -> Trained:
    """A causal LM with a reward head, by the project's own stream and trainer, until it knows the lists by heart."""
    policy = CausalLMPolicy(model, tokenizer, heads=("reward",))
    stream = OfflineStream(lists, kind="groups", budget=Budget(batch_size=8, epochs=epochs), dtype=policy.dtype)
    loss = losses.get("rank_utility").bind(utility=utility, offset=OFFSET)
    fit(policy, loss, stream, Optimization(learning_rate=learning_rate))
    scores = RewardModelScorer(policy, max_length=4 * _LONGEST).score(lists)
    ids = np.array([example.labels.utility_id or 0 for example in lists])
    return Trained(torch.sigmoid(scores).double().numpy(), ids)
