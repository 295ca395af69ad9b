"""Each operator's mutants of a small source, what is left alone, samples and arguments, and toy losses under toy tests."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.mutant_sources import Mutant, generate
from benchmarks.mutant_trials import Outcome, near_tests, run_tasks
from benchmarks.mutants import EQUIVALENTS, Result, all_mutants, key_of, read_equivalents, sample, tables_of, verdict
from benchmarks.mutation_operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def of_the_losses() -> list[Mutant]:
    return all_mutants(ROOT)


def mutated(operator: str, line: str, arguments: str = "") -> set[str]:
    """What one operator makes of a line inside of a function."""
    source = f"def f({arguments}):\n    {line}\n"
    return {mutant.mutated for mutant in generate("losses/f.py", source) if mutant.operator == operator}


@pytest.mark.parametrize(
    ("operator", "line", "expected"),
    [
        ("sign", "a + b", {"a - b"}),
        ("sign", "a * (b + c)", {"a / (b + c)", "a * (b - c)"}),
        ("sign", "x = c * -(a + b)", {"x = c * (a + b)", "x = c / -(a + b)", "x = c * -(a - b)"}),
        ("sign", "a -= b", {"a += b"}),
        ("sign", "x.sum(-1)", set()),
        ("sign", "x = a + 'b'", set()),
        ("comparison", "a < b", {"a <= b", "a > b"}),
        ("comparison", "a >= b", {"a > b"}),
        ("comparison", "0 <= a < b", {"0 < a < b", "0 <= a <= b", "0 <= a > b"}),
        ("comparison", "a == b", {"a != b"}),
        ("comparison", "a is b", set()),
        ("constant", "x = 0.5", {"x = 1.5", "x = 0.0", "x = 1.0"}),
        ("constant", "x = 2", {"x = 3", "x = 0", "x = 1"}),
        ("constant", "x = 0", {"x = 1"}),
        ("constant", "x = -2", {"x = -1", "x = 0", "x = 1"}),
        ("constant", "x = True", {"x = False"}),
        ("constant", "x.cumsum(-1)", {"x.cumsum(0)"}),
        ("constant", "g(x, dim=-1)", {"g(x, dim=0)"}),
        ("constant", "x[..., -1]", {"x[..., 0]"}),
        ("swapped_arguments", "g(a, b, c=d)", {"g(b, a, c=d)"}),
        ("swapped_arguments", "g(a, b, c)", {"g(b, a, c)", "g(a, c, b)"}),
        ("swapped_arguments", "torch.where(m, a, b)", {"torch.where(m, b, a)"}),
        ("swapped_arguments", "torch.maximum(a, b)", set()),
        ("swapped_arguments", "g(*a, b)", set()),
        ("dropped_detach", "a + b.detach()", {"a + b"}),
        ("dropped_detach", "(a + b).detach()", {"a + b"}),
        ("dropped_mask", "masked_sum(x, mask, dim=-1)", {"x.sum(dim=-1)"}),
        ("dropped_mask", "masked_mean(x - y, mask)", {"(x - y).mean()"}),
        ("dropped_mask", "torch.where(mask.bool(), a, b)", {"a"}),
        ("dropped_mask", "x.masked_fill(~mask, v)", {"x"}),
        ("dropped_mask", "x * chosen_mask", {"x"}),
        ("dropped_mask", "y = x * mask.to(x.dtype)", {"y = x"}),
        ("dropped_mask", "w = mask.to(x.dtype)", {"w = mask.new_ones(mask.shape).to(x.dtype)"}),
        ("dropped_mask", "mask.shape", set()),
        ("other_function", "x.sum(-1)", {"x.mean(-1)"}),
        ("other_function", "torch.maximum(a, b)", {"torch.minimum(a, b)"}),
        ("other_function", "x.exp()", {"x.log()", "x.expm1()"}),
        ("other_function", "F.softplus(x)", {"F.logsigmoid(x)"}),
        ("other_function", "F.logsigmoid(x)", {"F.softplus(x)", "F.logsigmoid(x).exp()"}),
        ("other_function", "torch.sigmoid(x)", {"torch.sigmoid(x).log()"}),
        ("other_function", "max(a, b)", {"min(a, b)"}),
        ("other_function", "sum(x)", set()),
        ("other_function", "x.clamp(min=0)", {"x.clamp(max=0)"}),
        ("dropped_clamp", "x.clamp(min=1)", {"x"}),
        ("dropped_clamp", "torch.relu(1 - x)", {"1 - x"}),
        ("dropped_term", "a + b", {"a", "b"}),
        ("dropped_term", "c * (a - b)", {"c * (a)", "c * (-b)"}),
        ("dropped_term", "x = f'{a}' + b", set()),
        ("negated_condition", "if a: pass", {"if not a: pass"}),
        ("negated_condition", "x = a if not b else c", {"x = a if b else c"}),
        ("negated_condition", "[a for a in b if a.c]", {"[a for a in b if not a.c]"}),
        ("negated_condition", "x = a if b == c else d", {"x = a if not b == c else d"}),
        ("removed_raise", "raise ValueError(f'{1 + 2} or {x - 1}')", {"pass"}),
    ],
)
def test_operator_makes_these_mutants(operator: str, line: str, expected: set[str]) -> None:
    assert mutated(operator, line) == expected


def test_names_of_the_two_sides_are_exchanged_singly_and_together_where_both_exist() -> None:
    line, both = "return chosen - rejected", "chosen, rejected"
    assert mutated("chosen_rejected", line, both) == {
        "return rejected - rejected", "return chosen - chosen", "return rejected - chosen",
    }  # fmt: skip
    assert mutated("chosen_rejected", "return chosen_logps", both) == set()
    assert mutated("chosen_rejected", "return torch.ones_like(chosen[:, 0])", both) == set(), "both have one shape"
    line, models = "return beta * (policy_logps - reference_logps)", "beta, policy_logps, reference_logps"
    assert mutated("policy_reference", line, models) == {
        "return beta * (reference_logps - reference_logps)",
        "return beta * (policy_logps - policy_logps)",
        "return beta * (reference_logps - policy_logps)",
    }
    assert mutated("policy_reference", "return policy_logps", "policy_logps, old_logps") == {"return old_logps"}


def test_a_mean_for_a_sum_is_imported_where_the_module_did_not() -> None:
    source = "from losses.ops import masked_sum\n\ndef f(x, mask):\n    return masked_sum(x, mask)\n"
    made = {mutant.mutated: mutant.source for mutant in generate("losses/f.py", source)}
    assert made["return masked_mean(x, mask)"].endswith("\nfrom losses.ops import masked_mean\n")


def test_text_annotations_imports_and_messages_stay() -> None:
    source = '''"""Adds 1 + 2."""
from __future__ import annotations
from typing import TYPE_CHECKING, Literal
if TYPE_CHECKING:
    from a import b
@dataclass(frozen=True)
class C:
    """1 < 2."""
    x: Literal[1, 2]
    y: Annotated[int, 1 + 2] = z
@torch.no_grad()
def f(a: Literal[3], *, b: Literal[4] = c) -> Literal[5]:
    """Returns 1."""
    """And 2 - 1."""
    return f"{a + 1} is not {b}"
'''
    assert generate("losses/f.py", source) == []


def test_defaults_of_options_and_flags_of_registration_are_open_to_change() -> None:
    source = '@register("f", coupled=True)\ndef f(x, *, beta: float = 0.1):\n    return x\n'
    assert [mutant.mutated for mutant in generate("losses/f.py", source)] == [
        '@register("f", coupled=False)', *(f"def f(x, *, beta: float = {value}):" for value in ("1.1", "0.0", "1.0")),
    ]  # fmt: skip


def test_a_mutant_changes_its_place_alone_and_says_where_it_is() -> None:
    """Bytes and characters differ before `x`; the comment and the other lines stay."""
    source = "class A:\n    def f(self, x):\n        é = 'ü'; y = x + 1  # a reason\n        return y\n"
    made = next(mutant for mutant in generate("losses/f.py", source) if mutant.operator == "sign")
    assert (made.function, made.line) == ("A.f", 3)
    assert made.source == source.replace("x + 1", "x - 1")
    assert made.mutated == "é = 'ü'; y = x - 1 # a reason"


def test_mutants_of_the_losses_differ_and_cover_every_operator(of_the_losses: list[Mutant]) -> None:
    assert len({(mutant.file, mutant.source) for mutant in of_the_losses}) == len(of_the_losses)
    for mutant in sample(of_the_losses, 50, seed=1):
        original = (ROOT / mutant.file).read_text()
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(ast.parse(original))
    assert {mutant.operator for mutant in of_the_losses} == OPERATORS.keys()
    assert {mutant.file for mutant in all_mutants(ROOT, "dp?.py")} == {"losses/dpo.py"}


def test_samples_depend_on_the_seed_alone() -> None:
    mutants = all_mutants(ROOT, "dpo.py")
    assert sample(mutants, 10, seed=0) == sample(mutants, 10, seed=0) != sample(mutants, 10, seed=1)
    assert len(sample(mutants, 10, seed=0)) == 10
    assert sample(mutants, 10_000, seed=0) == mutants


ENTRY = {
    "file": "losses/f.py",
    "function": "f",
    "operator": "comparison",
    "original": "if  x < 0:",
    "mutated": "if x <= 0:",
    "reason": "x is never 0.",
}


def written(path: Path, *entries: dict[str, str]) -> Path:
    path.write_text(yaml.safe_dump(list(entries)))
    return path


def test_an_argument_follows_its_line_and_ends_with_its_text(tmp_path: Path) -> None:
    reasons = read_equivalents(written(tmp_path / "e.yaml", ENTRY))

    def argued(source: str) -> list[str]:
        return [reasons[key] for mutant in generate("losses/f.py", source) if (key := key_of(mutant)) in reasons]

    assert argued("def f(x):\n    if x < 0:\n        g()\n") == ["x is never 0."]
    assert argued("import a\n\ndef f(x):\n    h()\n    if x < 0:\n        g()\n") == ["x is never 0."]
    assert argued("def f(x):\n    if x < 0.0:\n        g()\n") == []
    assert argued("def h(x):\n    if x < 0:\n        g()\n") == []


def test_arguments_without_a_reason_or_twice_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the texts file, function"):
        read_equivalents(written(tmp_path / "e.yaml", {**ENTRY, "reason": ""}))
    with pytest.raises(ValueError, match="listed twice"):
        read_equivalents(written(tmp_path / "e.yaml", ENTRY, {**ENTRY, "reason": "another"}))


def test_the_committed_arguments_are_about_mutants_that_exist(of_the_losses: list[Mutant]) -> None:
    reasons = read_equivalents(EQUIVALENTS)
    stale = reasons.keys() - {key_of(mutant) for mutant in of_the_losses}
    assert not stale, "the line that an entry of benchmarks/mutants.yaml argues about has changed or gone; remove the entry"


def results(killed: int, argued: int, unargued: int, refuted: int = 0) -> list[Result]:
    mutant = Mutant("losses/f.py", "f", "sign", 1, "a + b", "a - b", "")
    failed, survived = Outcome("failed", "test_f", 1.0), Outcome("survived", "", 1.0)
    ends = (
        [(failed, None)] * killed + [(survived, "same")] * argued + [(survived, None)] * unargued + [(failed, "same")] * refuted
    )
    return [Result(mutant, outcome, reason) for outcome, reason in ends]


@pytest.mark.parametrize(
    ("made", "passed"),
    [
        (results(95, 5, 0), True),
        (results(94, 6, 0), False),
        (results(99, 0, 1), False),
        (results(99, 0, 0, refuted=1), False),
    ],
)
def test_the_check_asks_for_a_rate_and_for_an_argument_of_every_survivor(made: list[Result], passed: bool) -> None:
    assert verdict(made)[0] is passed


def test_tables_count_what_was_generated_sampled_killed_and_argued() -> None:
    made = results(3, 1, 2)
    by_operator, by_file = tables_of([result.mutant for result in made] * 2, made)
    row = next(row for row in by_operator.rows if row["operator"] == "sign")
    counts = {"generated": 12, "sampled": 6, "killed": 3, "by_hanging": 0, "survived": 3, "argued": 1, "kill_rate": 0.5}
    assert row == {"operator": "sign", **counts}
    assert [row["file"] for row in by_file.rows] == ["losses/f.py", "all"]
    assert by_file.rows[-1] == {"file": "all", **counts}


def test_near_tests_are_the_modules_own_and_those_named_after_it(tmp_path: Path) -> None:
    tests = tmp_path / "tests" / "losses"
    tests.mkdir(parents=True)
    assert near_tests("losses/dpo.py", tmp_path) == ()
    for name in ("test_dpo.py", "test_laws.py"):
        (tests / name).touch()
    assert near_tests("losses/dpo.py", tmp_path) == ("tests/losses/test_dpo.py", "tests/losses/test_laws.py", "-k", "dpo")
    assert near_tests("losses/_surrogate.py", tmp_path) == ("tests/losses/test_laws.py", "-k", "surrogate")


def test_trials_refuse_a_process_that_has_imported_the_losses(tmp_path: Path) -> None:
    import losses  # noqa: F401

    with pytest.raises(RuntimeError, match="losses is imported already"):
        next(run_tasks([], tmp_path, tmp_path, 1))


TOY = {
    "losses/__init__.py": "",
    "losses/toy.py": """
