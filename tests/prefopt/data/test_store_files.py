from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from prefopt.data.store_files import MANIFEST, code_digest, content_address, new_folder, open_folder
from prefopt.errors import OutputError


def make(folder: Path, text: str = "12345") -> Path:
    with new_folder(folder) as draft:
        (draft.path / "numbers").write_text(text)
        draft.facts = {"rows": 5}
    return folder


def truncate(folder: Path) -> None:
    (folder / "numbers").write_text("123")


def alter(folder: Path) -> None:
    (folder / "numbers").write_text("12346")


def remove(folder: Path) -> None:
    (folder / "numbers").unlink()


def lose_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:20])


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


DAMAGES = {
    truncate: "numbers has 3 bytes, expected 5",
    alter: "numbers has another checksum",
    remove: "numbers: No such file",
    lose_manifest: "manifest.json: No such file",
    cut_manifest: "manifest.json cannot be read",
    empty_manifest: "manifest.json cannot be read",
}


def test_a_finished_folder_gives_back_its_facts(tmp_path: Path) -> None:
    assert open_folder(tmp_path / "a", "numbers") is None
    assert open_folder(make(tmp_path / "a"), "numbers") == {"rows": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_folder_is_a_miss_with_a_message_and_is_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    folder = make(tmp_path / "a")
    damage(folder)
    console = Console(file=io.StringIO(), width=200)
    assert open_folder(folder, "numbers", console) is None
    assert isinstance(console.file, io.StringIO)
    assert f"numbers in the cache are damaged ({DAMAGES[damage]}" in console.file.getvalue()
    assert open_folder(make(folder), "numbers") == {"rows": 5}


def test_without_a_console_damage_is_a_warning(tmp_path: Path) -> None:
    alter(make(tmp_path / "a"))
    with pytest.warns(UserWarning, match="numbers has another checksum"):
        assert open_folder(tmp_path / "a", "numbers") is None


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop() -> None:
        with new_folder(tmp_path / "a") as draft:
            (draft.path / "numbers").write_text("1")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_folder_the_first_stays(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as draft:
        (draft.path / "numbers").write_text("54321")
        make(tmp_path / "a")
    assert (tmp_path / "a" / "numbers").read_text() == "12345"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_damaged_folder_in_the_way_is_never_taken_for_a_finished_one(tmp_path: Path) -> None:
    def race() -> None:
        with new_folder(tmp_path / "a") as draft:
            (draft.path / "numbers").write_text("54321")
            alter(make(tmp_path / "a"))

    with pytest.raises(OutputError, match="cannot be written"):
        race()


def test_a_cache_that_is_a_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(OutputError, match=r"cache.* cannot be written .*PREFOPT_CACHE"):
        make(tmp_path / "cache" / "a")


def test_addresses_depend_on_every_part() -> None:
    parts = [("a", 1), ("a", 2), ("a", None), ("b", 1), ("a1",), (["a", 1],)]
    assert len({content_address(*part) for part in parts}) == len(parts)
    assert content_address({"x": 1, "y": 2}) == content_address({"y": 2, "x": 1})


def test_code_digest_changes_with_the_code(tmp_path: Path) -> None:
    assert code_digest(json) == code_digest(json) != code_digest(os)
