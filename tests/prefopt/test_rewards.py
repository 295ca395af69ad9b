"""Rewards: users' functions and what goes wrong with them, ensembles, reward models on disk, and what is said of them."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example, Labels, Message, Text
from prefopt.errors import ConfigError, PrefoptError, TrainingError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.lora import LoRA
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, RewardOptions, SupervisedOptions
from prefopt.recovery import Recovery
from prefopt.rewards import EnsembleScorer, RewardError, RewardModelScorer, check_scores, score
from prefopt.rewards.build import Reward, build_reward, member_seed
from prefopt.rewards.figures import reliability_png
from prefopt.rewards.functions import FunctionScorer, import_function
from prefopt.rewards.layout import load_reward_model, save_reward_model
from prefopt.rewards.quality import Share, ordered_pairs, quality, quality_table
from prefopt.stages import Stage
from prefopt.tasks import exact
from prefopt.tasks.exact import ExactTask
from prefopt.tasks.text import TextTask

WORLD = ExactWorld(WorldConfig.tabular())
EOS = WORLD.layout.eos
PROMPTS, TEXTS, IDS = ("p", "q", "r"), ("a", "bb", "ccc"), ("x:1", "x:2", "x:3")


def length(prompts: list[Any], completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


RETURNS: dict[str, Callable[..., Any]] = {
    "list": length,
    "ints": lambda p, c: [len(text) for text in c],
    "tuple": lambda p, c: tuple(map(len, c)),
    "tensor": lambda p, c: torch.tensor([len(text) for text in c]),
    "gradient": lambda p, c: torch.tensor(length(p, c), requires_grad=True),
    "array": lambda p, c: np.array(length(p, c)),
    "scalars": lambda p, c: [np.float32(len(text)) for text in c],
    "tensors": lambda p, c: [torch.tensor(len(text)) for text in c],
}


@pytest.mark.parametrize("kind", RETURNS)
def test_a_function_may_return_numbers_in_any_form(kind: str) -> None:
    scores = score(FunctionScorer(RETURNS[kind]), PROMPTS, TEXTS, IDS)
    assert scores.tolist() == [1, 2, 3]
    assert (scores.dtype, scores.requires_grad) == (torch.float32, False)


def test_a_function_gets_lists_of_its_own() -> None:
    """Prompts are text or lists of messages; a function that changes them changes nothing."""
    seen = []

    def greedy(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append((list(prompts), list(completions)))
        prompts[0][0]["content"] = ""
        completions.clear()
        return [1.0]

    conversation: Text = (Message(role="user", content="hi"),)
    texts = ["hello"]
    assert FunctionScorer(greedy)([conversation], texts).tolist() == [1]
    assert texts == ["hello"]
    assert conversation[0]["content"] == "hi"
    assert seen[0][1] == ["hello"]


def raising(prompts: list[Any], completions: list[str]) -> list[float]:
    if "bb" in completions:
        raise KeyError("no rule for bb")
    return length(prompts, completions)


FAILURES: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raising, r"prompt x:2 \(index 1 of its batch\).*raised KeyError: 'no rule for bb'.*'bb'.*return a number"),
    "nan": (lambda p, c: [1.0, math.nan, math.nan], r"prompt x:2 \(index 1 .*returned nan \(and 1 more are not finite\)"),
    "inf": (lambda p, c: torch.tensor([1.0, 1.0, -math.inf]), r"prompt x:3 \(index 2 .*returned -inf; scores must be finite"),
    "none inside": (lambda p, c: [1.0, None, 2.0], r"prompt x:2 \(index 1 .*returned None \(NoneType\)"),
    "text inside": (lambda p, c: ["3", 1.0, 2.0], r"prompt x:1 \(index 0 .*returned '3' \(str\)"),
    "a list inside": (lambda p, c: [1.0, 1.0, [2.0]], r"prompt x:3 \(index 2 .*returned \[2.0\] \(list\)"),
    "nothing": (lambda p, c: None, "returned None: return one number for each completion"),
    "short": (lambda p, c: [1.0, 2.0], "returned 2 values for 3 completions: return one number for each"),
    "long": (lambda p, c: [1.0] * 4, "returned 4 values for 3 completions"),
    "one number": (lambda p, c: 2.5, r"returned 2.5 \(float\) for 3 completions"),
    "text": (lambda p, c: "abc", r"returned 'abc' \(str\) for 3 completions"),
    "a matrix": (lambda p, c: torch.ones(3, 1), r"returned an array of shape \[3, 1\] for 3 completions"),
    "a dictionary": (lambda p, c: {"score": 1}, r"returned \{'score': 1\} \(dict\) for 3 completions"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.fault(30)
def test_a_function_that_fails_stops_with_the_prompt_and_what_to_do(kind: str) -> None:
    function, message = FAILURES[kind]
    with pytest.raises(TrainingError, match=message) as caught:
        score(FunctionScorer(function, "mine"), PROMPTS, TEXTS, IDS)
    assert "mine" in str(caught.value) or kind in ("nan", "inf")


def test_what_a_function_raised_is_kept() -> None:
    with pytest.raises(RewardError) as caught:
        score(FunctionScorer(raising), PROMPTS, TEXTS, IDS)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.index == 1


@pytest.mark.fault(30)
def test_a_function_that_fails_on_batches_only() -> None:
    def pairs_only(prompts: list[Any], completions: list[str]) -> list[float]:
        if len(prompts) > 1:
            raise RuntimeError("out of memory")
        return [0.0]

    with pytest.raises(
        TrainingError, match="RuntimeError: out of memory, for 3 completions together but for none of them alone"
    ):
        score(FunctionScorer(pairs_only), PROMPTS, TEXTS, IDS)


@pytest.mark.fault(30)
def test_a_function_that_hangs_names_the_prompt() -> None:
    def hangs(prompts: list[Any], completions: list[str]) -> list[float]:
        if "bb" in completions:
            time.sleep(60)
        return length(prompts, completions)

    begin = time.monotonic()
    with pytest.raises(RewardError, match=r"prompt x:2 \(index 1 .*hangs.* was not done after 0\.2 seconds.*--reward-timeout"):
        score(FunctionScorer(hangs, timeout=0.2), PROMPTS, TEXTS, IDS)
    assert time.monotonic() - begin < 5


@pytest.mark.fault(30)
def test_a_function_that_is_slow_on_batches_only() -> None:
    def slow(prompts: list[Any], completions: list[str]) -> list[float]:
        time.sleep(2.0 if len(prompts) > 1 else 0.0)
        return length(prompts, completions)

    with pytest.raises(TrainingError, match=r"not done with 3 completions together after 0\.5 seconds, but with each alone"):
        score(FunctionScorer(slow, timeout=0.5), PROMPTS, TEXTS, IDS)
    assert score(FunctionScorer(slow, timeout=30), PROMPTS[:1], TEXTS[:1], IDS[:1]).tolist() == length(PROMPTS[:1], TEXTS[:1])


def test_what_a_function_in_time_raises_is_its_own_and_gradients_stay_off() -> None:
    with pytest.raises(RewardError, match="raised KeyError") as caught:
        score(FunctionScorer(raising, timeout=30), PROMPTS, TEXTS, IDS)
    assert isinstance(caught.value.__cause__, KeyError)
    seen: list[bool] = []

    def looks(prompts: list[Any], completions: list[str]) -> list[float]:
        seen.append(torch.is_grad_enabled())
        return length(prompts, completions)

    with torch.no_grad():
        score(FunctionScorer(looks, timeout=30), PROMPTS, TEXTS, IDS)
    score(FunctionScorer(looks, timeout=30), PROMPTS, TEXTS, IDS)
    assert seen == [False, True]


def test_a_timeout_is_of_functions_alone() -> None:
    with pytest.raises(ConfigError, match="reward_timeout is of reward functions of your own"):
        Options(recovery=Recovery(reward_timeout=3.0))


@pytest.mark.fault(30)
def test_any_scorer_is_checked() -> None:
    with pytest.raises(TrainingError, match=r"shape \[2\] for 3 completions, the first of which is of prompt x:1"):
        score(lambda prompts, completions: torch.zeros(2), PROMPTS, TEXTS, IDS)
    with pytest.raises(RewardError, match=r"prompt x:3 \(index 2"):
        check_scores(torch.tensor([0.0, 1.0, math.nan]), IDS)


def test_functions_are_found_by_module_and_by_file(tmp_path: Path) -> None:
    assert import_function("math:sqrt") is math.sqrt
    file = tmp_path / "mine.py"
    file.write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert FunctionScorer(import_function(f"{file}:longer"))(PROMPTS, TEXTS).tolist() == [1, 2, 3]
    assert import_function(f"{file}:longer") is import_function(f"{file}:longer"), "a file is run once"


def test_functions_that_cannot_be_found(tmp_path: Path) -> None:
    broken, needy = tmp_path / "broken.py", tmp_path / "needy.py"
    broken.write_text("1 / 0\n")
    needy.write_text("import nothing_of_this_name\n")
    expected = {
        "no_such_module:f": "there is no module 'no_such_module' among the installed packages. A file of your own",
        "math:no_such": "math has no 'no_such'",
        "math:pi": "math has a float, not a function, named 'pi'",
        f"{tmp_path}/none.py:f": "there is no file",
        f"{broken}:f": "failed: ZeroDivisionError",
        f"{needy}:f": "failed: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ":f": "expected module:function",
        "math:": "expected module:function",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            import_function(name)


def constant(*values: float) -> Callable[..., Tensor]:
    return lambda prompts, completions: torch.tensor(values)


def test_an_ensemble_takes_the_mean_or_the_worst_case_and_says_where_members_disagree() -> None:
    members = [constant(1.0, 0.0), constant(3.0, 0.0), constant(2.0, 0.0)]
    mean, worst = EnsembleScorer(members), EnsembleScorer(members, "min")
    assert mean.last_std is None
    assert mean(["p", "q"], ["a", "b"]).tolist() == [2, 0]
    assert worst(["p", "q"], ["a", "b"]).tolist() == [1, 0]
    assert mean.last_std is not None
    assert mean.last_std.tolist() == pytest.approx([math.sqrt(2 / 3), 0])


def reward(tmp_path: Path, true: Any = None, **options: Any) -> tuple[Reward, list[int]]:
    """What `build_reward` makes of the options, and the members that it trained."""
    trained: list[int] = []

    def train(member: int) -> tuple[Any, Stage]:
        trained.append(member)
        return constant(float(member)), Stage(f"{member}", 100, 1.0, False, {"train_rows": 64})

    return build_reward(Options(reward=RewardOptions(**options)), tmp_path, train=train, true=true), trained


def test_a_trained_reward_costs_its_labels_once_and_its_tokens_by_member(tmp_path: Path) -> None:
    one, trained = reward(tmp_path)
    assert (one.labels, one.tokens, trained, [*one.stages]) == (64, 100, [0], ["PPO's reward model"])
    several, trained = reward(tmp_path, reward_members=3, reward_aggregate="min")
    assert (several.labels, several.tokens, trained) == (64, 300, [0, 1, 2])
    assert [*several.stages] == [f"PPO's reward model {number}" for number in (1, 2, 3)]
    assert several.name == "the min of 3 bradley_terry models trained on the policy rows"
    assert several.scorer(["p"], ["a"]).tolist() == [0]


def test_other_rewards_cost_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def longer(prompts, completions):\n    return [len(c) for c in completions]\n")
    own, trained = reward(tmp_path, reward=f"{file}:longer")
    assert (own.labels, own.tokens, trained, dict(own.stages)) == (0, 0, [], {})
    assert own.scorer(PROMPTS, TEXTS).tolist() == [1, 2, 3]
    assert own.name == f"the function {file}:longer"
    true, trained = reward(tmp_path, constant(5.0), reward="true")
    assert (true.scorer(["p"], ["a"]).tolist(), true.labels, trained) == ([5], 0, [])


def test_rewards_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reward 'true': these rows have no reward of their own"):
        reward(tmp_path, reward="true")
    with pytest.raises(ConfigError, match="'no-such-folder' is no local file or folder"):
        reward(tmp_path, reward="no-such-folder")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_members": 0}, "at least 1"),
        ({"reward_aggregate": "max"}, "'mean' or 'min'"),
        (
            {"reward": "true", "reward_members": 2},
            "reward_members is of a reward model that is trained here, but reward is 'true'",
        ),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardOptions(**options)


def test_members_have_seeds_apart() -> None:
    seeds = [member_seed(seed, member) for seed in range(50) for member in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert member_seed(3, 0) == 3


# Layout.


def reward_policy(lora: LoRA | None = None) -> CausalLMPolicy:
    torch.manual_seed(0)
    config = WORLD.model_config()
    config.max_position_embeddings = 32
    policy = CausalLMPolicy(
        transformers.AutoModelForCausalLM.from_config(config), WORLD.tokenizer, lora=lora, heads=("reward",)
    )
    with torch.no_grad():
        for parameter in (*policy.heads.parameters(), *(p for n, p in policy.named_parameters() if "lora_" in n)):
            parameter.normal_(std=0.3)
    return policy


def rows(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        sizes = torch.randint(1, 5, (3,), generator=generator).tolist()
        prompt, *sides = (tuple(torch.randint(0, 3, (size,), generator=generator).tolist()) for size in sizes)
        made.append(Example(f"{i}", prompt, (*[(*side, EOS) for side in sides[:1]], sides[1]), Labels(ranks=(0, 1))))
    return made


@torch.no_grad()
def transformers_scores(folder: Path, examples: Sequence[Example]) -> Tensor:
    """[N, K] of transformers' own classifier on one right-padded batch."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    sequences = [[*row.prompt_ids, *ids] for row in examples for ids in row.completion_ids]
    width, pad = max(map(len, sequences)), model.config.pad_token_id
    ids = torch.tensor([[*s, *[pad] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return model.eval()(input_ids=ids, attention_mask=mask).logits.view(len(examples), -1)


@pytest.mark.parametrize("lora", [None, LoRA(r=4, alpha=8)])
def test_transformers_scores_a_saved_reward_model_as_we_do(lora: LoRA | None, tmp_path: Path) -> None:
    """Adapters are merged; the offset is in the config; scores end at the EOS, which is no padding."""
    policy = reward_policy(lora)
    scorer = RewardModelScorer(policy, max_length=9, max_completion_length=3, offset=0.75)
    ours = scorer.score(rows())
    assert ours.std() > 0.1
    save_reward_model(scorer, tmp_path)
    assert torch.equal(scorer.score(rows()), ours), "saving leaves the policy as it is"
    torch.testing.assert_close(transformers_scores(tmp_path, rows()) - 0.75, ours, atol=1e-5, rtol=0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.num_labels, config.id2label) == (1, {0: "reward"})
    assert config.pad_token_id != EOS
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token_id == config.pad_token_id
    again = load_reward_model(str(tmp_path), cache=tmp_path / "cache", device="cpu")
    torch.testing.assert_close(again.score(rows()), ours, atol=1e-5, rtol=0)
    texts = ["ca", "cb", "cb"], ["ab", "b", "abc"]
    torch.testing.assert_close(again(*texts), scorer(*texts), atol=1e-5, rtol=0)
    assert again.limits == scorer.limits, "whether an unfinished completion ends by EOS is as in training"


FOREIGN: dict[str, Callable[[int], Any]] = {
    "llama": lambda size: transformers.LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    ),
    "qwen2": lambda size: transformers.Qwen2Config(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    ),
    "gpt2": lambda size: transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64),
}


def foreign(kind: str, folder: Path, *, pad: int | None = None, labels: int = 1) -> None:
    torch.manual_seed(1)
    config = FOREIGN[kind](len(WORLD.tokenizer) + 4)  # room for tokens that a family's own tokenizer adds
    config.num_labels, config.pad_token_id, config.eos_token_id = labels, pad, EOS
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    WORLD.tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_reward_model_scores_as_in_transformers(kind: str, tmp_path: Path) -> None:
    """Those that pad with their EOS too: what transformers scores there is the token before it."""
    for pad in (len(WORLD.tokenizer) + 3, EOS):
        folder = tmp_path / str(pad)
        foreign(kind, folder, pad=pad)
        scorer = load_reward_model(str(folder), cache=tmp_path / "cache", device="cpu")
        ours = scorer.score(rows())
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, transformers_scores(folder, rows()), atol=1e-5, rtol=0)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    def load(folder: Path) -> None:
        load_reward_model(str(folder), cache=tmp_path / "cache", device="cpu")

    foreign("llama", tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match="one label, got LlamaForSequenceClassification with 2 labels"):
        load(tmp_path / "two")
    reward_policy().save(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"lacks 1 weights of LlamaForSequenceClassification, such as score\.weight"):
        load(tmp_path / "lm")
    headless = CausalLMPolicy(reward_policy().base, WORLD.tokenizer)
    with pytest.raises(ConfigError, match="no reward head"):
        save_reward_model(RewardModelScorer(headless, max_length=9), tmp_path / "none")


