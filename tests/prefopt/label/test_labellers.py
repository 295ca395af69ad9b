"""What chat labellers are asked, and what becomes of their replies; biased labellers whose bias averaging removes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.data.records import Record
from prefopt.errors import ConfigError, DataError
from prefopt.label.labellers import Asking, ChatLabeller, DirectReward, Pair, ScorerLabeller
from prefopt.label.measure import AVERAGED, ORDER_1, ORDER_2, length_baseline, measure_labels
from prefopt.label.prompts import read_exemplars, read_preamble
from prefopt.label.run import label_rows, preference_rows

PAIRS = [Pair("row:0", "\n\nHuman: hi\n\nAssistant:", "xxx", "y"), Pair("row:1", "hi", "y", "xxx")]


def test_both_orders_are_asked_and_averaged(synthetic: Any, unbiased: Any) -> None:
    chat = synthetic(unbiased)
    found = ChatLabeller(chat).judge(PAIRS, 0)
    assert [judgement.p for judgement in found] == pytest.approx([0.75, 0.25])
    assert found[0].orders == pytest.approx((0.75, 0.25))
    texts = [turns[-1]["content"] for turns in chat.asked]
    assert len(texts) == 4
    assert all(text.startswith(read_preamble("helpful")) and text.endswith("Preferred Response=") for text in texts)
    assert "Conversation:\nUser: hi\n\nResponse 1:\nxxx\n\nResponse 2:\ny\n" in texts[0]
    assert "Conversation:\nUser: hi\n\nResponse 1:\ny\n\nResponse 2:\nxxx\n" in texts[2]
    assert "Context:\nhi\n\n" in texts[1]


@pytest.mark.parametrize("asking", [Asking(), Asking(average="logits")])
def test_a_synthetic_bias_is_removed_exactly_by_its_own_average(synthetic: Any, unbiased: Any, asking: Asking) -> None:
    """An additive bias of 0.2 in probabilities, and one of 1.5 in logits."""
    biased = {
        "probabilities": lambda one, other: unbiased(one, other) + 0.2,
        "logits": lambda one, other: 1 / (1 + math.exp(-1.5) * (1 / unbiased(one, other) - 1)),
    }
    for name, first in biased.items():
        found = ChatLabeller(synthetic(first), asking).judge(PAIRS, 0)
        error = max(abs(judgement.p - truth) for judgement, truth in zip(found, (0.75, 0.25), strict=True))
        assert error < 1e-14 if name == asking.average else error > 0.01


def test_rationales_come_first_and_are_read_back(synthetic: Any, unbiased: Any) -> None:
    chat = synthetic(unbiased)
    (judged,) = ChatLabeller(chat, Asking(rationales=2)).judge(PAIRS[:1], 5)
    assert judged.p == pytest.approx(0.75)
    assert len(set(judged.rationales)) == 2  # of two draws; each order has its own of the same words here
    assert len(judged.rationales) == 4
    asked, chosen = chat.asked[0], chat.asked[-1]
    assert asked[-1]["content"].endswith("Rationale:")
    assert [turn["role"] for turn in chosen] == ["user", "assistant", "user"]
    assert chosen[1]["content"] == judged.rationales[-1]
    assert chosen[2]["content"].endswith("Preferred Response=")
    again = ChatLabeller(synthetic(unbiased), Asking(rationales=2)).judge(PAIRS[:1], 5)
    assert again == [judged]
    assert ChatLabeller(synthetic(unbiased), Asking(rationales=2)).judge(PAIRS[:1], 6) != [judged]


def test_an_empty_rationale_leaves_no_label(synthetic: Any, unbiased: Any) -> None:
    chat = synthetic(unbiased)
    chat.rationale = ""
    assert math.isnan(ChatLabeller(chat, Asking(rationales=1)).judge(PAIRS[:1], 0)[0].p)


def test_exemplars_are_turns_and_teach_no_place(synthetic: Any, unbiased: Any, jsonl: Any) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "rationale": "clear"} for i in range(2)]
    path = jsonl(rows)
    chat = synthetic(unbiased)
    found = ChatLabeller(chat, Asking(exemplars=path)).judge(PAIRS[:1], 0)
    assert found[0].p == pytest.approx(0.75)
    turns = chat.asked[0]
    assert [turn["content"] for turn in turns if turn["role"] == "assistant"] == ["1", "2"]
    assert "Response 1:\ngood" in turns[0]["content"]
    assert "Response 1:\nbad" in turns[2]["content"]
    reasoned = synthetic(unbiased)
    ChatLabeller(reasoned, Asking(exemplars=path, rationales=1)).judge(PAIRS[:1], 0)
    assert [t["content"] for t in reasoned.asked[-1] if t["role"] == "assistant"] == ["clear", "1", "clear", "2", "because"]


def test_exemplars_and_preambles_that_cannot_be_read(jsonl: Any, tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    with pytest.raises(DataError, match=r"pairs.jsonl:1: with --rationales .* a column rationale"):
        read_exemplars(jsonl([pair]), rationales=True)
    with pytest.raises(DataError, match=r"pairs.jsonl:2: .*pair"):
        read_exemplars(jsonl([pair, {"prompt": "q", "completion": "good", "label": True}]), rationales=False)
    with pytest.raises(DataError, match="no exemplar"):
        read_exemplars(jsonl([]), rationales=False)
    with pytest.raises(ConfigError, match="is no name"):
        read_preamble("helpfull")
    own = tmp_path / "own.txt"
    own.write_text("Judge. \n")
    assert read_preamble(str(own)) == "Judge."


@pytest.mark.parametrize(
    "options",
    [
        {"rationales": -1}, {"rationale_tokens": 0}, {"temperature": 1.0}, {"rationales": 2, "temperature": 0.0},
        {"direct": True, "rationales": 1}, {"direct": True, "average": "logits"},
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="label: "):
        Asking(**options)


def test_direct_scores_are_of_one_completion_each(synthetic: Any, unbiased: Any) -> None:
    chat = synthetic(unbiased)
    found = ChatLabeller(chat, Asking(direct=True)).judge(PAIRS, 0)
    assert [judgement.scores for judgement in found] == [pytest.approx(s) for s in [(-5 / 9, -1), (-1, -5 / 9)]]
    assert [(judgement.p, judgement.orders) for judgement in found] == [(1, None), (0, None)]
    assert "Response" not in chat.asked[0][0]["content"]
    assert torch.allclose(DirectReward(chat)(["hi", "hi"], ["xxxx", "y"]), torch.tensor([-3 / 9, -1]))


def test_a_reward_labels_by_bradley_and_terry(records: list[Record]) -> None:
    labeller = ScorerLabeller(lambda prompts, texts: torch.tensor([float(len(t)) for t in texts]), "length", "length")
    labelled = label_rows(records, labeller)
    report = measure_labels(labelled, labeller)
    assert report.position_bias is None
    assert list(report.agreement) == [AVERAGED]
    assert report.agreement[AVERAGED].value == 0.75
    row = next(iter(preference_rows(labelled)))
    gap = row["chosen_score"] - row["rejected_score"]
    assert gap == len(row["chosen"]) - len(row["rejected"]) > 0
    assert row["soft_label"] == pytest.approx(1 / (1 + math.exp(-gap)), abs=1e-9)


def test_the_record_of_an_unbiased_labeller(synthetic: Any, unbiased: Any, records: list[Record]) -> None:
    """It takes the longer one, which is the human's choice in 30 of 40 pairs."""
    labeller = ChatLabeller(synthetic(unbiased))
    report = measure_labels(label_rows(records, labeller), labeller)
    assert [report.agreement[name].value for name in (ORDER_1, ORDER_2, AVERAGED)] == [0.75, 0.75, 0.75]
    assert (report.agreement[AVERAGED].low, report.agreement[AVERAGED].high) == pytest.approx((0.598, 0.858), abs=1e-3)
    assert report.position_bias is not None
    assert report.position_bias.value == 0
    assert report.first_place is None
    assert report.averaging is not None
    assert report.averaging.value == report.averaging.low == 0
    assert report.longer is not None
    assert report.longer.value == 1
    baseline = length_baseline(records)
    assert baseline is not None
    assert baseline.value == 0.75
    assert (report.labeller, report.parameters, report.notes) == ("synthetic", 1000, ("not real",))


