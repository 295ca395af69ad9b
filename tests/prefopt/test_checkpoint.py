"""Checkpoints: whole or absent, verified when read, and equal to what was written."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefopt import checkpoint
from prefopt.errors import OutputError

FILES = ("state.safetensors", "state.json", "manifest.json")


def tree_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((3, 2), float(step))}


def saved(folder: Path, *steps: int, keep: int = 5) -> list[Path]:
    return [checkpoint.save(folder, step, tree_of(step), keep=keep) for step in steps]


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.list_checkpoints(folder)]


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    elif isinstance(one, float) and math.isnan(one):
        assert math.isnan(other)
    else:
        assert one == other


def test_every_type_of_a_tree_comes_back(tmp_path: Path) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    shared = torch.arange(6.0)
    tree = {
        "tensors": [torch.tensor([[1, 0], [0, 1]]).to(dtype) for dtype in dtypes],
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.5),
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "same memory": [shared, shared[2:], shared],
        "a/b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "plain": {
            "none": None,
            "yes": True,
            "int": 2**63 - 1,
            "float": 0.1,
            "nan": math.nan,
            "inf": -math.inf,
            "text": "Größe\n\0",
        },
        "nested": [[], {}, [{"deep": [torch.tensor([1.0])]}]],
    }
    path = checkpoint.save(tmp_path, 7, tree)
    step, back = checkpoint.load(path)
    assert step == 7
    assert_same(back, tree)


def test_tuples_come_back_as_lists_and_other_types_are_refused(tmp_path: Path) -> None:
    assert checkpoint.load(checkpoint.save(tmp_path, 1, {"pair": (1, 2)}))[1] == {"pair": [1, 2]}
    with pytest.raises(TypeError, match=r"cannot hold a set \(at /inner/0\)"):
        checkpoint.save(tmp_path, 2, {"inner": [{1, 2}]})
    assert names(tmp_path) == ["checkpoint-1"]


@pytest.mark.fault(12)
def test_nothing_is_pickled(tmp_path: Path) -> None:
    """Three files: a safetensors file (a JSON header behind its length) and two of JSON."""
    (path,) = saved(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    raw = (path / "state.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert [entry["dtype"] for name, entry in header.items() if name != "__metadata__"] == ["F32"]
    for name in FILES[1:]:
        json.loads((path / name).read_text())


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    saved(tmp_path, 8, 9, 10, 11, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    (tmp_path / "checkpoint-best").mkdir()
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found is not None
    assert_same(found[1], tree_of(11))


def test_no_checkpoint_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "absent", pytest.fail) is None


def fail_on_call(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    calls = 0

    def crash(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, "No space left on device")
        return function(*args, **kwargs)

    return crash


@pytest.mark.parametrize(("name", "call"), [("replace", 1), ("fsync", 1), ("fsync", 2), ("fsync", 3), ("fsync", 4)])
@pytest.mark.fault(5)
def test_a_full_disk_leaves_the_earlier_checkpoint(
    name: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the last system call was, the message says what to do and the earlier checkpoint loads."""
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail_on_call(getattr(os, name), call))
        with pytest.raises(OutputError, match=r"could not write .*checkpoint-2.*No space left.*Earlier checkpoints are intact"):
            saved(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    assert not list(tmp_path.glob(".tmp-*"))
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found is not None
    assert_same(found[1], tree_of(1))


@pytest.mark.fault(1)
def test_writing_a_step_again_never_leaves_the_folder_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while the only checkpoint is being replaced leaves the old one or the new one."""
    saved(tmp_path, 1)
    replace = os.replace
    for call in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail_on_call(replace, call))
            try:
                checkpoint.save(tmp_path, 1, {"step": 1, "weights": torch.full((3, 2), 1.0)}, keep=1)
            except OutputError as error:
                assert "No space left" in str(error)  # noqa: PT017  later calls do not happen: then nothing is raised
        found = checkpoint.load_latest(tmp_path, pytest.fail)
        assert found is not None
        assert_same(found[1], tree_of(1))
    checkpoint.save(tmp_path, 1, tree_of(5), keep=1)
    assert_same(checkpoint.load(tmp_path / "checkpoint-1")[1], tree_of(5))


@pytest.mark.fault(5)
def test_a_writer_of_tensors_that_fails_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an exception of its own for a full disk; here it is asked to write where no folder is."""
    saved(tmp_path, 1)
    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda tensors, path: save_file(tensors, path.parent / "absent" / path.name))
    with pytest.raises(OutputError, match="could not write"):
        saved(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.fault(1)
def test_a_killed_writer_leaves_only_what_is_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt stands for SIGKILL: no handler of ours runs for it."""
    saved(tmp_path, 1)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            saved(tmp_path, 2)
    assert list(tmp_path.glob(".tmp-*"))
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found is not None
    assert found[0] == 1
    assert not list(tmp_path.glob(".tmp-*"))


def damage_flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_remove])
@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.fault(6, 7)
def test_damage_is_found_and_the_one_before_it_is_used(damage: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    damage(tmp_path / "checkpoint-2" / name)
    said: list[str] = []
    found = checkpoint.load_latest(tmp_path, said.append)
    assert found is not None
    assert found[0] == 1
    assert_same(found[1], tree_of(1))
    assert len(said) == 1
    assert "checkpoint-2" in said[0]
    assert "Falling back to the checkpoint before it" in said[0]


@pytest.mark.parametrize("contents", [{}, {"manifest.json": ""}, {"manifest.json": "{}"}, {"manifest.json": "[1"}])
@pytest.mark.fault(7)
def test_a_folder_that_is_no_checkpoint_is_passed_over(contents: dict[str, str], tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    for name, text in contents.items():
        (tmp_path / "checkpoint-2" / name).write_text(text)
    said: list[str] = []
    found = checkpoint.load_latest(tmp_path, said.append)
    assert found is not None
    assert found[0] == 1
    assert len(said) == 1
    assert "checkpoint-2" in said[0]


@pytest.mark.fault(6)
def test_safetensors_alone_would_load_the_flipped_byte(tmp_path: Path) -> None:
    """Why there are checksums."""
    (path,) = saved(tmp_path, 1)
    raw = bytearray((path / "state.safetensors").read_bytes())
    raw[-3] ^= 1
    (path / "state.safetensors").write_bytes(raw)
    assert not checkpoint.load_file(path / "state.safetensors")["0/weights"].eq(1).all()
    with pytest.raises(OutputError, match=r"state\.safetensors is damaged"):
        checkpoint.load(path)


@pytest.mark.fault(6, 7)
def test_any_flipped_bit_of_the_manifest_is_found_or_harmless(tmp_path: Path) -> None:
    """Every byte, one bit: the loader refuses, or gives exactly what was written; no other exception comes out."""
    (path,) = saved(tmp_path, 1)
    good = (path / "manifest.json").read_bytes()
    refused = 0
    for position in range(len(good)):
        raw = bytearray(good)
        raw[position] ^= 1 << (position % 7)
        (path / "manifest.json").write_bytes(raw)
        try:
            assert_same(checkpoint.load(path)[1], tree_of(1))
        except OutputError:
            refused += 1
    assert refused > 0.8 * len(good)


@pytest.mark.fault(6, 7)
def test_damaged_checkpoints_do_not_drive_out_the_last_good_one(tmp_path: Path) -> None:
    """Ten and later are damaged after they were written: by number alone, saving 40 would leave 30 and 40."""
    saved(tmp_path, 0, 10, 20, 30, keep=2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30"]
    damage_flip(tmp_path / "checkpoint-30" / "state.safetensors")
    saved(tmp_path, 40, keep=2)
    assert names(tmp_path) == ["checkpoint-20", "checkpoint-30", "checkpoint-40"]
    damage_truncate(tmp_path / "checkpoint-40" / "state.json")
    found = checkpoint.load_latest(tmp_path, lambda _: None)
    assert found is not None
    assert found[0] == 20
    saved(tmp_path, 50, 60, keep=2)
    assert names(tmp_path) == ["checkpoint-50", "checkpoint-60"]


@pytest.mark.fault(1)
def test_a_writer_killed_while_it_replaces_a_step_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    replace, calls = os.replace, iter(range(9))

    def killed(*paths: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 1, tree_of(2))
    assert names(tmp_path) == []
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found is not None
    assert_same(found[1], tree_of(1))


@pytest.mark.fault(5)
def test_space_is_looked_at_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=28))  # 24 bytes of tensors ask for 28.8
    with pytest.raises(OutputError, match=r"could not write .*checkpoint-2.*No space left.*Earlier checkpoints are intact"):
        saved(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=29))
    saved(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.fault(7)
def test_when_no_checkpoint_verifies_the_run_stops(tmp_path: Path) -> None:
    """Starting silently from step 0 would overwrite what can perhaps be saved."""
    for path in saved(tmp_path, 1, 2):
        damage_flip(path / "state.json")
    said: list[str] = []
    with pytest.raises(OutputError, match=r"no checkpoint in .* can be used.*checkpoint-2.*checkpoint-1"):
        checkpoint.load_latest(tmp_path, said.append)
    assert len(said) == 2


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "inner/state.json"])
@pytest.mark.fault(14)
def test_a_manifest_cannot_name_files_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    (path,) = saved(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: manifest["files"]["state.json"]}))
    with pytest.raises(OutputError, match="names a file outside its folder"):
        checkpoint.load(path)


def test_a_manifest_must_vouch_for_both_files(tmp_path: Path) -> None:
    """Without its entry a damaged file would be read unchecked."""
    for name in FILES[:2]:
        (path,) = saved(tmp_path, 1)
        rewrite_manifest(path, lambda manifest, name=name: manifest["files"].pop(name))
        with pytest.raises(OutputError, match=name):
            checkpoint.load(path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    rewrite_manifest(path, lambda manifest: manifest.update(version=checkpoint.FORMAT_VERSION + 1))
    with pytest.raises(
        OutputError, match=rf"format version {checkpoint.FORMAT_VERSION + 1}.*reads {checkpoint.FORMAT_VERSION}"
    ):
        checkpoint.load(path)


def draws() -> list[Any]:
    gauss = random.gauss(0, 1)
    return [gauss, random.random(), np.random.standard_normal(3).tolist(), np.random.rand(), torch.randn(4).tolist()]


@pytest.mark.parametrize("before", [0, 1])
def test_generators_go_on_where_they_were(before: int, tmp_path: Path) -> None:
    """Python, NumPy and torch; `before`=1 leaves half of a pair of normal deviates in Python's and NumPy's hands."""
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    for _ in range(before):
        random.gauss(0, 1)
        np.random.standard_normal(1)
    path = checkpoint.save(tmp_path, 1, checkpoint.generator_state())
    expected = draws()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    assert draws() != expected
    checkpoint.load_generator_state(checkpoint.load(path)[1])
    assert draws() == expected


def test_the_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    """Three AdamW steps, saved, restored into a fresh optimizer, two more: equal to five in one go."""

    def make() -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
        parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        groups = [
            {"params": parameters[:1], "lr_scale": 1.0},
            {"params": parameters[1:], "lr_scale": 10.0, "weight_decay": 0.1},
        ]
        return parameters, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.AdamW, numbers: range) -> None:
        for number in numbers:
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, float(number) - 2.2)
            optimizer.step()

    whole, whole_optimizer = make()
    steps(whole, whole_optimizer, range(5))
    first, first_optimizer = make()
    steps(first, first_optimizer, range(3))
    tree = {"optimizer": checkpoint.optimizer_state(first_optimizer), "weights": [p.detach() for p in first]}
    _, back = checkpoint.load(checkpoint.save(tmp_path, 3, tree))
    second, second_optimizer = make()
    with torch.no_grad():
        for parameter, value in zip(second, back["weights"], strict=True):
            parameter.copy_(value)
    checkpoint.load_optimizer_state(second_optimizer, back["optimizer"])
    assert [group["lr_scale"] for group in second_optimizer.param_groups] == [1.0, 10.0]
    steps(second, second_optimizer, range(3, 5))
    for one, other in zip(second, whole, strict=True):
        assert torch.equal(one, other)
