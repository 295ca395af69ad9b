"""What a chat labeller is asked: preamble, exemplars, the sample, the ending (Lee et al. 2023 [lee2023rlaif], section 2.1).

Differences: (1) exemplars and rationales are turns of a conversation, not one text, so that chat templates mark who said what;
(2) the words of the preambles are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.chat.protocol import Message
from prefopt.data.hh import is_dialogue, parse_turns
from prefopt.data.records import Text
from prefopt.data.rows import BadRow, check_text, content
from prefopt.data.sources import read_lines
from prefopt.data.trl_formats import parse
from prefopt.errors import ConfigError, DataError

PLACES = ("1", "2")
SCORES = tuple(str(score) for score in range(1, 11))

_RATER = "You are an expert rater of the replies of AI assistants. "
PREAMBLES: Mapping[str, str] = {
    "plain": _RATER + "Given a conversation and two possible replies, say which reply is better.",
    "helpful": _RATER + "Given a conversation and two possible replies, say which reply is more helpful and honest. A helpful "
    "reply does what was asked, is correct and relevant, and goes into as much detail as the question needs; a long reply is "
    "not better for its length. An honest reply does not make things up, and says what it does not know.",
    "harmless": _RATER + "Given a conversation and two possible replies, say which reply is less harmful. A harmless reply "
    "helps with nothing illegal, violent, hateful or dangerous, insults nobody, gives away nothing private, and stays polite "
    "when it declines.",
    "summary": "You are an expert rater of summaries. Given a text and two possible summaries, say which summary is better. A "
    "good summary is coherent, says only what the text says, and covers what is important in it, in few words.",
}
"""By name, what a labeller is told to look at."""

_CHOICE = "Which reply is better? Say 1 or 2 and nothing else.\n\nPreferred Response="
_RATIONALE = (
    "Compare the two replies by these criteria in a few sentences, and say which one is better and why. Do not give a "
    "number yet.\n\nRationale:"
)
_SCORE = "Rate the reply by these criteria from 1 (worst) to 10 (best). Say the number and nothing else.\n\nScore="


@dataclass(frozen=True)
class Exemplar:
    """A labelled example that is shown before the sample: two replies in their places, and the place (0 or 1) of the better
    one. `rationale` is shown where rationales are asked for."""

    prompt: Text
    replies: tuple[str, str]
    better: int
    rationale: str = ""


def read_preamble(name: str) -> str:
    """A preamble by name, or the text of a file.

    Raises:
        ConfigError: neither; or an empty file.
    """
    if name in PREAMBLES:
        return PREAMBLES[name]
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(PREAMBLES)
        raise ConfigError(f"preamble {name!r} is no name ({known}) and no text file that can be read ({error}).") from error
    if not text:
        raise ConfigError(f"preamble {name}: the file is empty.")
    return text


def read_exemplars(path: Path, *, rationales: bool) -> tuple[Exemplar, ...]:
    """Pairs in any format that `--data` reads, with an optional column `rationale`; the better reply stands first in the first
    exemplar, second in the second, and so on, so that no place is taught.

    Args:
        rationales: every row must have one.

    Raises:
        DataError: a row that is no pair, or lacks its rationale; the message names its line.
    """
    made: list[Exemplar] = []
    for line, row in read_lines(path, path.name):
        where = f"{path.name}:{line}"
        try:
            if isinstance(row, BadRow):
                raise row
            parsed, _ = parse(row, None)
            rationale = check_text(row.get("rationale", ""), "rationale").strip()
        except BadRow as error:
            raise DataError(f"{where}: {error.reason}; an exemplar is a pair: prompt, chosen, rejected.") from error
        if parsed.labels.ranks != (0, 1):
            raise DataError(f"{where}: no pair; an exemplar has the columns prompt, chosen and rejected.")
        if rationales and not rationale:
            raise DataError(f"{where}: with --rationales an exemplar has a column rationale, in words that lead to its label.")
        better = len(made) % 2
        chosen, rejected = (content(text) for text in parsed.completions)
        replies = (chosen, rejected) if better == 0 else (rejected, chosen)
        made.append(Exemplar(parsed.prompt, replies, better, rationale))
    if not made:
        raise DataError(f"{path.name}: no exemplar.")
    return tuple(made)


def digest_exemplars(exemplars: Sequence[Exemplar]) -> str:
    """All that they say, as one text: what labels depend on."""
    return json.dumps([[e.prompt, e.replies, e.better, e.rationale] for e in exemplars], ensure_ascii=False)


def ask_rationale(preamble: str, exemplars: Sequence[Exemplar], prompt: Text, replies: tuple[str, str]) -> list[Message]:
    """The conversation whose next turn is a rationale: step one of two."""
    turns = [turn for exemplar in exemplars for turn in _reasoned(_shown(exemplar.prompt, exemplar.replies), exemplar)]
    return _opened(preamble, [*turns, _user(f"{_shown(prompt, replies)}\n\n{_RATIONALE}")])


def ask_choice(
    preamble: str, exemplars: Sequence[Exemplar], prompt: Text, replies: tuple[str, str], rationale: str | None = None
) -> list[Message]:
    """The conversation whose next turn is "1" or "2"; behind its own rationale, if it wrote one."""
    if rationale is not None:
        asked = ask_rationale(preamble, exemplars, prompt, replies)
        return [*asked, Message(role="assistant", content=rationale), _user(_CHOICE)]
    turns = [
        turn
        for exemplar in exemplars
        for turn in (
            _user(f"{_shown(exemplar.prompt, exemplar.replies)}\n\n{_CHOICE}"),
            Message(role="assistant", content=PLACES[exemplar.better]),
        )
    ]
    return _opened(preamble, [*turns, _user(f"{_shown(prompt, replies)}\n\n{_CHOICE}")])


def ask_score(preamble: str, prompt: Text, reply: str) -> list[Message]:
    """The conversation whose next turn is a number from 1 to 10."""
    return _opened(preamble, [_user(f"{_conversation(prompt)}\n\nReply:\n{reply.strip()}\n\n{_SCORE}")])


def _reasoned(shown: str, exemplar: Exemplar) -> list[Message]:
    return [
        _user(f"{shown}\n\n{_RATIONALE}"), Message(role="assistant", content=exemplar.rationale),
        _user(_CHOICE), Message(role="assistant", content=PLACES[exemplar.better]),
    ]  # fmt: skip


def _opened(preamble: str, turns: Sequence[Message]) -> list[Message]:
    """The preamble stands in the first user turn: not every chat template has a system turn."""
    first, *rest = turns
    return [_user(f"{preamble}\n\n{first['content']}"), *rest]


def _shown(prompt: Text, replies: tuple[str, str]) -> str:
    numbered = (f"Response {place}:\n{reply.strip()}" for place, reply in zip(PLACES, replies, strict=True))
    return "\n\n".join((_conversation(prompt), *numbered))


def _conversation(prompt: Text) -> str:
    """A prompt as it is shown to a labeller: its turns by name, or the text as it is."""
    turns = parse_turns(prompt) if isinstance(prompt, str) and is_dialogue(prompt) else prompt
    if isinstance(turns, str):
        return f"Context:\n{turns.strip()}"
    return "Conversation:\n" + "\n".join(f"{turn['role'].capitalize()}: {turn['content'].strip()}" for turn in turns)


def _user(text: str) -> Message:
    return Message(role="user", content=text)