def test_a_labeller_that_sees_the_first_place_alone_agrees_by_half(synthetic: Any, records: list[Record]) -> None:
    """The order of the data must not leak: in the file the chosen completion always comes first."""
    labeller = ChatLabeller(synthetic(lambda one, other: 0.9))
    labelled = label_rows(records, labeller)
    report = measure_labels(labelled, labeller)
    assert report.position_bias is not None
    assert report.first_place is not None
    assert (report.position_bias.value, report.first_place.value, report.ties) == (1, 1, 40)
    assert report.agreement[AVERAGED].value == 0.5
    one, other = report.agreement[ORDER_1].value, report.agreement[ORDER_2].value
    assert one + other == 1
    assert 0.2 < one < 0.8
    rows = list(preference_rows(labelled))
    assert {row["soft_label"] for row in rows} == {0.5}
    same = sum(row["chosen"] == record.completions[0] for row, record in zip(rows, records, strict=True))
    assert 8 < same < 32  # ties have an order by coin


def test_what_cannot_be_read_is_counted_and_left_out(synthetic: Any, unbiased: Any, records: list[Record]) -> None:
    labeller = ChatLabeller(synthetic(lambda one, other: math.nan if len(one) == 7 else unbiased(one, other)))
    labelled = label_rows(records, labeller)
    report = measure_labels(labelled, labeller)
    unreadable = sum(any(len(text) == 7 for text in record.completions) for record in records)
    assert report.unreadable == unreadable == 8
    assert len(list(preference_rows(labelled))) == 32
    assert report.agreement[AVERAGED].n == 32


def test_without_human_labels_nothing_is_said_of_agreement(synthetic: Any, unbiased: Any, records: list[Record]) -> None:
    labeller = ChatLabeller(synthetic(unbiased))
    report = measure_labels(label_rows(records, labeller), labeller, human=False)
    assert not report.agreement
    assert report.averaging is report.nll is None
    assert report.confidence is not None
