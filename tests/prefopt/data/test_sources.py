from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from prefopt.data import sources
from prefopt.data.hh import to_chat
from prefopt.data.rows import Parsed
from prefopt.data.sources import Loaded, load
from prefopt.errors import ConfigError, DataError

GOOD = {"prompt": "p", "chosen": " yes", "rejected": " no"}


def write(path: Path, rows: Sequence[Any]) -> str:
    """Rows as JSON lines; bytes go in as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


def reasons(loaded: Loaded) -> dict[str, tuple[int, tuple[str, ...]]]:
    drops = [drop for source in loaded.report.sources for file in source.files for drop in file.dropped]
    return {drop.reason: (drop.count, drop.examples) for drop in drops}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_a_file_is_read_with_line_numbers_and_blank_lines(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "set" / name, [b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b" ", {**GOOD, "prompt": "é"}])
    loaded = load([source])
    assert [record.id for record in loaded.records] == [f"set/{name}:1", f"set/{name}:3"]
    assert [record.prompt for record in loaded.records] == ["p", "é"]
    assert loaded.report.sources[0].files[0].rows == 2


@pytest.mark.fault(16, 17, 19, 22)
def test_every_kind_of_bad_row_is_dropped_counted_and_named(tmp_path: Path) -> None:
    rows = [
        GOOD,
        b"\xff\xfe{}",
        b"{broken",
        b"[1]",
        b"[" * 100_000,
        b'{"prompt": NaN}',
        {**GOOD, "chosen": ""},
        {"prompt": "p"},
    ]
    rows += [{**GOOD, "rejected": " yes"}, {**GOOD, "prompt": "\ud800"}, {**GOOD, "chosen": None}, {**GOOD, "prompt": 7}]
    source = write(tmp_path / "set" / "a.jsonl", rows)
    assert reasons(load([source])) == {
        "not UTF-8": (1, ("set/a.jsonl:2",)),
        "broken JSON": (3, ("set/a.jsonl:3", "set/a.jsonl:5", "set/a.jsonl:6")),
        "not a JSON object": (1, ("set/a.jsonl:4",)),
        "empty completion": (1, ("set/a.jsonl:7",)),
        "missing column chosen": (1, ("set/a.jsonl:8",)),
        "identical completions": (1, ("set/a.jsonl:9",)),
        "prompt has a lone surrogate": (1, ("set/a.jsonl:10",)),
        "chosen is None": (1, ("set/a.jsonl:11",)),
        "prompt has the wrong type": (1, ("set/a.jsonl:12",)),
    }


@pytest.mark.fault(16)
def test_on_bad_row_error_stops_at_the_row(tmp_path: Path) -> None:
    source = write(tmp_path / "set" / "a.jsonl", [GOOD, {**GOOD, "chosen": ""}])
    with pytest.raises(DataError, match=r"^set/a\.jsonl:2: empty completion"):
        load([source], on_bad_row="error")


_TEXT = st.one_of(st.none(), st.integers(), st.booleans(), st.text(max_size=6), st.lists(st.text(max_size=2), max_size=2))
_ROW = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "margin", "soft_label"), _TEXT)),
    st.fixed_dictionaries({"prompt": st.text(max_size=6), "chosen": _TEXT, "rejected": st.text(max_size=6)}),
    st.lists(st.integers(), max_size=2),
    st.binary(max_size=12).filter(lambda raw: b"\n" not in raw and b"\r" not in raw and raw.strip() != b""),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(_ROW, max_size=8))
@pytest.mark.fault(22)
def test_whatever_the_rows_every_row_is_kept_or_counted(rows: list[Any]) -> None:
    """Rows are drawn at random; the only way not to be counted is a format mixed into another, which is an error."""
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder, "set", "a.jsonl"), [GOOD, *rows])
        mixed, loaded = "", None
        try:
            loaded = load([source])
        except DataError as error:
            mixed = str(error)
    if loaded is None:
        assert "use one format per file" in mixed
        return
    [file] = loaded.report.sources[0].files
    assert file.rows == 1 + len(rows)
    assert file.kept == len(loaded.records) >= 1
    assert file.rows == file.kept + sum(drop.count for drop in file.dropped)
    for record in loaded.records:
        assert len({str(text).strip() for text in record.completions}) == 2
        assert record.key.encode()


@pytest.mark.fault(21)
def test_mixed_formats_stop_with_the_row_whatever_on_bad_row_says(tmp_path: Path) -> None:
    chat = [{"role": "assistant", "content": "x"}]
    source = write(tmp_path / "set" / "a.jsonl", [GOOD, GOOD, {"prompt": "p", "chosen": chat, "rejected": chat}])
    with pytest.raises(DataError, match=r"set/a\.jsonl:3: prompt is text, chosen is conversational"):
        load([source])


@pytest.mark.fault(20, 22)
def test_a_source_without_a_usable_row_shows_the_counts(tmp_path: Path) -> None:
    source = write(tmp_path / "set" / "a.jsonl", [{"question": "q"}, {"question": "r"}])
    with pytest.raises(
        DataError, match=r"2 x wrong columns: found question; expected one of: prompt, chosen, rejected;.*a.jsonl:1"
    ):
        load([source])
    with pytest.raises(DataError, match="1 x empty file"):
        load([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(DataError, match="the file is empty"):
        load([write(tmp_path / "empty.jsonl", [])], on_bad_row="error")


@pytest.mark.fault(22)
def test_damaged_files_are_named(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz:1: the compressed file is damaged"):
        load([str(cut)])
    with pytest.raises(DataError, match="a JSON array"):
        load([write(tmp_path / "array.json", [[GOOD]])])
    with pytest.raises(DataError, match="expected a file that ends in"):
        load([write(tmp_path / "a.csv", [])])
    with pytest.raises(DataError, match="no such file"):
        load([str(tmp_path / "nothing.jsonl")])


def test_a_folder_is_read_recursively_and_test_files_are_the_official_split(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl.gz", "deep/other.jsonl", ".cache/x.jsonl"):
        write(tmp_path / "hh" / name, [GOOD])
    (tmp_path / "hh" / "notes.txt").write_text("not data")
    loaded = load([str(tmp_path / "hh")])
    assert {record.id: record.official_test for record in loaded.records} == {
        "hh/test.jsonl.gz:1": True,
        "hh/train.jsonl:1": False,
        "deep/other.jsonl:1": False,
    }
    assert {record.source for record in loaded.records} == {"hh"}


@pytest.mark.fault(14)
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl", [GOOD])
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "set" / "a.jsonl")
    assert len(load([str(tmp_path / "set")]).records) == 1
    write(tmp_path / "outside.jsonl", [GOOD])
    (tmp_path / "set" / "c.jsonl").symlink_to(tmp_path / "outside.jsonl")
    with pytest.raises(DataError, match="a link that leaves the folder"):
        load([str(tmp_path / "set")])


@pytest.mark.fault(14)
def test_a_linked_folder_that_leaves_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set" / "a.jsonl", [GOOD])
    write(tmp_path / "outside" / "b.jsonl", [GOOD])
    (tmp_path / "set" / "more").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="a link that leaves the folder"):
        load([str(tmp_path / "set")])


@pytest.mark.fault(22)
def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder without"):
        load([str(tmp_path)])


def test_names_stay_unique_over_sources_and_no_file_is_read_twice(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name / "set" / "a.jsonl", [GOOD]) for name in ("one", "two"))
    loaded = load([str(Path(one).parent), str(Path(two).parent)])
    assert [record.id for record in loaded.records] == ["one/set/a.jsonl:1", "two/set/a.jsonl:1"]
    assert [record.source for record in loaded.records] == ["one/set", "two/set"]
    with pytest.raises(ConfigError, match="read through two sources"):
        load([one, str(Path(one).parent)])
    with pytest.raises(ConfigError, match="named twice"):
        load([one, one])


def test_limit_counts_records_of_each_file(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / "set" / name, [{**GOOD, "chosen": ""}, *([GOOD] * 5)])
    loaded = load([str(tmp_path / "set")], limit=2)
    assert [file.kept for file in loaded.report.sources[0].files] == [2, 2]


def test_options_out_of_range_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ConfigError, match="at least 1"):
        load([source], limit=0)
    with pytest.raises(ConfigError, match="'drop' or 'error'"):
        load([source], on_bad_row="skip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no data source"):
        load([])


@pytest.mark.fault(25)
def test_duplicates_and_contradictions_are_counted_and_kept(tmp_path: Path) -> None:
    other_way = {"prompt": "p", "chosen": " no", "rejected": " yes"}
    loaded = load([write(tmp_path / "a.jsonl", [GOOD, GOOD, other_way, {**GOOD, "prompt": "q"}])])
    assert (len(loaded.records), loaded.report.duplicates, loaded.report.contradictions) == (4, 1, 1)
    labelled = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False, True)]
    loaded = load([write(tmp_path / "b.jsonl", labelled)])
    assert (loaded.report.duplicates, loaded.report.contradictions) == (1, 1)


def test_as_chat_turns_text_into_conversations_with_the_same_keys(tmp_path: Path) -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    source = write(tmp_path / "a.jsonl", [{"chosen": prompt + " a", "rejected": prompt + " b"}])
    [text], [chat] = load([source]).records, load([source], as_chat=True).records
    assert chat.prompt == to_chat(Parsed(text.prompt, text.completions)).prompt == ({"role": "user", "content": "Hi"},)
    assert text.key == chat.key == "Hi"


def test_columns_that_nothing_reads_and_labels_are_reported(tmp_path: Path) -> None:
    loaded = load([write(tmp_path / "a.jsonl", [{**GOOD, "margins": 1, "soft_label": 0.7}])])
    assert loaded.report.sources[0].files[0].ignored_columns == ("margins",)
    assert loaded.report.labels == {"soft_label": 1}
    assert loaded.report.kinds == {"pair": 1}


def test_length_baseline_counts_ties_as_half(tmp_path: Path) -> None:
    sides = [("aaa", "b"), ("a", "bbb"), ("a", "bb"), ("a", "b")]
    loaded = load([write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": c, "rejected": r} for c, r in sides])])
    baseline = loaded.report.sources[0].length_baseline
    assert baseline is not None
    assert (baseline.longer, baseline.shorter, baseline.ties, baseline.longer_wins) == (1, 2, 1, 0.375)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose lines were read: a hit in the cache reads none."""
    seen: list[str] = []
    original = sources.read_lines

    def counted(path: Path, name: str) -> Any:
        seen.append(path.name)
        return original(path, name)

    monkeypatch.setattr(sources, "read_lines", counted)
    return seen


