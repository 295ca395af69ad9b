"""Attention as credit: the weights are those of eager attention, tokenizers are aligned by characters, sums are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, get_args

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor

from prefopt.data.records import Example, Text
from prefopt.errors import ConfigError
from prefopt.models import attention_weights
from prefopt.models.attention_weights import SCORE_ATTENTION, STEP_ATTENTION
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.small import train_tokenizer
from prefopt.models.tabular import build_tabular
from prefopt.packing import PackedBatch, flat_roles, pack
from prefopt.rewards import EnsembleScorer, RewardModelScorer, Scorer
from prefopt.rewards.credit import Aligner, AttentionCredit, AttentiveScorer, GeneratorCredit
from prefopt.rollouts.shaping import Credit
from prefopt.streams import Budget
from tests.prefopt.test_forward import CONFIGS, random_examples
from tests.prefopt.test_forward import build_model as build_random
from tests.prefopt.test_rollouts import EOS, WORLD, build_model, build_pair, count_a, prompts, raw_batch, texts_of

ARCHITECTURES = {
    **CONFIGS,
    "qwen3": transformers.Qwen3Config(
        vocab_size=CONFIGS["llama"].vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12,
    ),
}  # fmt: skip


def eager_attention(model: Any, example: Example) -> list[Tensor]:
    """For each completion [P + L, P + L], the last layer's mean over heads, from one right-padded batch of whole sequences."""
    model.set_attn_implementation("eager")
    whole = [(*example.prompt_ids, *completion) for completion in example.completion_ids]
    width = max(map(len, whole))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in whole])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole])
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[-1].mean(1)
    return [weights[: len(row), : len(row)] for weights, row in zip(found, whole, strict=True)]


def read_score(own: Tensor) -> Tensor:
    """[L] the last row of a completion's own part [L, L]."""
    return own[-1]


def read_steps(own: Tensor) -> Tensor:
    """[L] each column's mean over the steps that see it; the last token has no step. Outside of a window a weight is 0."""
    steps = own[:-1]
    return steps.sum(0) / (steps > 0).sum(0).clamp(min=1)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_equal_eager_attention(name: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared heads, normed queries, learned positions and a sliding window of 16, one to three branches of a prompt, in one go
    and in small chunks and blocks."""
    if small:
        monkeypatch.setattr(attention_weights, "_KEYS", 150)
        monkeypatch.setattr(attention_weights, "_ROWS", 7)
    monkeypatch.setitem(CONFIGS, name, ARCHITECTURES[name])
    model = build_random(name)
    examples = [*random_examples(3, 3), *random_examples(3, 1, seed=1)]
    policy = CausalLMPolicy(copy.deepcopy(model), None)
    batch = pack(examples, roles=flat_roles)
    with torch.no_grad():
        found = policy.rows(batch, ["token_logps", SCORE_ATTENTION, STEP_ATTENTION])
        assert torch.equal(found["token_logps"], policy.rows(batch, ["token_logps"])["token_logps"])
    row = 0
    for example in examples:
        for weights in eager_attention(model, example):
            own = weights[len(example.prompt_ids) :, len(example.prompt_ids) :]
            for key, read in ((SCORE_ATTENTION, read_score), (STEP_ATTENTION, read_steps)):
                torch.testing.assert_close(found[key][row, : len(own)], read(own), atol=1e-5, rtol=0)
                assert (found[key][row, len(own) :] == 0).all()
            row += 1
    assert row == len(batch.mask)
    assert found[SCORE_ATTENTION].sum(-1).min() < 0.9, "part of it goes to the prompt"


def test_no_more_than_a_block_of_scores_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of scores holds rows of one chunk over that chunk's keys, not [S, S]."""
    sizes: list[int] = []
    einsum = torch.einsum

    def watched(*arguments: Any) -> Tensor:
        result: Tensor = einsum(*arguments)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "einsum", watched)
    monkeypatch.setattr(attention_weights, "_KEYS", 64)
    monkeypatch.setattr(attention_weights, "_ROWS", 8)
    policy = CausalLMPolicy(build_random("llama"), None)
    batch = pack(random_examples(20, 2), roles=flat_roles)
    longest = max(batch.position_ids) + 1
    with torch.no_grad():
        policy.rows(batch, [STEP_ATTENTION])
    assert max(sizes) <= 4 * 8 * 2 * max(64, int(longest))
    assert max(sizes) * 20 < 4 * batch.tokens**2


