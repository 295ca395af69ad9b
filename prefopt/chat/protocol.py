"""What a chat model is: it weighs answers, it writes text, it counts. N conversations, A answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from prefopt.data.records import Message
from prefopt.errors import PrefoptError

__all__ = ["ChatError", "ChatModel", "Conversation", "Message", "Usage"]

Conversation = Sequence[Message]


class ChatError(PrefoptError):
    """A chat model could not be asked, or its reply is none; the message says of which conversation and what to do."""

    exit_code = 2


@dataclass
class Usage:
    """What was asked of a chat model since it was made.

    Args:
        calls: conversations that the model answered.
        cached: conversations answered from the cache; their tokens are not counted again.
        prompt_tokens, completion_tokens: as the model counts them; 0 where an endpoint does not say.
        too_long: conversations beyond a local model's context, which were not asked.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    too_long: int = 0

    def as_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return asdict(self)


class ChatModel(Protocol):
    """A language model that is talked to. Its methods raise ChatError or ConfigError for what the user can mend."""

    @property
    def name(self) -> str:
        """What reports call it; holds no key."""

    @property
    def identity(self) -> str:
        """Tells two models apart that have one name: a digest of the weights, or the address of an endpoint; holds no key."""

    @property
    def parameters(self) -> int | None:
        """The number of weights, where it is known (a local model): the size that labellers are compared by."""

    @property
    def usage(self) -> Usage:
        """The counts so far; a live record."""

    @property
    def notes(self) -> Sequence[str]:
        """What a report should say of how it was asked, such as "no chat template: plain text"."""

    def choose(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> Tensor:
        """Weighs `answers` as the next reply to each conversation.

        Returns:
            [N, A] float64 log-probabilities on the CPU, normalised over the answers; a row of NaN where a reply could not be
            read. An endpoint that gives no log-probabilities gives 0 and -inf.
        """

    def complete(self, conversations: Sequence[Conversation], *, max_tokens: int, temperature: float, seed: int) -> list[str]:
        """The model's reply to each conversation, without white space around it; temperature 0 is greedy."""
