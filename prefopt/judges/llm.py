"""An LLM as a judge of pairs, by several templates and always in both orders. N pairs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.chat.protocol import ChatModel
from prefopt.data.records import Text
from prefopt.errors import ConfigError
from prefopt.judges.templates import TEMPLATES, Template, addresses_judge, render
from prefopt.judges.verdicts import Orders, Verdicts


class LLMJudge:
    """A chat model that says which of two completions is better (Zheng et al. 2023 [zheng2023judging]).

    A share is P(first) + P(tie) / 2 over the template's answers, averaged over both orders, then over the templates that
    were read in both; none makes it NaN, and every reply that could not be read is counted. Replies are read from the model
    alone: what a completion says is never one.

    Args:
        model: local or an endpoint; its cache and its counts are its own.
        templates: at least one.
    """

    def __init__(self, model: ChatModel, templates: Sequence[Template] = TEMPLATES) -> None:
        if not templates:
            raise ConfigError("an LLM judge needs at least one template.")
        self.model, self.templates = model, tuple(templates)

    @property
    def notes(self) -> Sequence[str]:
        """What the model could not do as it was asked, as giving log-probs."""
        return self.model.notes

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.examine(prompts, first, second).shares

    def examine(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """The verdicts by template and order. Raises PrefoptError as the model does."""
        before = self.model.usage.as_dict()
        orders = {template.name: self._ask(template, prompts, first, second) for template in self.templates}
        by_template = torch.stack([found.shares for found in orders.values()])  # [templates, N]
        unread = sum(int(side.isnan().sum()) for found in orders.values() for side in (found.shown_first, found.shown_second))
        counts = {
            "unread_replies": unread,
            "replies": 2 * len(self.templates) * len(prompts),
            "addressing_completions": sum(map(addresses_judge, [*first, *second])),
            **{name: value - before[name] for name, value in self.model.usage.as_dict().items()},
        }
        return Verdicts(by_template.nanmean(0), orders, counts)

    def _ask(self, template: Template, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Orders:
        pairs = list(zip(prompts, first, second, strict=True))
        asked = [render(template, prompt, one, other) for prompt, one, other in pairs]
        asked += [render(template, prompt, other, one) for prompt, one, other in pairs]
        weights = self.model.choose(asked, template.answers).exp()  # [2N, 3]
        shares = (weights[:, 0] + weights[:, 2] / 2).double()
        return Orders(shares[: len(pairs)], 1 - shares[len(pairs) :])