def pieces(*words: str, end: str = "<end>") -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these words, longest first, and single letters."""
    vocabulary = {end: 0, **{word: i for i, word in enumerate([*words, *"abcdefx "], start=1)}}
    core = Tokenizer(WordLevel(vocabulary))
    core.pre_tokenizer = Split(Regex("|".join([*words, "."])), "isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)


PAIRS, TRIPLES = pieces("ab", "cd", "ef", "xa", "bc", "de"), pieces("abc", "def")


def moved(weights: Sequence[float], source: Sequence[str], target: Sequence[str], tokenizers: tuple[Any, Any]) -> list[float]:
    ids = [tuple(t.convert_tokens_to_ids(list(words))) for t, words in zip(tokenizers, (source, target), strict=True)]
    found: list[float] = Aligner(*tokenizers).moved(torch.tensor(weights), *ids).tolist()
    return found


@pytest.mark.parametrize(
    ("source", "target", "wanted"),
    [
        # `cd` lies half in each; the two EOS stand for each other.
        (["ab", "cd", "ef", "<end>"], ["abc", "def", "<end>"], [0.1 + 0.1, 0.1 + 0.3, 0.4]),
        # Cut at the limit: the reward model's EOS goes to the last token.
        (["ab", "cd", "ef", "<end>"], ["abc", "def"], [0.2, 0.8]),
        # One letter after another gets the half of a pair, or all of `e`.
        (["ab", "cd", "e", "<end>"], ["a", "b", "c", "d", "e", "<end>"], [0.05, 0.05, 0.1, 0.1, 0.3, 0.4]),
        # The reward model cut the completion behind `b`: nothing is said of the rest.
        (["a", "b"], ["abc", "def", "<end>"], [0.3, 0.0, 0.0]),
        # Its first token begins in the prompt: its weight is that of `a` alone.
        (["xa", "bc", "de", "f"], ["abc", "def"], [0.1 + 0.2, 0.3 + 0.4]),
        # It strips the blank that the policy wrote.
        (["ab", "cd"], [" ", "abc", "d"], [0.0, 0.1 + 0.1, 0.1]),
        (["<end>"], ["<end>"], [0.1]),
        (["<end>"], ["abc"], [0.1]),
    ],
)  # fmt: skip
def test_weights_move_by_characters(source: list[str], target: list[str], wanted: list[float]) -> None:
    """Weights 0.1, 0.2, 0.3, 0.4 of the reward model's tokens, worked out by hand."""
    weights = [0.1, 0.2, 0.3, 0.4][: len(source)]
    assert moved(weights, source, target, (PAIRS, TRIPLES)) == pytest.approx(wanted)


def test_equal_tokens_keep_their_weights() -> None:
    """One tokenizer, or two that are equal; a policy that was cut at the limit gets the EOS that the reward model added."""
    weights = [0.1, 0.2, 0.3, 0.4]
    for other in (PAIRS, copy.deepcopy(PAIRS)):
        same = moved(weights, ["a", "b", "cd", "<end>"], ["a", "b", "cd", "<end>"], (PAIRS, other))
        assert same == pytest.approx(weights)
        assert moved(weights, ["a", "b", "cd", "<end>"], ["a", "b", "cd"], (PAIRS, other)) == pytest.approx([0.1, 0.2, 0.7])
        # The policy drew the same text in other tokens than its tokenizer makes of it.
        redrawn = moved(weights, ["ab", "cd", "e", "<end>"], ["a", "bc", "de", "<end>"], (PAIRS, other))
        assert redrawn == pytest.approx([0.05, 0.05 + 0.1, 0.1 + 0.3, 0.4])