def test_attention_that_the_shared_forward_does_not_reproduce_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an architecture that scales or caps what the packed attention does not."""
    foreign("llama", tmp_path)
    original = CausalLMPolicy.rows

    def wrong(self: CausalLMPolicy, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: value + 0.01 for name, value in original(self, *args, **kwargs).items()}

    monkeypatch.setattr(CausalLMPolicy, "rows", wrong)
    with pytest.raises(ConfigError, match=r"transformers scores a probe .*path/to/file\.py:function"):
        load_reward_model(str(tmp_path), cache=tmp_path / "cache", device="cpu")


def test_a_tokenizer_without_another_token_gets_one_to_pad_with(tmp_path: Path) -> None:
    policy = reward_policy()
    lone = transformers.PreTrainedTokenizerFast(
        tokenizer_object=WORLD.tokenizer.backend_tokenizer, eos_token=WORLD.tokenizer.eos_token
    )
    policy.tokenizer = lone
    embedding = policy.base.get_input_embeddings().weight.clone()
    save_reward_model(RewardModelScorer(policy, max_length=9), tmp_path)
    assert lone.pad_token_id is None
    assert torch.equal(policy.base.get_input_embeddings().weight, embedding)
    ours = RewardModelScorer(policy, max_length=32).score(rows())
    torch.testing.assert_close(transformers_scores(tmp_path, rows()), ours, atol=1e-5, rtol=0)


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact task with 4 prompts of 40 completions."""
    monkeypatch.setattr(exact, "WorldConfig", lambda seed: WorldConfig.tabular(seed))


