"""A study as an archive: what is in it, that it is whole, and that an anonymous one names nobody."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from prefopt.bundle import CHECKSUMS_FILE, LICENCES_FILE, LOCK_FILE, bundle
from prefopt.compare import compare
from prefopt.errors import OutputError
from prefopt.study import study_of


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundled")
    losses = folder / "people" / "jane" / "mine.py"
    losses.parent.mkdir(parents=True)
    losses.write_text("")
    values = {
        "algorithms": ["dpo"], "seeds": 1, "data": ["control:gridworld"], "segment_length": 4, "pairs": 40, "batch_size": 20,
        "eval_pairs": 20, "checkpoints": 1, "imports": [str(losses)], "save_every": 1,
    }  # fmt: skip
    compare(study_of(values), folder / "study", cache=folder / "cache", workers=0)
    return folder / "study"


def test_an_archive_is_whole_and_holds_no_weights(study: Path, tmp_path: Path) -> None:
    names = bundle(study, tmp_path / "one.zip")
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == [f"one/{name}" for name in names]
        for line in archive.read(f"one/{CHECKSUMS_FILE}").decode().splitlines():
            digest, name = line.split("  ")
            assert hashlib.sha256(archive.read(f"one/{name}")).hexdigest() == digest
        assert archive.read("one/results.json") == (study / "results.json").read_bytes()
        assert "torch==" in archive.read(f"one/{LOCK_FILE}").decode()
        assert "numpy: BSD" in archive.read(f"one/{LICENCES_FILE}").decode()
    assert any(name.startswith("cells/dpo-") and name.endswith("/metrics.jsonl") for name in names)
    assert list(study.glob("cells/*/checkpoint-*/*.safetensors"))
    assert not [name for name in names if name.endswith(".safetensors") or "checkpoint" in name]
    with pytest.raises(OutputError, match="exists"):
        bundle(study, tmp_path / "one.zip")
    with pytest.raises(OutputError, match="folder of a finished comparison"):
        bundle(tmp_path, tmp_path / "three.zip")


def test_an_anonymous_archive_names_no_place(study: Path, tmp_path: Path) -> None:
    bundle(study, tmp_path / "open.zip")
    bundle(study, tmp_path / "blind.zip", anonymous=True)
    secrets = [str(study.parent / "people" / "jane").encode(), str(study.resolve()).encode()]
    found = {}
    for name in ("open", "blind"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            found[name] = b"".join(archive.read(each) for each in archive.namelist())
    assert secrets[0] in found["open"]
    assert not [secret for secret in secrets if secret in found["blind"]]
    assert b"mine.py" in found["blind"]


def test_links_out_of_the_folder_are_left_out(study: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    link = study / "figures" / "leak.json"
    link.symlink_to(outside)
    try:
        assert "figures/leak.json" not in bundle(study, tmp_path / "linked.zip")
    finally:
        link.unlink()