def test_parts_of_a_character_stand_at_that_character() -> None:
    """Bytes of é (2) and 😀 (4) say nothing alone: their weights go to the token that holds the character."""
    by_byte, by_word = train_tokenizer([], 257), train_tokenizer(["aé😀b é"] * 8, 300)
    text = "é😀b"
    source, target = ((*t(text)["input_ids"], 0) for t in (by_byte, by_word))
    assert len(source) == 8
    assert [by_word.decode([token]) for token in target[:-1]] in (["é😀b"], ["é", "😀b"], ["é", "😀", "b"], ["é😀", "b"])
    weights = torch.arange(1.0, 9.0)
    found = Aligner(by_byte, by_word).moved(weights, source, target)
    assert found[-1] == 8
    assert found.sum() == pytest.approx(36)
    back = Aligner(by_word, by_byte).moved(found, target, source)
    assert back[-1] == 8
    letters = Aligner(by_byte, PAIRS).moved(weights, source, PAIRS.convert_tokens_to_ids(["a", "b", "c", "<end>"]))
    assert letters.tolist() == pytest.approx([3, 18, 7, 8]), "three letters in place of three characters: in proportion"


def reward_model(seed: int, tokenizer: Any = WORLD.tokenizer, **options: Any) -> RewardModelScorer:
    return RewardModelScorer(reward_policy(seed, tokenizer), max_length=32, **options)


def reward_policy(seed: int, tokenizer: Any = WORLD.tokenizer) -> CausalLMPolicy:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    policy = CausalLMPolicy(transformers.AutoModelForCausalLM.from_config(config).double(), tokenizer, heads=("reward",))
    for parameter in policy.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return policy


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLMPolicy, FrozenReference]:
    return build_pair()


REWARDS: dict[str, Callable[[], Scorer]] = {
    "same tokenizer": lambda: reward_model(5, offset=0.3, micro_batch_tokens=40),
    "other tokenizer": lambda: reward_model(6, pieces("ab", "cd")),
    "ensemble": lambda: EnsembleScorer([reward_model(5), reward_model(6, pieces("ba"))], "min"),
}