def test_files_of_equal_bytes_are_read_once_and_reported_every_time(tmp_path: Path, reads: list[str]) -> None:
    rows = [GOOD, {**GOOD, "chosen": ""}, {**GOOD, "prompt": "q", "soft_label": 0.7, "note": 1}]
    source = write(tmp_path / "set" / "test.jsonl", rows)
    first, second = (load([source], cache=tmp_path / "cache") for _ in range(2))
    assert reads == ["test.jsonl"]
    assert first.report == second.report == load([source]).report
    assert list(first.records) == list(second.records) == list(load([source]).records)


@pytest.mark.parametrize("change", ["bytes", "name", "chat", "limit", "on_bad_row", "another"])
def test_whatever_decides_what_is_read_is_read_anew(tmp_path: Path, reads: list[str], change: str) -> None:
    source, options, cache = write(tmp_path / "a.jsonl", [GOOD]), {}, tmp_path / "cache"
    load([source], cache=cache)
    given = [source]
    if change == "bytes":
        write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "prompt": "q"}])
    elif change == "name":
        given = [write(tmp_path / "test.jsonl", [GOOD])]
    elif change == "another":
        given = [source, write(tmp_path / "b.jsonl", [GOOD])]
    else:
        options = {"chat": {"as_chat": True}, "limit": {"limit": 1}, "on_bad_row": {"on_bad_row": "error"}}[change]
    expected = load(given, **options)
    reads.clear()
    found = load(given, **options, cache=cache)
    assert len(reads) == len(given)
    assert (list(found.records), found.report) == (list(expected.records), expected.report)


def test_damaged_records_are_read_again_with_a_message(tmp_path: Path, reads: list[str]) -> None:
    source, console = write(tmp_path / "a.jsonl", [GOOD] * 9), Console(file=io.StringIO(), width=200)
    expected = list(load([source], cache=tmp_path / "cache").records)
    [path] = (tmp_path / "cache" / "records").glob("*/records.jsonl")
    path.write_bytes(path.read_bytes()[:-5])
    assert list(load([source], cache=tmp_path / "cache", console=console).records) == expected
    assert len(reads) == 2
    assert isinstance(console.file, io.StringIO)
    assert "records in the cache are damaged (records.jsonl has" in console.file.getvalue()


def test_a_file_that_cannot_be_used_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="no usable row"):
            load([write(tmp_path / "a.jsonl", [{**GOOD, "chosen": ""}])], cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "records").iterdir())
