"""The feedback loop: rounds end to end, nothing lost and nothing asked twice after a kill -9, people's votes, and the page."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt import algorithms, iterate
from prefopt.data.exact_world import WorldConfig
from prefopt.data.sources import load
from prefopt.errors import ConfigError, DataError, OutputError, TrainingError
from prefopt.iterate import LoopOptions, Outcome
from prefopt.iterate.folder import claimed
from prefopt.iterate.labels import Label, LabelBook, agreement, check_label_model
from prefopt.iterate.rows import make_examples
from prefopt.iterate.samples import Origin, Row, choose_prompts, read_rows, write_rows
from prefopt.iterate.votes import import_votes, votes_on_left, write_page
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, Options, RewardOptions, SupervisedOptions
from prefopt.runlog import read_lines
from prefopt.streams import Budget
from prefopt.tasks import exact


@contextmanager
def small_world() -> Iterator[None]:
    """The exact task with 4 prompts of 40 completions and a start trained for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WorldConfig", lambda seed: WorldConfig.tabular(seed))
        patch.setattr(exact, "START_SAMPLES", 512)
        patch.setattr(exact, "START_BUDGET", Budget(batch_size=64, epochs=2.0, micro_batch_tokens=1 << 20))
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    with small_world():
        yield
    torch.set_num_threads(threads)


def options(reward: str = "true", **data: Any) -> Options:
    return Options(
        data=DataOptions(pairs=32, **data),
        supervised=SupervisedOptions(reward_batch_size=16, reward_learning_rate=1e-3),
        reward=RewardOptions(reward=reward),
        budget=Budget(batch_size=8, max_steps=3),
        optimization=Optimization(learning_rate=1e-3),
        logging=Logging(log_every=1, save_every=1),
        evaluation=EvaluationOptions(),
    )