@pytest.mark.parametrize(
    ("name", "credit"),
    [*(("same tokenizer", credit) for credit in get_args(Credit)), *((name, "attention") for name in list(REWARDS)[1:])],
)
def test_rewards_sum_to_the_score_for_every_beta(name: str, credit: str, pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    scorer = REWARDS[name]()
    for beta in (0.0, 0.3, 0.8, 1.0) if credit != "sparse" else (1.0,):
        changes = {"scorer": scorer, "examples": prompts(6), "budget": Budget(batch_size=12)}
        batch = raw_batch(*pair, changes, rollout_size=12, samples_per_prompt=2, kl_coef=0.0, credit=credit, credit_beta=beta)
        wanted = scorer(*spoken(batch))
        rewards = batch.rows["rewards"]
        torch.testing.assert_close(rewards.sum(-1), wanted.to(rewards.dtype), atol=1e-6, rtol=0)
        spread = rewards.abs().gt(1e-9).sum(-1) > 1
        assert bool(spread.any()) == (credit != "sparse" and beta > 0)


def spoken(batch: PackedBatch) -> tuple[list[Text], list[str]]:
    """Prompts and completions as the scorer reads them."""
    found = texts_of(batch)
    texts: list[Text] = [WORLD.layout.text(prompt) for prompt, _ in found]
    return texts, [WORLD.tokenizer.decode(completion, skip_special_tokens=True) for _, completion in found]


def test_the_stream_spreads_the_score_as_the_reward_model_attends(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    """Against eager attention over what the reward model reads: prompt, completion and EOS, also where the policy drew none."""
    scorer = reward_model(5, offset=0.3, micro_batch_tokens=40)
    batch = raw_batch(*pair, {"scorer": scorer}, kl_coef=0.0, credit="attention", credit_beta=0.8)
    scores, judge = scorer(*spoken(batch)), reward_policy(5).base
    ended = set()
    for row, (prompt, completion) in enumerate(texts_of(batch)):
        read = completion if completion[-1] == EOS else [*completion, EOS]
        (weights,) = eager_attention(judge, Example("x", tuple(prompt), (tuple(read),)))
        shares = weights[-1, len(prompt) :] / weights[-1, len(prompt) :].sum()
        wanted = shares[: len(completion)].clone()
        wanted[-1] += shares[len(completion) :].sum()
        wanted = 0.8 * wanted * scores[row]
        wanted[-1] += 0.2 * scores[row]
        torch.testing.assert_close(batch.rows["rewards"][row, : len(completion)], wanted, atol=1e-6, rtol=0)
        ended.add(completion[-1] == EOS)
    assert ended == {True, False}


def test_scores_and_attention_come_of_one_pass() -> None:
    scorer = reward_model(5, offset=0.3)
    asked, completions = ["ab", "ba", "a"], ["cab", "", "aaaa"]
    plain = scorer(asked, completions)
    before = scorer.tokens
    credit = AttentionCredit(scorer, WORLD.tokenizer)
    assert torch.equal(credit.scorer(asked, completions), plain)
    assert scorer.tokens == 2 * before
    assert isinstance(credit.scorer, AttentiveScorer)
    assert [len(ids) for ids, _ in credit.scorer.last] == [4, 1, 5]


def test_an_ensemble_looks_where_its_members_look_on_average() -> None:
    asked, completions = ["ab", "ba"], ["cab", "abcda"]
    ids = [(*WORLD.tokenizer(text)["input_ids"], EOS) for text in completions]
    members = [reward_model(5), reward_model(6)]
    found = []
    for scorer in (*members, EnsembleScorer(members, "min")):
        credit = AttentionCredit(scorer, WORLD.tokenizer)
        scores = credit.scorer(asked, completions)
        found.append(credit.weights(ids, 6))
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)
    torch.testing.assert_close(found[2].sum(-1), torch.ones(2))
    assert torch.equal(scores, torch.stack([member(asked, completions) for member in members]).amin(0))
    assert isinstance(credit.scorer, EnsembleScorer)
    assert credit.scorer.last_std is not None


def test_the_generators_weights_never_look_at_later_tokens() -> None:
    """A step reads what was drawn before it: the last token is looked at by none and changes no weight, and of a completion
    of two tokens the first has all."""
    policy = CausalLMPolicy(build_model(0), WORLD.tokenizer)
    generator = GeneratorCredit(policy, 20)

    def weights(*completions: Sequence[int]) -> Tensor:
        examples = [Example(f"x{i}", (1, 2), (tuple(ids),)) for i, ids in enumerate(completions)]
        return generator.weights(examples, max(map(len, completions)))

    one, other = weights((0, 1, 2, 3, EOS), (0, 1, 2, 3, 4))
    torch.testing.assert_close(one, other)
    assert one[-1] == 0
    assert (one[:-1] > 0).all()
    assert not torch.allclose(one, weights((0, 1, 2, 4, EOS))[0]), "a token changes the steps after it"
    # The attention of a step is its own: the sum over steps grows by one row when a token is drawn.
    steps = torch.arange(4, -1, -1.0).clamp(min=0)  # steps that see each token of five
    total, before = one * steps, weights((0, 1, 2, 3))[0] * (steps[:4] - 1)
    last_row = total[:4] - before
    (eager,) = eager_attention(build_model(0), Example("x", (1, 2), ((0, 1, 2, 3),)))
    torch.testing.assert_close(last_row, eager[-1, 2:].float(), atol=1e-6, rtol=0)
    assert (weights((3, EOS))[0] > 0).tolist() == [True, False]
    assert weights((EOS,)).tolist() == [[0.0]]


def test_a_reward_without_attention_is_refused(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    for scorer in (count_a, EnsembleScorer([reward_model(5), count_a])):
        with pytest.raises(ConfigError, match=r"credit 'attention' reads a reward model's .*--reward"):
            raw_batch(*pair, {"scorer": scorer}, credit="attention")
    table, _ = build_tabular(WORLD, WORLD.source_next_logps, heads=("value",))
    with pytest.raises(ConfigError, match="a TabularPolicy has none"):
        raw_batch(table, pair[1], credit="generator")
    with pytest.raises(ConfigError, match="sparse, uniform, attention, generator"):
        raw_batch(*pair, credit="loudness")
