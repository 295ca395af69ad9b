"""What README.md and CONTRIBUTING.md say is true: layout, losses, papers, examples, targets; and docs/losses.md is whole."""

from __future__ import annotations

import html
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import losses
from prefopt import algorithms
from prefopt.cli import catalogue

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    yield from script("readme")


@pytest.fixture(scope="module")
def loss_page() -> Iterator[ModuleType]:
    yield from script("loss_page")


def script(name: str) -> Iterator[ModuleType]:
    """A script of docs/ as a module; as when it runs, it finds the others beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield importlib.import_module(name)


def section(name: str) -> str:
    found = re.search(f"<!-- {name}:begin -->(.*)<!-- {name}:end -->", README, re.DOTALL)
    assert found, f"README.md has no lines <!-- {name}:begin --> and <!-- {name}:end -->"
    return found.group(1)


def python_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def run_python(code: str, folder: Path) -> str:
    """Runs a script in a folder of its own (losses register per process; workers need a file); its stdout."""
    (folder / "example.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PREFOPT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "example.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def layout_paths() -> list[str]:
    """The paths of the README's tree, from names and indentation."""
    stack: list[str] = []
    paths = []
    for line in section("layout").strip().splitlines()[1:-1]:
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        stack[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            paths.append("/".join(stack))
    return paths


def test_generated_parts_of_the_readme_are_up_to_date(generator: ModuleType) -> None:
    assert generator.render(README) == README, "README.md is behind the code: run `make readme`"


def test_the_layout_names_what_exists() -> None:
    missing = [path for path in layout_paths() if "<name>" not in path and not (ROOT / path).exists()]
    assert not missing


def test_the_layout_leaves_no_file_out() -> None:
    """Files that hold losses are covered by losses/<name>.py and named in the table."""
    named = {*layout_paths(), *re.findall(r"\((losses/\w+\.py)\)", section("losses"))}
    files = {path.relative_to(ROOT).as_posix() for package in ("losses", "prefopt") for path in (ROOT / package).rglob("*.py")}
    assert not {path for path in files - named if not path.endswith("__init__.py")}


def test_every_loss_is_in_the_table_and_cites_papers_that_exist(generator: ModuleType) -> None:
    papers = generator.read_papers((ROOT / "references.bib").read_text())
    own = generator.own_losses()
    assert {"dpo", "ipo", "cpl", "ppo"} <= {loss.name for loss in own} <= set(losses.names())
    rows = re.findall(r"^\| \[`(\w+)`\]\(losses/\w+\.py\) \|", section("losses"), re.MULTILINE)
    assert sorted(rows) == [loss.name for loss in own]
    for loss in own:
        keys = [citation.key for citation in catalogue.citations(loss.doc)]
        assert keys, f"the docstring of {loss.name} names no paper as `Author et al. 2023 [key]`"
        bare = {*re.findall(r"\[([a-z]+\d{4}\w*)\]", loss.doc)} - {*keys}
        assert not bare, f"{loss.name}: no author and year stand before {bare}"
        assert not [key for key in keys if key not in papers], f"{loss.name}: add {keys} to references.bib"


def test_the_table_of_losses_is_by_family_and_its_rows_are_short(generator: ModuleType) -> None:
    heads = re.findall(r"^\*\*(.*)\*\* \((\d+)\)$", generator.losses_table(), re.MULTILINE)
    families = catalogue.by_family(generator.own_losses())
    assert heads == [(family.capitalize(), str(len(members))) for family, members in families.items()]
    shown = re.sub(r"\]\([^)]*\)", "]", generator.losses_table())
    assert max(map(len, shown.splitlines())) < 260


def test_the_page_of_losses_holds_every_loss_and_every_option(loss_page: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "losses.md"
    loss_page.write(path)
    text = html.unescape(re.sub(r"\\([\\*_`<\[\]|])", r"\1", path.read_text()))
    sections = {name: body for name, _, body in (part.partition("\n") for part in re.split(r"^### ", text, flags=re.MULTILINE))}
    rollouts = text.partition("## Rollouts")[2]
    for loss in loss_page.own_losses():
        held, algorithm = sections[loss.name], algorithms.get(loss.name)
        words = {word.rstrip(".:,") for word in loss.doc.split()} - {"Args"}
        lost = {word for word in words if word not in held and f"--{word.replace('_', '-')}" not in held}
        assert not lost, f"the docstring of {loss.name} lost {lost}"
        for name in catalogue.tensors(loss):
            shape = f"[{', '.join(losses.VOCABULARY[name].shape)}]"
            assert f"| {name} | {shape} | {losses.VOCABULARY[name].source} | {losses.VOCABULARY[name].meaning}" in held
        for option in algorithm.flags.values():
            flag, default = option.name.replace("_", "-"), re.escape(str(option.default))
            row = rf"^\| --{flag} \| .* \| {default} \| {re.escape(option.help)} \|$"
            where = held if re.search(row, held, re.MULTILINE) or option.name not in catalogue.rollout_options() else rollouts
            assert re.search(row, where, re.MULTILINE), f"{loss.name}: {row}"
        assert f"../{loss_page.file_of(loss).relative_to(ROOT).as_posix()}" in held
        for citation in catalogue.citations(loss.doc):
            assert f"- [{citation.key}] " in held
        assert ("Coupled" in held) == loss.coupled
        assert loss.advantage is None or f"Advantage function: {loss.advantage.__name__}." in held


def test_no_markup_of_a_docstring_is_lost_on_the_page(loss_page: ModuleType) -> None:
    assert loss_page.prose("a*b_c < `d*e` [f]|g") == r"a\*b\_c \< `d*e` \[f\]\|g"


def test_papers_are_read_from_bibtex(generator: ModuleType) -> None:
    text = """@article{a2020x,
  title = {T},
  author = {One, A. and Two, B.},
  journal = {arXiv preprint arXiv:2001.00001},
  year = {2020}
}

@misc{b2021y,
  author = {One, A. and Two, B. and Three, C.},
  year = {2021}
}
"""
    assert generator.read_papers(text) == {
        "a2020x": "[One and Two 2020](https://arxiv.org/abs/2001.00001)",
        "b2021y": "One et al. 2021",
    }


def test_the_first_example_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    """policy = reference: log 2 = 0.6931; d/d(chosen) of -log sigma(beta*margin), mean of two: -beta/2/2 = -0.025."""
    output = run_python(python_blocks("README.md")[0], tmp_path).splitlines()
    assert output[0] == "0.6931 tensor([-0.0250, -0.0250])"
    assert [line.split()[0] for line in output[1:]] == losses_of_a_fresh_process(tmp_path)


def losses_of_a_fresh_process(folder: Path) -> list[str]:
    return run_python("import losses\nprint(*losses.names())", folder).split()


def test_the_loss_of_the_contributing_guide_works_and_obeys_the_laws(tmp_path: Path) -> None:
    code = python_blocks("CONTRIBUTING.md")[0]
    code += """
from losses.laws import check
from prefopt import algorithms

print(algorithms.get("my_hinge").stream, list(algorithms.get("my_hinge").flags))
for result in check("my_hinge"):
    print(result.outcome, result.law, result.detail)
"""
    first, *laws = run_python(code, tmp_path).splitlines()
    assert first == "pairs ['beta']"
    assert [line for line in laws if line.startswith("passed")]
    assert not [line for line in laws if line.startswith("failed")]


@pytest.mark.slow
def test_the_comparison_of_the_readme_runs(tmp_path: Path) -> None:
    output = run_python(python_blocks("README.md")[1], tmp_path).splitlines()
    cells = [tuple(line.split()[:-3]) for line in output if re.fullmatch(r"[\w.= ]+( -?[\d.e-]+){3}", line)]
    assert cells == [(*label.split(), seed) for seed in "01" for label in ("dpo", "cpl bias=1.0")]
    assert (tmp_path / "runs" / "first" / "report.html").stat().st_size > 10_000


def test_make_targets_that_the_pages_name_exist() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / ".ci" / "run").read_text()
    named = set(re.findall(r"(?:^|\s|`)make ([a-z-]+)", text))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"test", "bench", "setup", "lint"} <= named
    assert named <= targets, f"no such target: {named - targets}"


def test_the_commands_of_the_readme_are_those_of_the_command_line(tmp_path: Path) -> None:
    code = "import runpy, sys\nsys.argv = ['prefopt', '--help']\nrunpy.run_module('prefopt', run_name='__main__')\n"
    output = run_python(code, tmp_path)
    shown = set(re.findall(r"^│ (\w+) {2,}", output, re.MULTILINE))
    assert shown == set(re.findall(r"^\| `prefopt (\w+)", README, re.MULTILINE))


def test_the_results_have_a_place() -> None:
    assert section("results").strip()


def test_pinned_versions_satisfy_the_package() -> None:
    """constraints.txt pins every requirement that the tests run with exactly, inside pyproject.toml's bounds."""
    import tomllib

    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower()] = next(iter(pin.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # vllm needs a GPU of its own; no test has run with any version of it.
    extras = (lines for name, lines in project["optional-dependencies"].items() if name != "vllm")
    wanted = [*project["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "prefopt":
            assert requirement.name.lower() in pins, f"constraints.txt has no {requirement.name}"
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
