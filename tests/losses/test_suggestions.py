"""What error messages suggest exists, and is near."""

from __future__ import annotations

import inspect

import pytest

from losses import get, names
from losses.suggestions import _PEER_OPTIONS, PEER_NAMES, suggest, suggest_option


@pytest.mark.parametrize(("peer", "ours"), PEER_NAMES.items())
def test_what_peers_call_a_loss_is_one_of_ours(peer: str, ours: str) -> None:
    assert ours in names()
    assert peer not in names(), "a name of ours is found before it is looked up among the peers'"
    assert peer == peer.lower(), "names are looked up in lower case"


def test_what_peers_call_an_option_is_one_of_ours() -> None:
    from prefopt.rollouts import rollouts

    losses = [get(name) for name in names()]
    ours = {option for loss in losses for option in loss.hyper}
    for function in (rollouts, *(loss.advantage for loss in losses if loss.advantage)):
        ours |= inspect.signature(function).parameters.keys()
    named = {option for options in _PEER_OPTIONS.values() for option in options}
    assert named <= ours


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("ipoo", ["dpo", "ipo"], " (did you mean 'ipo'?)"),
        ("ab12", ["abxy", "zzzz"], " (did you mean 'abxy'?)"),  # half of the letters
        ("ab123", ["abxyz", "zzzz"], ""),  # two of five
        ("beta", [], ""),
    ],
)
def test_the_nearest_name_is_suggested_if_half_of_it_agrees(name: str, known: list[str], expected: str) -> None:
    assert suggest(name, known) == expected


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("loss_type", ["loss_types"], " (an algorithm is chosen by its own name, not by an option)"),
        ("loss", ["loss_types"], " (an algorithm is chosen by its own name, not by an option)"),
        ("epsilon", ["label_smoothing", "clip_low"], " (peers' 'epsilon' is 'clip_low' here)"),
        ("epsilon", ["label_smoothing"], " (peers' 'epsilon' is 'label_smoothing' here)"),
        ("epsilon", ["epsilons"], " (did you mean 'epsilons'?)"),
        ("epsilon", ["beta"], ""),
        ("btea", ["beta"], " (did you mean 'beta'?)"),
    ],
)
def test_ours_for_a_peers_option_else_the_nearest(name: str, known: list[str], expected: str) -> None:
    assert suggest_option(name, known) == expected
