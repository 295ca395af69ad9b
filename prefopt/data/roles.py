"""Roles of rows: policy, tuning, judge and test, by a hash of each row's key (its first human turn).

A row's role depends on its own key only, so it does not change with the order of the rows or with other rows. The one
exception: rows whose key stands in a test split are removed from the other roles. All of it works on digests of keys
(`prefopt.data.keys`), so records on disk stay there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from prefopt.data.keys import Keys, draw_points
from prefopt.data.record_store import Records
from prefopt.data.records import Record
from prefopt.errors import ConfigError, DataError

Role = Literal["policy", "tuning", "judge", "test"]
ROLES: tuple[Role, ...] = ("policy", "tuning", "judge", "test")


@dataclass(frozen=True)
class Shares:
    """The expected share of keys in each role; they add up to one."""

    policy: float = 0.70
    tuning: float = 0.05
    judge: float = 0.15
    test: float = 0.10

    def __post_init__(self) -> None:
        values = [getattr(self, role) for role in ROLES]
        if not (min(values) >= 0 and abs(sum(values) - 1) <= 1e-9 and self.policy > 0):  # so written, NaN fails too
            given = ", ".join(f"{role} {value:g}" for role, value in zip(ROLES, values, strict=True))
            raise ConfigError(f"shares are {given}; none may be negative, policy must be positive, and they must add up to 1.")


@dataclass(frozen=True)
class RoleReport:
    """What the split found.

    Args:
        rows: records in each role.
        keys: distinct keys in each role.
        official_test_sources: sources whose own test split is used.
        removed: records left out because their key stands in a test split.
        shared_keys: keys found in more than one role, counted over all sources after the split: 0, or it is an error.
        near_duplicates: for each pair of roles ("policy/test"), first turns found in both once case, punctuation and
            spacing are ignored.
    """

    rows: Mapping[str, int]
    keys: Mapping[str, int]
    official_test_sources: tuple[str, ...]
    removed: int
    shared_keys: int
    near_duplicates: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


Rows = TypeVar("Rows", bound=Sequence[Record])


@dataclass(frozen=True)
class Split(Generic[Rows]):
    """Records by role, each in the order in which they were read. Of records on disk they are selections."""

    policy: Rows
    tuning: Rows
    judge: Rows
    test: Rows
    report: RoleReport


def role_of(key: str, shares: Shares, *, official_test: bool) -> Role:
    """The role of a key. `official_test`: the key's source has a test split of its own, so that "test" is not drawn.

    Those keys that would have been test rows are then spread over the other roles by a second hash: all other keys have
    one role whether or not their source has a test split, and sources that share keys agree.
    """
    draws, redraws = (np.array([point], dtype=np.uint64) for point in draw_points(key))
    return ROLES[int(_roles(draws, redraws, np.array([official_test]), shares)[0])]


def _roles(
    draws: NDArray[np.uint64], redraws: NDArray[np.uint64], no_test: NDArray[np.bool_], shares: Shares
) -> NDArray[np.int8]:
    """[n] positions in ROLES. `no_test`: where "test" is not drawn."""
    weights = {role: getattr(shares, role) for role in ROLES}
    roles = _draw(draws, weights)
    again = no_test & (roles == ROLES.index("test"))
    roles[again] = _draw(redraws[again], {role: weight for role, weight in weights.items() if role != "test"})
    return roles


def _draw(points: NDArray[np.uint64], weights: Mapping[Role, float]) -> NDArray[np.int8]:
    rest = points.astype(np.float64) / 2**64 * sum(weights.values())
    # A point that rounding leaves on the upper end goes to the largest role.
    roles = np.full(len(points), ROLES.index(max(weights, key=lambda role: weights[role])), dtype=np.int8)
    free = np.ones(len(points), dtype=bool)
    for role, weight in weights.items():
        rest -= weight
        hit = free & (rest < 0) & (weight > 0)
        roles[hit] = ROLES.index(role)
        free &= ~hit
    return roles


@overload
def split_roles(records: Records, shares: Shares | None = None) -> Split[Records]: ...
@overload
def split_roles(records: Sequence[Record], shares: Shares | None = None) -> Split[Sequence[Record]]: ...
def split_roles(records: Sequence[Record], shares: Shares | None = None) -> Split[Any]:
    """Gives every record its role.

    A source with an official test split has exactly those rows as test rows; the rows of other sources are hashed over
    all four roles. Rows of other roles whose key stands among the test rows are removed and counted.

    Raises:
        DataError: a record without a key, or a key in two roles.
    """
    shares = shares or Shares()
    keys = _keys(records)
    with_test = np.unique(keys.sources[keys.official_test])
    roles = _roles(keys.draws, keys.redraws, np.isin(keys.sources, with_test), shares)
    test = ROLES.index("test")
    roles[keys.official_test] = test
    removed = (roles != test) & np.isin(keys.draws, keys.draws[roles == test])
    positions = {role: np.flatnonzero((roles == i) & ~removed) for i, role in enumerate(ROLES)}
    kept: dict[Role, Sequence[Record]] = {role: _select(records, chosen) for role, chosen in positions.items()}
    report = RoleReport(
        rows={role: len(chosen) for role, chosen in positions.items()},
        keys={role: len(np.unique(keys.draws[chosen])) for role, chosen in positions.items()},
        official_test_sources=tuple(sorted(keys.source_names[i] for i in with_test)),
        removed=int(removed.sum()),
        shared_keys=verify_disjoint(kept),
        near_duplicates=near_duplicates(kept),
    )
    return Split(kept["policy"], kept["tuning"], kept["judge"], kept["test"], report)


def verify_disjoint(roles: Mapping[Role, Sequence[Record]]) -> int:
    """Counts the keys that stand in more than one role, from the records themselves.

    Raises:
        DataError: there are some; the message names rows.
    """
    places = [(role, row) for role, row in roles.items()]
    draws = np.concatenate([_keys(rows).draws for _, rows in places])
    sizes = [len(rows) for _, rows in places]
    owner = np.repeat(np.arange(len(places)), sizes)
    position = np.concatenate([np.arange(size) for size in sizes])
    _, first, key = np.unique(draws, return_index=True, return_inverse=True)
    clash = np.flatnonzero(owner != owner[first][key])
    if len(clash):

        def name(at: int) -> str:
            role, rows = places[owner[at]]
            return f"{rows[int(position[at])].id} ({role})"

        raise DataError(
            f"{len(np.unique(key[clash]))} first turns stand in more than one role, for example "
            f"{name(first[key[clash[0]]])} and {name(clash[0])}."
        )
    return 0


def near_duplicates(roles: Mapping[Role, Sequence[Record]]) -> dict[str, int]:
    """First turns that two roles share when only lower-cased letters and digits count, by pair of roles."""
    forms = {role: np.unique(_keys(rows).forms) for role, rows in roles.items()}
    shared = {
        f"{one}/{other}": np.intersect1d(forms[one], forms[other], assume_unique=True) for one, other in combinations(forms, 2)
    }
    return {pair: int((found != 0).sum()) for pair, found in shared.items()}


def _keys(records: Sequence[Record]) -> Keys:
    return records.keys if isinstance(records, Records) else Keys.of(records)


def _select(records: Sequence[Record], positions: NDArray[np.int64]) -> Sequence[Record]:
    if isinstance(records, Records):
        return records.select(positions)
    return tuple(records[i] for i in positions)