def run(
    folder: Path, cache: Path, update: str = "dpo", *, given: Options | None = None, hyper: Any = None, **more: Any
) -> Outcome:
    run_options = {name: more.pop(name) for name in ("votes", "resume", "overwrite") if name in more}
    loop = LoopOptions(**{"rounds": 2, "round_prompts": 12, **more})
    setting = algorithms.get(update).setting(**(hyper or {}))
    return iterate.iterate(setting, given or options(), loop, folder, cache=cache, **run_options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def content(folder: Path) -> dict[str, Any]:
    """All that a loop leaves behind, timings left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if path.name == "round.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("time/")}
        elif path.name == "metrics.jsonl":
            found[name] = read_lines(path.parent)
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of DPO on labels of the hidden reward, uninterrupted."""
    folder = tmp_path_factory.mktemp("loops") / "whole"
    with small_world():
        outcome = run(folder, shared_cache)
    assert outcome.page is None
    return folder


def test_every_round_leaves_its_data_and_says_where_it_came_from(whole: Path) -> None:
    start, summary = (json.loads((whole / name).read_text()) for name in ("start.json", "summary.json"))
    before = start["policy"]
    assert start["metrics"]["kl"] == pytest.approx(0, abs=1e-9)
    for number in (1, 2):
        folder = whole / f"round-{number:02d}"
        samples, labels, facts = (
            lines(folder / "samples.jsonl"),
            lines(folder / "labels.jsonl"),
            json.loads((folder / "round.json").read_text()),
        )
        assert (
            [row["id"] for row in samples] == [label["id"] for label in labels] == [f"{folder.name}:{i + 1}" for i in range(12)]
        )
        assert {row["sampling"]["policy"] for row in samples} == {before} == {facts["sampling"]["policy"]}
        assert {row["sampling"]["temperature"] for row in samples} == {1.0}
        assert all(len({text.strip() for text in row["completions"]}) == 2 for row in samples)
        assert facts["labeller"] == {"name": "the task's own reward", "labels": "bt", "temperature": 1.0}
        assert facts["counts"]["labels"] == 12
        assert facts["counts"]["labels_so_far"] == 12 * number
        assert facts["metrics"]["kl"] > 0
        assert facts["metrics"]["samples/true"] == pytest.approx(facts["metrics"]["samples/score"])
        assert (folder / "policy" / "model.safetensors").exists()
        before = facts["policy_after"]
    assert [facts["round"] for facts in summary["rounds"]] == [1, 2]
    assert summary["rounds"][0]["metrics"]["labels/agree_before"] == 0.5  # policy = reference
    # Scores are the hidden rewards, so an order's agreement with them can be counted by hand.
    right = [
        (label["scores"][0] > label["scores"][1]) == (label["ranks"] == [0, 1])
        for label in lines(whole / "round-01" / "labels.jsonl")
    ]
    assert summary["rounds"][0]["metrics"]["labels/agree_true"] == pytest.approx(sum(right) / 12)
    assert (whole / "rounds.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_data_that_prefopt_loads(whole: Path) -> None:
    path = whole / "round-02" / "rows.jsonl"
    loaded = load((str(path),))
    rows = {row["id"]: row for row in lines(whole / "round-02" / "samples.jsonl")}
    kept = [row for row in lines(path) if row["chosen"].strip() and row["rejected"].strip()]
    assert [record.completions for record in loaded.records] == [(row["chosen"], row["rejected"]) for row in kept]
    for row in kept:
        assert {row["chosen"], row["rejected"]} == set(rows[row["id"]]["completions"])


def test_a_finished_loop_is_not_run_again_and_goes_on_with_more_rounds(whole: Path, shared_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    run(folder, shared_cache, resume=True)
    assert content(folder) == content(whole)
    with pytest.raises(OutputError, match="--resume goes on with it, --overwrite deletes it"):
        run(folder, shared_cache)
    with pytest.raises(OutputError, match=r"other options \(loop.temperature\)"):
        run(folder, shared_cache, resume=True, temperature=0.5)
    with pytest.raises(OutputError, match="holds no loop"):
        run(tmp_path, shared_cache, overwrite=True)
    outcome = run(folder, shared_cache, resume=True, rounds=3)
    assert [facts["round"] for facts in outcome.rounds] == [1, 2, 3]
    assert outcome.rounds[2]["sampling"]["policy"] == outcome.rounds[1]["policy_after"]
    assert [path.name for path in (folder / "round-01" / "training").iterdir()] == ["metrics.jsonl"]  # no checkpoint is needed


@pytest.mark.parametrize("cut", ["labels", "policy", pytest.param("training", marks=pytest.mark.slow)])
@pytest.mark.fault(2)
def test_what_a_crash_left_out_is_made_up_bit_by_bit(whole: Path, shared_cache: Path, tmp_path: Path, cut: str) -> None:
    """As if the process had ended in the middle of round 2: what is made again equals what was there."""
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    last = folder / "round-02"
    (last / "round.json").unlink()
    # Round 2 has taken away the checkpoint that it started from.
    run(tmp_path / "one", shared_cache, rounds=1)
    shutil.copytree(tmp_path / "one" / "round-01" / "training", folder / "round-01" / "training", dirs_exist_ok=True)
    if cut == "labels":
        text = (last / "labels.jsonl").read_text().splitlines(keepends=True)
        (last / "labels.jsonl").write_text("".join(text[:5]) + text[5][:-9])  # the sixth was cut short
        shutil.rmtree(last / "training")
    if cut != "policy":
        shutil.rmtree(last / "policy")
    run(folder, shared_cache, resume=True)
    assert content(folder) == content(whole)


LOGGED = """
import os, time
def score(prompts, completions):
    with open(os.environ["CALLS"], "a") as file:
        file.write("|".join([prompts[0], *completions]) + "\\n")
    time.sleep(float(os.environ.get("SLEEP", "0")))
    return [len(text) + 0.1 * text.count("a") for text in completions]
"""
KILLED = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_iterate as t
    with t.small_world():
        t.run(Path({folder!r}), Path({cache!r}), given=t.options({reward!r}), resume=True)
"""


@pytest.mark.slow
def test_kill_9_while_labelling_neither_loses_nor_repeats_a_label(
    shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of another process in round 2; this process goes on. Only the row that was being asked may be asked again."""
    judge = tmp_path / "judge.py"
    judge.write_text(LOGGED)
    given = options(f"{judge}:score")
    monkeypatch.setenv("CALLS", str(tmp_path / "whole.log"))
    run(tmp_path / "whole", shared_cache, given=given)
    asked = (tmp_path / "whole.log").read_text().splitlines()
    assert len(asked) == 24

    folder, log = tmp_path / "cut", tmp_path / "cut.log"
    code = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), folder=str(folder), cache=str(shared_cache), reward=f"{judge}:score"
    )
    environment = {**os.environ, "CALLS": str(log), "SLEEP": "0.1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    deadline, labels = time.monotonic() + 120, folder / "round-02" / "labels.jsonl"
    while not labels.exists() or labels.read_bytes().count(b"\n") < 4:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = labels.read_bytes().count(b"\n")
    assert 4 <= kept < 12
    before = log.read_text().splitlines()
    assert len(before) in (12 + kept, 12 + kept + 1)

    monkeypatch.setenv("CALLS", str(log))
    run(folder, shared_cache, given=given, resume=True)
    after = log.read_text().splitlines()[len(before) :]
    assert after == asked[12 + kept :]  # from the first row without a label on
    assert [label["id"] for label in lines(labels)] == [f"round-02:{i + 1}" for i in range(12)]
    assert content(folder) == content(tmp_path / "whole")


def test_a_reward_that_fails_names_the_prompt_and_the_loop_goes_on_once_it_is_mended(
    shared_cache: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "fails.py"
    judge.write_text(
        "from pathlib import Path\nasked = []\ndef score(prompts, completions):\n    asked.append(prompts)\n"
        f"    if len(asked) > 5 and not Path({str(tmp_path / 'mended')!r}).exists():\n        raise ValueError('no answer')\n"
        "    return [len(text) for text in completions]\n"
    )
    given = options(f"{judge}:score")
    with pytest.raises(
        TrainingError, match=r"round 1, row round-01:6: .*prompt exact:\S+ \(index 0 .*no answer.*5 of 12 labels"
    ):
        run(tmp_path / "loop", shared_cache, given=given, rounds=1)
    (tmp_path / "mended").touch()
    run(tmp_path / "loop", shared_cache, given=given, rounds=1, resume=True)
    assert [label["id"] for label in lines(tmp_path / "loop" / "round-01" / "labels.jsonl")] == [
        f"round-01:{i + 1}" for i in range(12)
    ]


def vote(row: dict[str, Any], preferred: object, **more: object) -> str:
    return json.dumps({"id": row["id"], "preferred": preferred, **more}) + "\n"


def test_people_vote_round_by_round(shared_cache: Path, tmp_path: Path) -> None:
    folder, votes = tmp_path / "people", tmp_path / "votes.jsonl"
    outcome = run(folder, shared_cache, labeller="people")
    first = folder / "round-01"
    assert outcome.page == first / "label.html"
    assert not (first / "training").exists()
    rows = lines(first / "samples.jsonl")
    votes.write_text("".join(vote(row, ("tie", 0, 1)[i % 3], left=1) for i, row in enumerate(rows[:9])))
    # Three votes are missing: those that are there are kept, and the round waits.
    assert run(folder, shared_cache, labeller="people", votes=votes, resume=True).page == first / "label.html"
    assert len(lines(first / "labels.jsonl")) == 9
    (first / "votes.jsonl").write_text(votes.read_text() + "".join(vote(row, 1) for row in rows[9:]))
    outcome = run(folder, shared_cache, labeller="people", resume=True)
    assert outcome.page == folder / "round-02" / "label.html"
    (facts,) = outcome.rounds
    assert (facts["counts"]["labels"], facts["counts"]["ties"], facts["labeller"]) == (12, 3, {"name": "people"})
    assert facts["metrics"]["labels/left"] == pytest.approx(3 / 6)
    assert [row.get("soft_label") for row in lines(first / "rows.jsonl")][:3] == [0.5, 1.0, 1.0]
    assert [row["chosen"] for row in lines(first / "rows.jsonl")][1:3] == [rows[1]["completions"][0], rows[2]["completions"][1]]
    with pytest.raises(DataError, match=r"votes.jsonl:1: 'round-01:1' is no row of this round \(round-02:1 to"):
        run(folder, shared_cache, labeller="people", votes=votes, resume=True)
    votes.write_text(vote(lines(folder / "round-02" / "samples.jsonl")[0], 0))
    outcome = run(folder, shared_cache, labeller="people", votes=votes, accept_missing=True, resume=True)
    assert outcome.page is None
    assert outcome.rounds[1]["counts"]["unlabelled"] == 11


def make_row(number: int, *texts: str, prompt: Any = "say") -> Row:
    ids = tuple(tuple(text.encode()) for text in texts)
    return Row(f"round-01:{number}", f"data:{number}", prompt, texts, (1, 2), ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"id": "round-01:1", "preferred": 0}\n{"id": "round-09:4", "preferred": 0}\n',
            r":2: 'round-09:4' is no row of this round",
        ),
        (
            '{"id": "round-01:1", "preferred": 0}\n\n{"id": "round-01:1", "preferred": 1}\n',
            ":3: round-01:1 has another vote in line 1",
        ),
        ('{"id": "round-01:2", "preferred": 0}\n', ":1: round-01:2 has another vote in labels.jsonl"),
        ('{"id": "round-01:1", "preferred": 2}\n', ":1: preferred is 2; expected 0 or 1"),
        ('{"id": "round-01:1", "preferred": true}\n', ":1: preferred is True"),
        ('{"id": "round-01:1", "preferred": 1, "left": "x"}\n', ":1: left is 'x'"),
        ("[1]\n", ":1: expected"),
        ('{"id": "round-01:1"\n', ":1: not JSON"),
    ],
)
def test_bad_votes_are_named_by_file_and_line_and_none_is_taken(tmp_path: Path, text: str, message: str) -> None:
    rows = [make_row(1, "a", "b"), make_row(2, "a", "b")]
    book = LabelBook(tmp_path, rows)
    book.append([Label("round-01:2", (1, 0), 1.0)])
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(DataError, match=f"mine.jsonl{message}"):
        import_votes(tmp_path / "mine.jsonl", book, rows)
    assert [label["id"] for label in lines(tmp_path / "labels.jsonl")] == ["round-01:2"]
    with pytest.raises(DataError, match="cannot be read"):
        import_votes(tmp_path / "none.jsonl", book, rows)


