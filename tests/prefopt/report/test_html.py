from __future__ import annotations

import base64
import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from prefopt.errors import DataError
from prefopt.report import answer, save_results, save_timings, write_report
from prefopt.report.schema import Tuning

RANKING_WORDS = re.compile(r"\b(best|worst|better|worse|significant\w*|win|wins|winner|beats?|outperform\w*)\b", re.IGNORECASE)
MALICIOUS = "<script>alert('x')</script>\"onload=\"y"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report_of(results, timings, folder: Path) -> Page:
    save_results(results, folder)
    if timings is not None:
        save_timings(timings, folder)
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_report_writes_page_table_and_pictures_and_prints_nothing(
    make_exact, make_timings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    page = report_of(results, make_timings(results), tmp_path)
    assert capsys.readouterr() == ("", "")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    drawn = ("cost", "final_values", "forest", "learning_curves", "reward_kl")
    figures = [f"figures/{name}{suffix}" for name in drawn for suffix in (".png", ".svg")]
    written = ("against_reference", "cells", "cost", "pairs", "results", "settings")
    tables = [f"tables/{name}{suffix}" for name in written for suffix in (".csv", ".md", ".tex")]
    assert names == [*figures, "report.html", "results.json", "table.md", *tables, "timings.json"]
    assert (tmp_path / "table.md").read_text().startswith(f"**{results.title}")
    headings = (
        "What was compared",
        "Results",
        "Figures",
        "Tests",
        "Judges",
        "Data",
        "Settings",
        "Cost",
        "Notes",
        "How to run it again",
    )
    for heading in headings:
        assert heading in page.text
    for fact in (
        "beta=0.1, average_log_prob=true",
        "labels are drawn once",
        results.command,
        "2.13.0",
        "20000",
        "exact:bt",
        "p (Holm)",
    ):
        assert fact in page.text


def test_page_asks_the_network_for_nothing(make_text, make_timings, tmp_path: Path) -> None:
    results = make_text(3)
    page = report_of(results, make_timings(results), tmp_path)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "srcset", "data")]
    assert len(sources) == 5
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    links = {value for _, attributes in page.tags for name, value in attributes.items() if name == "href"}
    assert links == {f"#cells-{index}" for index in range(len(results.settings))}
    assert not {"script", "link", "iframe", "base", "form"} & {tag for tag, _ in page.tags}
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    # The text of BibTeX entries names addresses and asks for none.
    assert not re.search(r"https?://|@import|url\(", source.partition("<summary>BibTeX")[0])
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_embedded_pictures_are_the_written_ones(make_exact, tmp_path: Path) -> None:
    page = report_of(make_exact(1, ("dpo", "ipo")), None, tmp_path)
    embedded = {base64.b64decode((a["src"] or "").partition(",")[2]) for tag, a in page.tags if tag == "img"}
    assert embedded == {path.read_bytes() for path in (tmp_path / "figures").glob("*.png")}
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_smoke_page_says_so_and_ranks_nothing(make_exact, make_timings, tmp_path: Path) -> None:
    results = replace(make_exact(1), baselines=())
    page = report_of(results, make_timings(results), tmp_path)
    assert page.text.count("smoke run: no ranking") >= 2
    assert (tmp_path / "table.md").read_text().startswith("**smoke run: no ranking")
    assert not RANKING_WORDS.search(page.text)
    assert not RANKING_WORDS.search((tmp_path / "table.md").read_text())
    assert "no intervals over seeds and no tests" in page.text


def test_what_results_say_is_escaped_everywhere(make_exact, tmp_path: Path, fail) -> None:
    results = make_exact(1, ("dpo",))
    results = replace(
        results,
        title=MALICIOUS,
        settings=(replace(results.settings[0], label=MALICIOUS, hyper={MALICIOUS: MALICIOUS}),),
        cells=(replace(results.cells[0], label=MALICIOUS),),
        metrics=tuple(replace(metric, label=MALICIOUS, note=MALICIOUS) for metric in results.metrics),
        data={MALICIOUS: [MALICIOUS, {"x": MALICIOUS}]},
        notes=(MALICIOUS,),
        command=MALICIOUS,
        environment={MALICIOUS: MALICIOUS},
    )
    page = report_of(results, None, tmp_path)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count("<script>alert('x')</script>") > 10
    failed = report_of(fail(results, MALICIOUS, 0, MALICIOUS), None, tmp_path)
    assert "script" not in {tag for tag, _ in failed.tags}


def test_failed_cells_show_their_whole_error(make_exact, fail, tmp_path: Path) -> None:
    results = fail(make_exact(3, ("dpo", "ipo")), "ipo", 1, "TrainingError: loss is nan\nat step 12")
    page = report_of(results, None, tmp_path)
    assert "ipo, seed 1 failed: TrainingError: loss is nan" in page.text
    assert "at step 12" in page.text
    assert "at step 12" not in (tmp_path / "table.md").read_text()


