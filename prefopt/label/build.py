"""Labellers by name."""

from __future__ import annotations

from pathlib import Path

from prefopt.chat import chat_model
from prefopt.chat.build import is_endpoint
from prefopt.errors import ConfigError
from prefopt.label.labellers import Asking, ChatLabeller, Labeller, ScorerLabeller
from prefopt.models.fingerprint import fingerprint
from prefopt.rewards.functions import FunctionScorer, import_function, is_function
from prefopt.rewards.gold import GoldReward
from prefopt.rewards.layout import load_reward_model

GOLD, REWARD = "gold:", "reward:"


def is_chat(spec: str) -> bool:
    """True for a chat model, False for a reward."""
    return is_endpoint(spec) or not (spec.startswith((GOLD, REWARD)) or is_function(spec))


def build_labeller(
    spec: str,
    asking: Asking | None = None,
    *,
    cache: Path,
    device: str = "auto",
    micro_batch_tokens: int = 8192,
    trust_remote_code: bool = False,
    key_variable: str | None = None,
    parallel: int = 8,
) -> Labeller:
    """A labeller.

    Args:
        spec: `gold:REVIEWS` (controlled sentiment's gold reward, fitted on the gold fold of labelled reviews);
            `reward:FOLDER-or-hub-id` (a reward model); `module:function` or `file.py:function` (a reward of your own);
            anything else is a chat model: see `prefopt.chat.chat_model`.
        asking: how a chat model is asked.
        cache, device, micro_batch_tokens, trust_remote_code, key_variable, parallel: as `chat_model`.

    Raises:
        ConfigError, DataError, HubError: there is no such thing, or it cannot be read.
    """
    if is_chat(spec):
        chat = chat_model(
            spec, cache=cache, device=device, micro_batch_tokens=micro_batch_tokens, trust_remote_code=trust_remote_code,
            key_variable=key_variable, parallel=parallel,
        )  # fmt: skip
        return ChatLabeller(chat, asking)
    if spec.startswith(GOLD):
        return _gold(spec.removeprefix(GOLD))
    name = spec.removeprefix(REWARD)
    if is_function(name):
        return ScorerLabeller(FunctionScorer(import_function(name), name), name, f"function {name} {_code(name)}")
    scorer = load_reward_model(
        name, cache=cache, device=device, micro_batch_tokens=micro_batch_tokens, trust_remote_code=trust_remote_code
    )
    head = scorer.policy.heads["reward"].state_dict()["weight"].double().sum()
    size = sum(parameter.numel() for parameter in scorer.policy.parameters())
    short = Path(name).name if Path(name).exists() else name
    return ScorerLabeller(scorer, short, f"{fingerprint(scorer.policy.model)} {float(head)!r} {scorer.offset}", size)


def _gold(source: str) -> Labeller:
    from prefopt.data.sentiment import read_reviews, split_folds

    if not source:
        raise ConfigError(f"{GOLD} is named with its reviews: gold:FILE, gold:FOLDER or gold:HUB-ID (columns text, label).")
    # The fold that fits the gold reward of the task `sentiment:`, so that both are one truth.
    reviews = split_folds(read_reviews(source).reviews)["gold"]
    scorer = GoldReward([review.text for review in reviews], [review.positive for review in reviews])
    identity = repr([(review.text, review.positive) for review in reviews])
    return ScorerLabeller(scorer, "gold sentiment", identity)


def _code(name: str) -> str:
    """The text of a function's file: another text may give other labels."""
    path = Path(name.rpartition(":")[0])
    return path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