@pytest.mark.usefixtures("small_world")
def test_a_trained_reward_model_is_a_reward(cli: Any, tmp_path: Path) -> None:
    """`train bradley_terry` says what its model is worth and saves what `--reward` reads; so do a function and `true`."""
    small = ("--pairs", 64, "--batch-size", 16, "--max-steps", 1, "--checkpoints", 1)
    done = cli("train", "bradley_terry", "--output-dir", tmp_path / "rm", *small)
    assert done.code == 0, done.err
    assert "bradley_terry as a reward model" in done.out
    report = json.loads((tmp_path / "rm" / "reward_report.json").read_text())
    assert report["pairs"] == 512
    assert f"{report['ece']:.3f}" in done.out
    assert (tmp_path / "rm" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    function = tmp_path / "mine.py"
    function.write_text("def length(prompts, completions):\n    return [len(text) for text in completions]\n")
    costs = {}
    for reward in (tmp_path / "rm" / "policy", f"{function}:length", "true", "model"):
        folder = tmp_path / f"ppo-{len(costs)}"
        done = cli("train", "ppo", "--rollout-size", 16, "--reward", reward, "--output-dir", folder, *small)
        assert done.code == 0, done.err
        ledger = json.loads((folder / "result.json").read_text())["cell"]["ledger"]
        costs[str(reward)] = (ledger["labels"], ledger["reward_model_tokens"] > 0)
    assert [*costs.values()] == [(0, False), (0, False), (0, False), (64, True)]


@pytest.mark.usefixtures("small_world")
@pytest.mark.fault(30)
def test_a_reward_that_fails_stops_the_run(cli: Any, tmp_path: Path) -> None:
    function = tmp_path / "mine.py"
    function.write_text("def bad(prompts, completions):\n    return [float('nan') for _ in completions]\n")
    given = ("--pairs", 64, "--batch-size", 16, "--max-steps", 1, "--rollout-size", 16)
    done = cli("train", "ppo", "--reward", f"{function}:bad", "--output-dir", tmp_path / "ppo", *given)
    assert done.code == 1
    assert "the reward failed at prompt" in done.err
    assert "scores must be finite" in done.err


@pytest.mark.usefixtures("small_world")
def test_the_true_reward_of_the_exact_world_is_the_hidden_one(shared_cache: Path) -> None:
    task = ExactTask(Options(reward=RewardOptions(reward="true")), shared_cache)
    world = task.world
    texts = [world.tokenizer.decode(ids) for ids in ((0, 1), (2,), (0,) * task.max_new_tokens)]
    scores = task.scorer(0).scorer(world.prompts[:3], texts)
    expected = [world.reward_text(prompt, text) for prompt, text in zip(world.prompts[:3], texts, strict=True)]
    assert scores.tolist() == pytest.approx(expected)
    assert task.scorer(0).labels == 0


def test_a_task_of_ranked_lists_has_rewards_judges_and_pairs(
    tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any], tmp_path: Path
) -> None:
    """Policy rows train PPO's reward model, judge rows the judge; an accuracy counts every pair of a test list."""
    lists = [{"prompt": row["prompt"], "completions": ["c a", "c d", "d d b"], "ranks": [0, 1, 2]} for row in pairs]
    options = Options(
        data=DataOptions(data=(str(jsonl(lists)),), max_length=16),
        model=ModelOptions(model=str(tiny_model), device="cpu"),
        supervised=SupervisedOptions(reward_epochs=8, reward_learning_rate=1e-2),
        reward=RewardOptions(reward_loss="plackett_luce", reward_members=2, reward_aggregate="min"),
        evaluation=EvaluationOptions(eval_pairs=8, eval_prompts=2, eval_tokens=4),
    )
    task = TextTask(options, tmp_path / "cache")
    shared = task.shared(on_policy=True)
    judge, *members, tfidf = shared.judges
    assert [record.name for record in (judge, *members)] == ["judge", "PPO's reward model 1", "PPO's reward model 2"]
    assert (tfidf.name, tfidf.accuracy) == ("tfidf", 1.0)
    assert (judge.n, judge.accuracy) == (24, 1.0)
    assert all(record.ece is not None and 0 <= record.ece < 0.5 for record in shared.judges)
    assert members[0].note.startswith(f"a reward model on {len(task.training(0).examples)} policy rows")
    assert any("the min of 2 plackett_luce models" in note for note in shared.notes)
    assert 0 <= shared.reference["accuracy"] <= 1
    scorer = task.scorer(0).scorer
    assert isinstance(scorer, EnsembleScorer)
    best, worst = scorer(["a b c ", "a b c "], ["c a", "d d b"]).tolist()
    assert best > worst
    first, second = (member(["a b c "], ["c a"]).item() for member in scorer.members)
    assert min(first, second) == best
    assert first != second, "the members' rows come in another order"