def test_weak_judge_rows_are_dim(make_text, tmp_path: Path) -> None:
    page = report_of(make_text(3), None, tmp_path)
    assert any(tag == "td" and "dim" in (attributes.get("class") or "").split() for tag, attributes in page.tags)
    assert "greyed out: may be right less than 55% of the time" in page.text


def test_prompt_rows_add_what_the_prompts_resolve(make_text, tmp_path: Path) -> None:
    lines = [
        {
            "label": "dpo",
            "seed": 0,
            "prompt_id": f"p{i}",
            "judge": "big-rm",
            "score": float(i % 2),
            "kl": 1.0,
            "log_ratio": 0.5,
            "length": 9,
        }
        for i in range(332)
    ]
    (tmp_path / "per_prompt.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = report_of(make_text(3), None, tmp_path)
    assert "smallest detectable difference" in page.text
    assert "0.077" in page.text


def test_missing_scipy_is_said(make_exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("statistics", "tables", "matched_tables", "summary", "html"):
        monkeypatch.setattr(f"prefopt.report.{module}.scipy_installed", lambda: False)
    page = report_of(make_exact(3, ("dpo", "ipo")), None, tmp_path)
    assert "scipy is not installed" in page.text
    assert "±" not in page.text


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json: expected the results of a comparison"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def study_of(make_exact, *labels: str):
    """Two families of two strengths, tuned, with a question and KL targets."""
    results = make_exact(4, labels)
    groups = {"dpo": "dpo", "dpo beta=0.5": "dpo", "ipo": "other", "cpl": "other"}
    tuning = Tuning(
        "dpo", "hidden reward at the end of training", "up", {"learning_rate": "1e-06 to 0.0001, logarithmic"},
        tuple({"learning_rate": 1e-5 * (i + 1), "criterion": None if i == 2 else 0.1 * i} for i in range(5)),
        {"learning_rate": 5e-5}, 0.4, ("learning_rate",), (1000, 1001),
    )  # fmt: skip
    return replace(
        results, settings=tuple(replace(s, group=groups[s.label], tuned=True) for s in results.settings),
        question="Which has more reward for its KL?", kl_targets=(0.1, 0.25), tuning=(tuning,),
    )  # fmt: skip


def test_first_screen_answers_before_anything_else(make_exact, tmp_path: Path) -> None:
    results = study_of(make_exact, "dpo", "dpo beta=0.5", "ipo", "cpl")
    page = report_of(results, None, tmp_path)
    first = page.text.partition("What was compared")[0]
    for fact in (results.question, answer(results), "4 seeds; reward known exactly", "5 trials each", results.command):
        assert fact in first
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "hidden reward at 0.1 nats: the difference to the reference" in (alts[0] or "")
    assert (alts[1] or "").startswith("Frontiers over strengths")
    assert "At equal KL" in page.text
    assert "at the border: learning_rate" in page.text
    assert "5 (1 failed)" in page.text
    assert {"equal_kl.csv", "equal_kl.tex", "tuning.csv"} <= {path.name for path in (tmp_path / "tables").iterdir()}
    assert "Rafailov et al. 2023" in page.text
    assert "@article{rafailov2023dpo," in page.text


def test_numbers_link_to_their_cells_and_cells_to_their_folders(make_exact, tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "dpo-abc-seed1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"label": "dpo", "seed": 1}))
    page = report_of(make_exact(3, ("dpo", "ipo")), None, tmp_path)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    names = [attributes.get("id") for tag, attributes in page.tags if tag == "td"]
    assert links.count("cells/dpo-abc-seed1/") == 1
    assert {link.removeprefix("#") for link in links if link and link.startswith("#")} <= set(names)


def test_tables_are_numbers_for_others(make_exact, tmp_path: Path) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    report_of(results, None, tmp_path)
    with (tmp_path / "tables" / "cells.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["cell"] for row in rows] == [f"{label}, seed {seed}" for label in ("dpo", "ipo") for seed in range(3)]
    assert float(rows[4]["hidden reward"]) == pytest.approx(results.values("ipo", "reward")[1], abs=5e-4)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the path")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_shows_it_without_errors(make_exact, tmp_path: Path, width: int) -> None:
    report_of(study_of(make_exact, "dpo", "dpo beta=0.5", "ipo", "cpl"), None, tmp_path)
    picture = tmp_path / "page.png"
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600",
        f"--screenshot={picture}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr  # errors, and what the page's own policy refused
    image = imread(picture)[..., :3]
    assert image.shape[:2] == (1600, width)
    assert image.std() > 0.05
    # Nothing runs over the right edge: the outermost columns are the page's background.
    assert np.ptp(image[:, -4:]) == 0