def test_the_page_stands_alone_and_what_a_model_wrote_is_no_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    rows = [make_row(i + 1, evil, f"b{i}", prompt=({"role": "user", "content": f"<b>{i}</b> & more"},)) for i in range(40)]
    page = write_page(tmp_path, rows, seed=3, number=1).read_text()
    assert "<img" not in page
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert not re.search(r"https?:|//[a-z]", page)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script
    allowed = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'" in page
    held = re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.DOTALL)
    assert held
    shown = json.loads(held.group(1))["rows"]
    assert shown[0]["completions"] == [evil, "b0"]
    left = Counter(row["left"] for row in shown)
    assert min(left.values()) > 8  # both sides, by the seed
    assert write_page(tmp_path, rows, seed=3, number=1).read_text() == page
    assert write_page(tmp_path, rows, seed=4, number=1).read_text() != page


PAGE_IN_NODE = """
const fs = require("fs"), html = fs.readFileSync(process.argv[1], "utf8");
const boxes = {}, store = {}, saved = [];
const box = (id) => boxes[id] ??= { dataset: {}, attributes: {}, children: [], setAttribute(k, v) { this.attributes[k] = v; },
  addEventListener(_, act) { this.act = act; }, replaceChildren() { this.children = []; }, append(c) { this.children.push(c); },
  click() { saved.push(this.href); } };
box("content").textContent = html.match(/id="content">(.*?)<\\/script>/s)[1];
let press;
global.document = { getElementById: box, createElement: () => box(Math.random()),
  addEventListener: (_, act) => { press = act; } };
global.localStorage = { getItem: (k) => store[k] ?? null, setItem: (k, v) => { store[k] = v; } };
global.Blob = class { constructor(parts) { this.text = parts.join(""); } };
URL.createObjectURL = (blob) => blob.text;
global.setTimeout = () => {};
eval(html.match(/<script>(.*?)<\\/script>/s)[1]);
for (const key of ["2", "2", "t", "ArrowLeft", "ArrowLeft", "1"]) press({ key, preventDefault() {} });
boxes.save.act();
process.stdout.write(JSON.stringify({ saved: saved[0], left: boxes.left.children.map((c) => c.textContent),
  done: boxes.done.textContent, kept: Object.values(store) }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_votes_on_the_page_are_votes_that_can_be_imported(tmp_path: Path) -> None:
    """2, 2, tie; then back to the first, and 1 instead: what the page saves is what was pressed, whatever the sides."""
    rows = [make_row(i + 1, f"first {i}", f"second {i}") for i in range(3)]
    page = write_page(tmp_path, rows, seed=0, number=1)
    done = subprocess.run(["node", "-e", PAGE_IN_NODE, str(page)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    (tmp_path / "saved.jsonl").write_text(found["saved"])
    book = LabelBook(tmp_path, rows)
    assert import_votes(tmp_path / "saved.jsonl", book, rows) == 3
    labels = [book.labels[row.id] for row in rows]
    assert [label.order[0] == label.left for label in labels[:2]] == [True, False]
    assert [label.soft_label for label in labels] == [1.0, 1.0, 0.5]
    assert found["left"] == [rows[1].completions[labels[1].left or 0]]
    assert "save the votes" in found["done"]
    assert len(json.loads(found["kept"][0])) == 3
    assert votes_on_left(labels) == 0.5


def test_a_torn_last_label_is_dropped_and_any_other_damage_is_named(tmp_path: Path) -> None:
    rows = [make_row(i + 1, "a", "b") for i in range(3)]
    book = LabelBook(tmp_path, rows)
    book.append([Label("round-01:1", (0, 1)), Label("round-01:2", (1, 0), 0.9, (1.0, 2.0))])
    path = tmp_path / "labels.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    again = LabelBook(tmp_path, rows)
    assert [row.id for row in again.missing] == ["round-01:2", "round-01:3"]
    again.append([Label("round-01:2", (1, 0), 0.9, (1.0, 2.0))])
    assert path.read_bytes() == whole
    assert LabelBook(tmp_path, rows).labels["round-01:2"] == Label("round-01:2", (1, 0), 0.9, (1.0, 2.0))
    for damaged in (whole[9:], whole + whole, whole.replace(b"[0, 1]", b"[0]"), whole.replace(b"01:1", b"01:7")):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match=r"labels.jsonl:\d: not a label of this round's rows"):
            LabelBook(tmp_path, rows)


def test_samples_of_other_weights_are_refused(tmp_path: Path) -> None:
    rows = [make_row(1, "a", "b"), make_row(2, "c", "d", prompt=({"role": "user", "content": "x"},))]
    origin = Origin("abc", 0.7, 0.9, 16, 3)
    write_rows(tmp_path, rows, origin)
    assert read_rows(tmp_path, origin) == rows
    with pytest.raises(OutputError, match=r"samples.jsonl:1: drawn from .*'abc'"):
        read_rows(tmp_path, Origin("abd", 0.7, 0.9, 16, 3))


@pytest.mark.fault(15)
def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        claimed(tmp_path / "loop", {"loop": 1}, resume=False, overwrite=False),
        pytest.raises(OutputError, match="another process works in"),
        claimed(tmp_path / "loop", {"loop": 1}, resume=True, overwrite=False),
    ):
        pass
    with claimed(tmp_path / "loop", {"loop": 1}, resume=True, overwrite=False):
        pass


def test_prompts_go_through_the_rows_once_an_epoch(shared_cache: Path) -> None:
    training = exact.ExactTask(options(), shared_cache).training(0)
    chosen = [example.id for number in (1, 2, 3, 4) for example in choose_prompts(training, 16, number, seed=0)]
    everything = sorted(example.id for example in training.examples)
    assert sorted(chosen[:32]) == sorted(chosen[32:]) == everything
    assert chosen[:32] != chosen[32:]
    assert len(choose_prompts(training, 70, 1, seed=0)) == 70


def test_ties_teach_only_losses_with_soft_labels() -> None:
    labelled = [
        (make_row(1, "a", "b"), Label("round-01:1", (1, 0), 1.0)),
        (make_row(2, "a", "b"), Label("round-01:2", (0, 1), 0.5)),
    ]
    soft = make_examples(labelled, "pairs", algorithms.get("dpo").setting().loss)
    assert [(example.id, example.labels.soft_label) for example in soft] == [("round-01:1", 1.0), ("round-01:2", 0.5)]
    assert soft[0].completion_ids == ((98,), (97,))
    hard = make_examples(labelled, "pairs", algorithms.get("simpo").setting().loss)
    assert [example.id for example in hard] == ["round-01:1"]
    listed = [(make_row(3, "a", "b", "c"), Label("round-01:3", (1, 2, 0), None, (0.0, -1.0, 4.0)))]
    (group,) = make_examples(listed, "groups", algorithms.get("pl_dpo").setting().loss)
    assert (group.completion_ids, group.labels.ranks, group.labels.scores) == (
        ((99,), (97,), (98,)),
        (0, 1, 2),
        (4.0, 0.0, -1.0),
    )
    (pair,) = make_examples(listed, "pairs", algorithms.get("dpo").setting().loss)
    assert (pair.completion_ids, pair.labels.scores) == (((99,), (98,)), (4.0, -1.0))
    scores = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    rows, labels = [row for row, _ in labelled], {label.id: label for _, label in labelled}
    assert agreement(rows, labels, scores) == 1.0  # the tie is left out


def test_options_that_contradict_each_other() -> None:
    for more, message in (
        ({"labeller": "people", "samples_per_prompt": 4}, "people are asked about pairs"),
        ({"rounds": 0}, "at least 1"),
        ({"top_p": 0.0}, "top_p in"),
        ({"reference": "end"}, "reference must be one of start, round"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoopOptions(**more)
    with pytest.raises(ConfigError, match="is about pairs"):
        check_label_model("soft", 1.0, 4)
    with pytest.raises(ConfigError, match="other pairs"):
        check_label_model("shifted", 1.0, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "hyper", "more"),
    [
        ("ppo", {"rollout_size": 16, "ppo_epochs": 1}, {}),
        ("rloo", {"rollout_size": 16}, {"reference": "round"}),
        ("online_dpo", {"rollout_size": 16}, {}),
        ("ipo", {}, {"reference": "round", "keep_rows": True}),
        ("pl_dpo", {}, {"samples_per_prompt": 3}),
        ("kto", {}, {}),
        ("sft", {}, {"samples_per_prompt": 4}),
    ],
)
def test_any_update_goes_through_two_rounds_and_resumes_in_the_second(
    shared_cache: Path, tmp_path: Path, update: str, hyper: Any, more: Any
) -> None:
    run(tmp_path / "whole", shared_cache, update, hyper=hyper, **more)
    run(tmp_path / "cut", shared_cache, update, hyper=hyper, rounds=1, **more)
    outcome = run(tmp_path / "cut", shared_cache, update, hyper=hyper, resume=True, **more)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    first, second = outcome.rounds
    if algorithms.get(update).on_policy:
        assert (first["reward_model"]["train_rows"], second["reward_model"]["train_rows"]) == (12, 24)
        assert first["metrics"]["labels/agree_before"] is None  # there is no reward model before the first labels
        assert second["metrics"]["labels/agree_before"] is not None
        assert second["metrics"]["proxy"] is not None
    assert second["sampling"]["policy"] == first["policy_after"] != first["sampling"]["policy"]


@pytest.mark.slow
def test_the_command_line(cli: Any, tmp_path: Path) -> None:
    command = (
        "iterate",
        "--update",
        "dpo",
        "--beta",
        0.5,
        "--reward",
        "true",
        "--rounds",
        1,
        "--round-prompts",
        8,
        "--pairs",
        16,
    )
    command = (*command, "--batch-size", 4, "--output-dir", tmp_path / "loop")
    done = cli(*command)
    assert done.code == 0, done.err
    assert done.last == f"policy: {tmp_path / 'loop' / 'round-01' / 'policy'}"
    assert "hidden reward" in done.flat
    assert json.loads((tmp_path / "loop" / "iterate.json").read_text())["hyper"]["beta"] == 0.5
    assert cli(*command).code == 2
    again = cli(*command, "--resume")
    assert (again.code, again.last) == (0, done.last)
    help_text = cli("iterate", "--update", "ppo", "--help").out
    for flag in ("--rounds", "--top-p", "--ppo-top-p", "--clip-low", "--reward", "--votes", "--learning-rate"):
        assert flag in help_text
    assert "--checkpoints" not in help_text
    wrong = cli("iterate", "--update", "dpo", "--clip-low", 0.1)
    assert wrong.code == 2
    assert "iterate with --update dpo has no option --clip-low" in wrong.err
    assert (
        "trains a reward model and no policy" in cli("iterate", "--update", "bradley_terry", "--output-dir", tmp_path / "x").err
    )
    assert "name the folder" in cli("iterate").err
