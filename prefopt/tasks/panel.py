"""The panel of judges of a text comparison: of several kinds, each with a record of its own on held-out pairs (rule 7)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefopt.data.record_store import Records
from prefopt.errors import ConfigError, DataError
from prefopt.judges import PairJudge, from_scorer
from prefopt.judges.build import NamedJudge
from prefopt.judges.lengths import LENGTHS
from prefopt.judges.record import judge_record, labelled_pairs
from prefopt.report.schema import Judge
from prefopt.rewards import RewardModelScorer
from prefopt.stages import Stage

TFIDF = "tfidf"


@dataclass(frozen=True)
class Panel:
    """All judges of one comparison.

    Args:
        members: reward models trained on the judge rows, by name.
        judges: every judge by name, these among them.
        records: of the judges that are none of `members`.
        notes: what is missing, and why.
    """

    members: Mapping[str, tuple[RewardModelScorer, Stage]]
    judges: Mapping[str, PairJudge]
    records: tuple[Judge, ...] = ()
    notes: tuple[str, ...] = ()


def build_panel(
    members: Mapping[str, tuple[RewardModelScorer, Stage]],
    more: Mapping[str, NamedJudge],
    judge_rows: Records,
    test_rows: Records,
    fitted_on: int,
) -> Panel:
    """Reward models, a second opinion of another kind, and the judges that users name.

    Args:
        members: reward models on the judge rows.
        more: as `--judges` names them.
        judge_rows: the TF-IDF judge learns from them.
        test_rows: all judges are measured on them.
        fitted_on: how many judge rows there are.
    """
    from prefopt.judges.tfidf import TfidfJudge

    judges: dict[str, PairJudge] = {name: from_scorer(scorer, log_odds=True) for name, (scorer, _) in members.items()}
    described: dict[str, str] = {}
    notes: list[str] = []
    try:
        judges[TFIDF] = from_scorer(TfidfJudge(labelled_pairs(judge_rows)), log_odds=True)
        described[TFIDF] = f"TF-IDF Bradley-Terry of completions alone, {fitted_on} judge rows"
    except (ConfigError, DataError) as error:
        notes.append(f"No TF-IDF judge: {error}")
    for name, named in more.items():
        judges[name], described[name] = named.judge, named.note
    held_out = labelled_pairs(test_rows)
    records = tuple(judge_record(name, judges[name], held_out, LENGTHS["words"], note) for name, note in described.items())
    return Panel(members, judges, records, tuple(notes))
