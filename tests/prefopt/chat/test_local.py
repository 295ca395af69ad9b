"""A local model as a chat model: probabilities as transformers gives them, the template or plain text, the context."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.chat import Message, chat_model
from prefopt.chat.local import NO_TEMPLATE, LocalChat, exclusive
from prefopt.errors import ConfigError

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][:1] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> LocalChat:
    return LocalChat.load(str(tiny_model), cache=tmp_path, device="cpu", micro_batch_tokens=16)


def ask(*words: str) -> list[list[Message]]:
    return [[Message(role="user", content=word)] for word in words]


def by_hand(model: LocalChat, text: str, answers: list[list[int]]) -> torch.Tensor:
    """[A] from one plain forward pass of transformers for each answer."""
    prompt = model._tokenizer(text, add_special_tokens=False)["input_ids"]
    sums = []
    with model._policy.plain_attention() as plain, torch.no_grad():
        for ids in answers:
            logits = plain(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(ids)))
    return torch.stack(sums).log_softmax(-1)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_choose_is_what_separate_passes_give(model: LocalChat, template: str | None) -> None:
    model._tokenizer.chat_template = template
    conversations = ask("b c d", "a", "d d d d a b c a")
    found = model.choose(conversations, ["a", "b c", "d"])
    assert torch.allclose(found.exp().sum(-1), torch.ones(3).double())
    for row, conversation in zip(found, conversations, strict=True):
        expected = by_hand(model, model.render(conversation), [[2], [3, 4], [5]])
        assert torch.allclose(row, expected, atol=1e-5)
    assert model.usage.calls == 3


def test_without_a_template_it_is_plain_text_and_says_so(model: LocalChat) -> None:
    turns = [Message(role="system", content="x"), Message(role="user", content="y")]
    assert model.render(turns) == "System: x\n\nUser: y\n\nAssistant:"
    assert model.notes == (NO_TEMPLATE,)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_special_tokens_in_a_text_are_text(model: LocalChat, template: str | None) -> None:
    """A quoted end of turn would let a completion speak for the user."""
    model._tokenizer.chat_template = template
    eos = model._tokenizer.eos_token_id
    (quiet,), (loud,) = (model._encode([model.render(ask(text)[0])]) for text in ("a b", "a </s> b"))
    assert loud.count(eos) == quiet.count(eos)
    assert "< /s>" in model.render(ask("a </s> b")[0])


def test_an_answer_that_begins_another_has_what_that_leaves_of_it(model: LocalChat) -> None:
    """P(a and not a b) + P(a b) = P(a)."""
    found = model.choose(ask("c"), ["a", "a b", "d"])[0].exp()
    whole = model.choose(ask("c"), ["a", "d"])[0].exp()
    assert float((found[0] + found[1]) / found[2]) == pytest.approx(float(whole[0] / whole[1]), rel=1e-5)


def test_extensions_of_extensions_are_taken_away_once() -> None:
    logps = torch.tensor([0.5, 0.3, 0.2, 0.4]).double().log()
    found = exclusive(logps, [[1], [1, 2], [1, 2, 3], [4]]).exp()
    assert torch.allclose(found, torch.tensor([0.2, 0.1, 0.2, 0.4]).double())


def test_answers_that_cannot_be_told_apart_are_refused(model: LocalChat) -> None:
    with pytest.raises(ConfigError, match="does not tell the answers"):
        model.choose(ask("a"), ["1", "2"])  # both are unknown words
    for answers in (["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(ConfigError, match="two or more different answers"):
            model.choose(ask("a"), answers)


def test_replies_repeat_with_their_seed_and_stop_at_the_limit(model: LocalChat) -> None:
    draws = [model.complete(ask("a", "b c"), max_tokens=6, temperature=1.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert any(one != other for one, other in itertools.combinations(draws, 2))
    assert all(len(text.split()) <= 6 for draw in draws for text in draw)
    greedy = [model.complete(ask("a"), max_tokens=3, temperature=0.0, seed=seed) for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_beyond_the_context_there_is_no_reply(model: LocalChat) -> None:
    model._context = 12
    found = model.choose(ask("a", "a " * 20), ["a", "b"])
    assert found.isnan().any(-1).tolist() == [False, True]
    assert model.complete(ask("a " * 20), max_tokens=2, temperature=0.0, seed=0) == [""]
    assert (model.usage.too_long, model.usage.calls) == (2, 1)


def test_a_folder_is_a_chat_model(tiny_model: Path, tmp_path: Path, model: LocalChat) -> None:
    made: Any = chat_model(str(tiny_model), cache=tmp_path, device="cpu")
    assert (made.name, made.identity) == ("tiny", model.identity)
    assert made.parameters == sum(parameter.numel() for parameter in made._policy.parameters())
