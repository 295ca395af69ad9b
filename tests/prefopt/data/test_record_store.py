from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.keys import Keys
from prefopt.data.record_store import Part, Records, RecordWriter, open_records
from prefopt.data.records import Labels, Message, Record, Text

said = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
conversations = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), said), min_size=1, max_size=3).map(
    lambda turns: tuple(Message(role=role, content=text) for role, text in turns)
)
numbers = st.floats(allow_nan=False, allow_infinity=False)
labels = st.one_of(
    st.just(Labels()),
    st.booleans().map(lambda desirable: Labels(desirable=desirable)),
    st.tuples(numbers, numbers).map(lambda s: Labels(ranks=(0, 1), soft_label=s[0], margin=s[1], scores=s)),
    st.integers(0, 3).map(lambda number: Labels(ranks=(0, 1), utility_id=number)),
)
contents = st.tuples(st.one_of(said, conversations), st.lists(st.one_of(said, conversations), min_size=1, max_size=3), labels)


def written(
    folder: Path, parts: list[tuple[Part, list[tuple[int, tuple[Text, list[Text], Labels]]]]]
) -> tuple[Records, list[Record]]:
    """A store, and the same records in memory."""
    made = []
    with RecordWriter(folder) as writer:
        for part, rows in parts:
            writer.begin(part)
            for line, (prompt, completions, known) in rows:
                name = f"{part.name}:{line}"
                made.append(
                    Record(name, prompt, tuple(completions), known, f"Key {len(made) % 3}!", part.source, part.official_test)
                )
                writer.add(made[-1], line)
        return open_records(folder, writer.finish()), made


PARTS = (Part("a:1/x.jsonl", "a", False), Part("a/test.jsonl", "a", True), Part("b", "b", False))


def plain(count: int, step: int = 1) -> list[tuple[int, tuple[Text, list[Text], Labels]]]:
    return [(1 + i * step, (f"prompt {i}", [" yes", " no"], Labels(ranks=(0, 1)))) for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(contents, max_size=3), min_size=3, max_size=3), gap=st.integers(1, 4))
def test_records_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[tuple[Text, list[Text], Labels]]], gap: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    parts = [(part, [(1 + i * gap, row) for i, row in enumerate(own)]) for part, own in zip(PARTS, rows, strict=True)]
    stored, made = written(folder, parts)
    assert list(stored) == made
    assert [stored[i] for i in range(-len(made), 0)] == made
    assert dict(stored.prompts) == {record.id: record.prompt for record in made}
    if made:
        one, other = stored.keys, Keys.of(made)
        for name in ("draws", "redraws", "forms", "official_test"):
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert [one.source_names[i] for i in one.sources] == [other.source_names[i] for i in other.sources]


def test_selections_and_slices_are_views_with_contents_of_their_own(tmp_path: Path) -> None:
    stored, made = written(tmp_path, [(PARTS[0], plain(10, step=3))])
    assert list(stored[2:5]) == made[2:5]
    chosen = stored.select([7, 1, 4])
    assert list(chosen) == [made[7], made[1], made[4]]
    assert list(chosen[1:]) == [made[1], made[4]]
    assert len({part.content for part in (stored, stored[2:5], chosen, chosen[1:])}) == 4
    assert stored[2:5].content == stored.select([2, 3, 4]).content
    with pytest.raises(IndexError):
        stored[10]


def test_prompts_are_found_by_id_and_only_those_of_the_selection(tmp_path: Path) -> None:
    stored, made = written(tmp_path, [(PARTS[0], plain(4, step=3)), (PARTS[1], plain(4))])
    prompts = stored.select([6, 1]).prompts
    assert set(prompts) == {made[1].id, made[6].id}
    assert prompts[made[6].id] == made[6].prompt
    for unknown in (made[2].id, f"{PARTS[0].name}:2", f"{PARTS[0].name}:99", "elsewhere:1", f"{PARTS[0].name}:x", ""):
        assert unknown not in prompts


def test_records_outlive_their_folder(tmp_path: Path) -> None:
    stored, made = written(tmp_path, [(PARTS[0], plain(3))])
    for path in tmp_path.iterdir():
        path.unlink()
    assert list(stored) == made


@pytest.mark.parametrize("change", ["text", "label", "id", "order"])
def test_content_changes_with_whatever_tokenising_can_see(tmp_path: Path, change: str) -> None:
    rows = plain(3)
    changed = {
        "text": [*rows[:2], (3, ("prompt 2", [" yes!", " no"], Labels(ranks=(0, 1))))],
        "label": [*rows[:2], (3, ("prompt 2", [" yes", " no"], Labels()))],
        "id": [*rows[:2], (4, rows[2][1])],
        "order": [(1, rows[1][1]), (2, rows[0][1]), rows[2]],
    }
    stores = []
    for own in (rows, rows, changed[change]):
        folder = tmp_path / str(len(stores))
        folder.mkdir()
        stores.append(written(folder, [(PARTS[0], own)])[0])
    assert stores[0].content == stores[1].content != stores[2].content
