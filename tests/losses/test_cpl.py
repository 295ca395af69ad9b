"""CPL on two numbers, its gradient, what bias and gamma do, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import cpl_loss, dpo_loss, get, sft_loss


@pytest.fixture
def segments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs and masks of four pairs of segments of up to five steps."""
    chosen_mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1]])).double()
    rejected_mask = chosen_mask.flip(0)
    chosen, rejected = (-2 * torch.rand(4, 5, dtype=torch.float64) for _ in range(2))
    return chosen * chosen_mask, rejected * rejected_mask, chosen_mask, rejected_mask


def test_cpl_closed_form() -> None:
    """alpha 0.5, bias 0.25, gamma 0.75; chosen steps (-1, -4), rejected (-6, masked).

    S_w = 0.5*(-1 - 0.75*4) = -2, S_l = 0.5*(-6) = -3, argument S_w - 0.25 S_l = -1.25.
    """
    chosen, rejected = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-6.0, 9.0]])
    masks = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    out = cpl_loss(chosen, rejected, *masks, alpha=0.5, bias=0.25, gamma=0.75)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(1.25)))
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": -2.0, "rewards/rejected": -3.0, "rewards/margins": 1.0, "rewards/accuracies": 1.0,
    }  # fmt: skip


def test_cpl_defaults() -> None:
    assert get("cpl").bind().hyper == {"alpha": 0.1, "bias": 0.5, "gamma": 1.0}
    assert get("cpl_bc").bind().hyper == {"alpha": 0.1, "bias": 0.5, "gamma": 1.0, "bc_coef": 1.5}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_cpl_discount_weighs_the_gradient_of_each_step(gamma: float) -> None:
    """gamma^t, of which 0 leaves the first step alone."""
    chosen = torch.full((1, 3), -1.0, requires_grad=True)
    cpl_loss(chosen, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3), gamma=gamma).loss.sum().backward()
    assert chosen.grad is not None
    assert (chosen.grad / chosen.grad[0, 0]).tolist() == [[1.0, gamma, gamma**2]]


def test_cpl_gradcheck_and_signs(segments: tuple[Tensor, ...]) -> None:
    """dL/dS_w = -sigma(-x), dL/dS_l = bias sigma(-x) with x = S_w - bias S_l, per unmasked step times alpha."""
    chosen, rejected, *masks = segments
    chosen, rejected = chosen.requires_grad_(), rejected.requires_grad_()
    labels = torch.rand(4, dtype=torch.float64)
    assert gradcheck(lambda c, r: cpl_loss(c, r, *masks, labels, gamma=0.9).loss, (chosen, rejected))
    cpl_loss(chosen, rejected, *masks, alpha=0.3, bias=0.5).loss.sum().backward()
    x = 0.3 * (chosen.sum(-1) - 0.5 * rejected.sum(-1)).detach()
    torch.testing.assert_close(chosen.grad, -0.3 * torch.sigmoid(-x)[:, None] * masks[0])
    torch.testing.assert_close(rejected.grad, 0.15 * torch.sigmoid(-x)[:, None] * masks[1])


def test_cpl_with_bias_1_is_reference_free_dpo(segments: tuple[Tensor, ...]) -> None:
    chosen, rejected, *masks = segments
    zero = torch.zeros(4, dtype=torch.float64)
    dpo = dpo_loss(chosen.sum(-1), rejected.sum(-1), zero, zero, beta=0.2)
    torch.testing.assert_close(cpl_loss(chosen, rejected, *masks, alpha=0.2, bias=1.0).loss, dpo.loss)


def test_cpl_on_log_ratios_with_bias_1_is_dpo(segments: tuple[Tensor, ...]) -> None:
    chosen, rejected, *masks = segments
    references = [torch.rand_like(mask) * mask for mask in masks]
    sums = [t.sum(-1) for t in (chosen, rejected, *references)]
    cpl = cpl_loss(chosen - references[0], rejected - references[1], *masks, alpha=0.2, bias=1.0)
    torch.testing.assert_close(cpl.loss, dpo_loss(*sums, beta=0.2).loss)


def test_cpl_bias_breaks_the_shift(segments: tuple[Tensor, ...]) -> None:
    """Making both segments likelier by the same amount does nothing at bias 1 and lowers the loss below 1."""
    chosen, rejected, *masks = segments
    first = torch.zeros(4, 5, dtype=torch.float64)
    first[:, 0] = 1.0

    def change(bias: float) -> Tensor:
        return (
            cpl_loss(chosen + first, rejected + first, *masks, bias=bias).loss
            - cpl_loss(chosen, rejected, *masks, bias=bias).loss
        )

    assert change(1.0).abs().max() < 1e-12
    assert (change(0.5) < 0).all()


def test_cpl_soft_labels_swap_the_segments(segments: tuple[Tensor, ...]) -> None:
    """Label 0 is the swapped pair, label 1/2 the mean of both: a tie."""
    chosen, rejected, chosen_mask, rejected_mask = segments
    here = cpl_loss(chosen, rejected, chosen_mask, rejected_mask).loss
    swapped = cpl_loss(rejected, chosen, rejected_mask, chosen_mask).loss

    def labelled(p: float) -> Tensor:
        return cpl_loss(chosen, rejected, chosen_mask, rejected_mask, torch.full((4,), p, dtype=torch.float64)).loss

    torch.testing.assert_close(labelled(0.0), swapped)
    torch.testing.assert_close(labelled(0.5), (here + swapped) / 2)
    torch.testing.assert_close(labelled(1.0), here)


def test_cpl_discount_counts_steps_from_the_start_of_the_segment() -> None:
    """Padding on the left shifts no exponent."""
    right = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[1, 1, 0]])
    left = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[0, 1, 1]])
    other = torch.tensor([[-1.0, 0.0, 0.0]]), torch.tensor([[1, 0, 0]])
    losses = [cpl_loss(logps, other[0], mask, other[1], gamma=0.5).loss for logps, mask in (right, left)]
    torch.testing.assert_close(*losses)


def test_cpl_bc_adds_cloning_of_the_chosen_segments(segments: tuple[Tensor, ...]) -> None:
    names = ("policy_chosen_token_logps", "policy_rejected_token_logps", "chosen_mask", "rejected_mask")
    outputs = get("cpl_bc").bind(bc_coef=0.4, bias=1.0)(dict(zip(names, segments, strict=True)))
    torch.testing.assert_close(outputs["cpl"].loss, cpl_loss(*segments, bias=1.0).loss)
    torch.testing.assert_close(outputs["sft"].mean(), sft_loss(segments[0], segments[2]).mean())
    assert [(term.name, term.coefficient) for term in get("cpl_bc").bind(bc_coef=0.4).terms] == [("cpl", 1.0), ("sft", 0.4)]