def total(a, b):
    return a + b

def positive(x):
    return x if x > 0 else -x
""",
    "losses/loop.py": """
def countdown(n):
    while n > 0:
        n = n - 1
    return n
""",
    "tests/losses/test_toy.py": """
from losses.toy import positive

def test_positive():
    assert [positive(x) for x in (-2, 0, 2)] == [2, 0, 2]
""",
    # Found only when all tests run: this file is named after no module.
    "tests/losses/test_late.py": """
from losses.loop import countdown
from losses.toy import total

def test_total():
    assert total(2, 3) == 5

def test_countdown():
    assert [countdown(n) for n in (0, 1, 2)] == [0, 0, 0]
""",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in TOY.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "toy"


RUN = """
import sys
from benchmarks import mutants
mutants._LEAST_LIMIT, mutants._SLACK = 4.0, 1.0
sys.exit(mutants.main(sys.argv[1:]))
"""


def run(toy: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The check on the toy losses, where 4 seconds without an end are a hang."""
    command = [sys.executable, "-c", RUN, "--root", toy, "--jobs", 2, *arguments]
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=240)


def ends(path: Path) -> dict[str, str]:
    """What became of each mutant, by its text."""
    return {row["mutated"]: row["end"] for row in json.loads(path.read_text())["mutants"]}