# What is said of a reward model.


def lengths(count: int, chosen: int = 5, rejected: int = 5) -> Tensor:
    return torch.tensor([[chosen, rejected]]).expand(count, 2)


def test_a_calibrated_set_has_no_calibration_error() -> None:
    """Each preference holds as often as the model says: ECE is the noise of 200,000 draws. Twice as sure, it is not."""
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(200_000, generator=generator).double().mul(1.5)
    flips = torch.rand(len(gaps), generator=generator) < torch.sigmoid(gaps)
    margins = torch.where(flips, gaps, -gaps)
    found, sure = quality(margins, lengths(len(gaps))), quality(2 * margins, lengths(len(gaps)))
    assert max(found.ece, found.ece_mass) < 0.005
    expected = torch.sigmoid(2 * gaps.abs()).mean() - torch.sigmoid(gaps.abs()).mean()
    assert sure.ece == pytest.approx(float(expected), abs=0.005)
    assert sure.ece_mass == pytest.approx(sure.ece, abs=0.002)
    assert sure.accuracy == found.accuracy
    assert sure.nll > found.nll


def test_calibration_by_hand() -> None:
    """Four pairs at confidence 0.8, three right; one tie at 0.5."""
    margin = math.log(4)
    found = quality(torch.tensor([margin, margin, margin, -margin, 0.0]), lengths(5))
    assert found.accuracy == pytest.approx(3.5 / 5)
    assert found.ece == pytest.approx((4 * 0.05 + 1 * 0.0) / 5)
    assert [(round(b.confidence, 6), b.accuracy, b.pairs) for b in found.curve] == [(0.5, 0.5, 1), (0.8, 0.75, 4)]
    assert found.brier == pytest.approx((3 * 0.2**2 + 0.8**2 + 0.5**2) / 5)
    assert found.nll == pytest.approx((-3 * math.log(0.8) - math.log(0.2) + math.log(2)) / 5)
    assert found.length_correlation is None
    assert found.by_length == {"matched": Share(0.7, 5), "longer": Share(None, 0), "shorter": Share(None, 0)}


