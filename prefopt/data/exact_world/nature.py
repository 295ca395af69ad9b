"""What a world's seed decides: its prompts, the random source that made its text, and its hidden reward.

Shapes: G prompts, C completions, N prefixes, T token limit, S symbols, V = S + 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prefopt.data.exact_world.layout import Layout

# One stream of random numbers per purpose: changing how one is used leaves the others as they were.
PROMPTS, SOURCE, REWARD, SAMPLES, PAIR_PROMPTS, PAIRS, LABELS = range(7)


def generator(seed: int, purpose: int, *more: int) -> np.random.Generator:
    """A generator whose numbers depend on these numbers alone."""
    # A spawn key, since a list of entropy is padded with zeros: (1, 2) and (1, 2, 0) would be one stream.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *more)))


def draw_prompts(seed: int, count: int, symbols: int, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """`count` prompts as symbol ids, their lengths taken from `lengths` in turn.

    No prompt begins another. Otherwise prompt "ab" with completion "c…" and prompt "abc" would be one context to a language
    model and two to the hidden reward, and the optimal policy could not be represented.
    """
    rng = generator(seed, PROMPTS)
    chosen: list[tuple[int, ...]] = []
    # Short prompts first: a prefix code of the wanted lengths can then be completed whatever was drawn (Kraft).
    for length in sorted(lengths[i % len(lengths)] for i in range(count)):
        while True:
            prompt = tuple(int(symbol) for symbol in rng.integers(symbols, size=length))
            if not any(prompt[: len(other)] == other for other in chosen):
                break
        chosen.append(prompt)
    return tuple(chosen[i] for i in rng.permutation(count))


def draw_source(seed: int, prompts: tuple[tuple[int, ...], ...], layout: Layout) -> Tensor:
    """Next-symbol log-probs of the random source [G, N, V] float64.

    Logits are a taste of each prompt, a preference for what follows the last two symbols (the prompt's included), and an EOS
    that becomes likelier with length: smooth enough for a small language model to learn from samples.
    """
    rng = generator(seed, SOURCE)
    size = layout.symbols
    taste = rng.normal(0.0, 0.7, (len(prompts), size))
    after_last = rng.normal(0.0, 0.8, (size, size))
    after_second_last = rng.normal(0.0, 0.5, (size, size))
    eos_after_last = rng.normal(0.0, 0.4, size)
    logits = np.empty((len(prompts), layout.prefixes, size + 1))
    for g, prompt in enumerate(prompts):
        for index in range(layout.prefixes):
            body = layout.ids[index, : layout.symbol_counts[index]].tolist()
            context = [*prompt, *body]
            logits[g, index, :size] = taste[g] + after_last[context[-1]]
            if len(context) > 1:
                logits[g, index, :size] += after_second_last[context[-2]]
            logits[g, index, size] = -0.3 + 0.6 * len(body) + eos_after_last[context[-1]]
    return torch.from_numpy(logits).log_softmax(-1)


def draw_rewards(seed: int, prompts: int, layout: Layout, source_logps: Tensor) -> Tensor:
    """The hidden reward [G, C] float64, with mean 0 for every prompt and standard deviation 1 overall under the source.

    Token-level: each prompt values each symbol, earlier positions more. Sequence-level: transitions that all prompts like
    or dislike, a bonus where the prompt's two favourites occur in its order at any distance, and one for repeating no
    symbol; both centred at each length. Length: a mild parabola around the prompt's own best length.
    """
    rng = generator(seed, REWARD)
    size, limit = layout.symbols, layout.limit
    value = torch.from_numpy(rng.normal(0.0, 0.6, (prompts, size)) + rng.normal(0.0, 0.4, size))
    transition = torch.from_numpy(rng.normal(0.0, 0.5, (size, size)))
    favourites = [rng.permutation(size)[:2].tolist() for _ in range(prompts)]
    best_length = torch.from_numpy(rng.uniform(min(2.0, limit), limit, prompts))

    ids, counts = layout.ids, layout.symbol_counts
    # A last column of zeros is the value of EOS: terminated completions need no special case.
    value = torch.cat([value, value.new_zeros(prompts, 1)], dim=1)
    transition = torch.nn.functional.pad(transition, (0, 1, 0, 1))
    discount = 0.85 ** torch.arange(limit, dtype=torch.float64)
    rewards = (value[:, ids] * discount).sum(-1)
    rewards += transition[ids[:, :-1], ids[:, 1:]].sum(-1)
    one_hot = torch.nn.functional.one_hot(ids, size + 1)[..., :size]
    rewards += 0.4 * (one_hot.sum(1).amax(-1) <= 1)
    for g, (first, second) in enumerate(favourites):
        seen_first = (ids == first).cumsum(-1) > 0
        rewards[g] += 1.2 * ((ids == second) & seen_first).any(-1)

    probability = source_logps.exp()
    for length in range(limit + 1):
        # Sums grow with length; centred at each length, the next line alone ties the reward to length.
        here = counts == length
        rewards[:, here] -= (probability * rewards)[:, here].sum(-1, keepdim=True) / probability[:, here].sum(-1, keepdim=True)
    rewards -= 0.07 * (counts - best_length[:, None]) ** 2
    rewards -= (probability * rewards).sum(-1, keepdim=True)
    return rewards / (probability * rewards.square()).sum(-1).mean().sqrt()