def test_toy_mutants_are_killed_and_survive_as_expected(toy: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()}
    argument = {
        "file": "losses/toy.py", "function": "positive", "operator": "comparison",
        "original": "return x if x > 0 else -x", "mutated": "return x if x >= 0 else -x", "reason": "-0 is 0.",
    }  # fmt: skip
    equivalents = written(tmp_path / "e.yaml", argument)
    done = run(toy, "--all", "--files", "toy.py", "--json", tmp_path / "out.json", "--equivalents", equivalents)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ends(tmp_path / "out.json") == {
        "return a - b": "failed",
        "return a": "failed",
        "return b": "failed",
        "return x if x >= 0 else -x": "survived",
        "return x if x < 0 else -x": "failed",
        "return x if not x > 0 else -x": "failed",
        "return x if x > 1 else -x": "survived",
        "return x if x > 0 else x": "failed",
    }
    assert "return x if x >= 0 else -x\n  argued: -0 is 0." in done.stdout
    assert "return x if x > 1 else -x\n  UNARGUED" in done.stdout
    assert "FAILED: kill rate 6/8 = 75.0% (required 95%); survivors unargued: 1" in done.stdout
    assert {path: path.read_bytes() for path in toy.rglob("*") if path.is_file()} == before, "the sources are only read"


@pytest.mark.slow
def test_a_loop_without_end_counts_as_killed(toy: Path, tmp_path: Path) -> None:
    run(toy, "--all", "--files", "loop.py", "--json", tmp_path / "out.json")
    found = ends(tmp_path / "out.json")
    assert found["n = n + 1"] == found["n = n"] == "hung"
    assert found["while n < 0:"] == "failed"


@pytest.mark.slow
def test_a_failing_baseline_ends_the_run_with_the_failing_test(toy: Path) -> None:
    (toy / "tests/losses/test_late.py").write_text("def test_late():\n    assert False\n")
    done = run(toy, "--samples", 1)
    assert done.returncode == 1
    assert "on the unchanged losses, pytest tests/losses failed: tests/losses/test_late.py::test_late" in done.stderr