def test_equal_mass_bins_differ_where_confidence_crowds() -> None:
    """Confidences in one narrow bin, the lower ones right and the higher ones wrong: equal widths average that away."""
    confidence = torch.linspace(0.601, 0.609, 30)
    margins = torch.logit(confidence) * torch.where(torch.arange(30) < 18, 1.0, -1.0)
    found = quality(margins, lengths(30))
    assert found.ece == pytest.approx(0.005, abs=1e-4)
    assert found.ece_mass > 0.4


def test_preferences_are_told_apart_by_length() -> None:
    margins = torch.tensor([2.0, 1.0, -1.0, 0.5, -0.5])
    sizes = torch.tensor([[20, 10], [15, 10], [10, 20], [20, 19], [10, 30]])
    found = quality(margins, sizes)
    assert found.by_length == {"matched": Share(1.0, 1), "longer": Share(1.0, 2), "shorter": Share(0.0, 2)}
    assert found.length_correlation == pytest.approx(np.corrcoef(margins, sizes[:, 0] - sizes[:, 1])[0, 1])


def test_pairs_of_a_list() -> None:
    ids = ((1,), (2,), (3,))
    assert ordered_pairs(Example("x", (0,), ids, Labels(ranks=(2, 0, 1)))) == [(1, 0), (2, 0), (1, 2)]
    assert ordered_pairs(Example("x", (0,), ids, Labels(ranks=(0, 1, 1)))) == [(0, 1), (0, 2)]
    assert ordered_pairs(Example("x", (0,), ids[:2])) == [(0, 1)]


def test_the_record_is_shown_and_drawn() -> None:
    found = quality(torch.randn(300, generator=torch.Generator().manual_seed(0)) + 0.5, lengths(300, 20, 10))
    table = quality_table(found, "reward model")
    assert f"{found.ece:.3f}" in [*table.columns[1].cells]
    assert reliability_png(found, "reward model").startswith(b"\x89PNG")
    assert reliability_png(quality(torch.tensor([1.0]), lengths(1)), "one pair").startswith(b"\x89PNG")


@pytest.mark.fault(30)
def test_errors_of_rewards_stop_a_run_with_exit_code_1() -> None:
    assert (RewardError.exit_code, issubclass(RewardError, PrefoptError)) == (1, True)
