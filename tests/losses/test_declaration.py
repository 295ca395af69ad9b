"""A signature, read as tensors and hyper-parameters, and a docstring, read as their help."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import pytest
from torch import Tensor

from losses import LossOutput
from losses.declaration import HyperParameter, RegistrationError, Signature, argument_help, read_options, read_signature

Kinds = Literal["a", "b"]


def documented(
    policy_logps: Tensor, mask: Tensor, margins: Tensor | None = None, *, beta: float = 0.1, kind: Kinds = "a"
) -> LossOutput:
    """L = 0.

    Args:
        mask: no hyper-parameter.
        beta: how strong; raising it
            does something.
    """
    raise NotImplementedError


def test_a_signature_is_read_in_its_order() -> None:
    assert read_signature(documented, "mine") == Signature(
        required=("policy_logps", "mask"),
        optional=("margins",),
        hyper={
            "beta": HyperParameter("beta", float, 0.1, "how strong; raising it does something."),
            "kind": HyperParameter("kind", Kinds, "a", ""),
        },
    )


def test_options_are_keyword_only() -> None:
    """The same as those of the signature, also where positional parameters are no tensors."""

    def stream(count, workers: int = 2, *, lam: float = 0.9) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    assert read_options(documented, "mine") == read_signature(documented, "mine").hyper
    assert read_options(stream, "mine") == {"lam": HyperParameter("lam", float, 0.9, "")}


def test_a_name_outside_the_vocabulary_is_refused() -> None:
    def typo(polcy_logps: Tensor) -> None: ...
    def unlike(qqq: Tensor) -> None: ...

    with pytest.raises(RegistrationError) as error:
        read_signature(typo, "loss 'mine'")
    assert str(error.value).startswith(
        "loss 'mine': positional parameter 'polcy_logps' is not a tensor of the vocabulary (did you mean 'policy_logps'?). "
        "Hyper-parameters come after `*`. Known tensors: advantages, chosen_lengths, "
    )
    with pytest.raises(RegistrationError, match=r"'qqq' is not a tensor of the vocabulary\. Hyper"):
        read_signature(unlike, "loss 'mine'")


def test_a_tensor_has_no_default_but_none() -> None:
    def zero(policy_logps: Tensor, margins: Any = 0) -> None: ...

    with pytest.raises(RegistrationError) as error:
        read_signature(zero, "mine")
    assert str(error.value) == "mine: tensor 'margins' has default 0; only None (optional data) is allowed."


def test_what_hides_tensors_is_refused() -> None:
    def several(*tensors: Tensor) -> None: ...
    def named(**tensors: Tensor) -> None: ...
    def unnamed(policy_logps: Tensor, /) -> None: ...

    for function, shown in (
        (several, "*tensors: 'Tensor'"),
        (named, "**tensors: 'Tensor'"),
        (unnamed, "policy_logps: 'Tensor'"),
    ):
        with pytest.raises(RegistrationError) as error:
            read_signature(function, "mine")
        assert str(error.value) == f"mine: {shown} hides what the function needs; name each tensor."


def test_an_option_needs_annotation_and_default() -> None:
    def no_default(*, beta: float) -> None: ...
    def no_annotation(*, beta=0.1) -> None: ...  # type: ignore[no-untyped-def]

    for function in (no_default, no_annotation):
        with pytest.raises(RegistrationError) as error:
            read_options(function, "mine")
        assert str(error.value) == (
            "mine: hyper-parameter 'beta' needs an annotation and a default, as in `*, beta: float = 0.1`."
        )


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("", {}),
        ("L = 0.", {}),
        ("L = 0.\n\nArgs:\n    beta: strength.", {"beta": "strength."}),
        ("Args:\n    beta:   wide   space.  ", {"beta": "wide   space."}),
        ("Args:\n    beta: one\n        two: three\n          four.", {"beta": "one two: three four."}),
        ("Args:\n    one, two: both.\n    three: alone.", {"one": "both.", "two": "both.", "three": "alone."}),
        ("Args:\n    one: first.\n\n    two: after a blank\n\n        line.", {"one": "first.", "two": "after a blank line."}),
        ("Args:\n    (nothing yet)\n    one: first.", {"one": "first."}),
        ("Args:\n    one: first.\n\nReturns:\n    two: not an argument.", {"one": "first."}),
        ("Args:\n    one: first.\nRaises:\n    ValueError: never.", {"one": "first."}),
        ("Its Args:\n    one: not at the start of a line.", {}),
    ],
)
def test_help_of_arguments(doc: str, expected: dict[str, str]) -> None:
    assert argument_help(doc) == expected


def test_help_is_read_from_a_cleaned_docstring() -> None:
    assert argument_help(inspect.getdoc(documented) or "") == {
        "mask": "no hyper-parameter.",
        "beta": "how strong; raising it does something.",
    }
