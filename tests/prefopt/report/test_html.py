from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from prefopt.errors import DataError
from prefopt.report import save_results, save_timings, write_report

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
    figures = [f"figures/{name}.png" for name in ("cost", "final_values", "learning_curves", "reward_kl")]
    assert names == [*figures, "report.html", "results.json", "table.md", "timings.json"]
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
    sources = [
        value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "srcset", "data")
    ]
    assert len(sources) == 4
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe", "base", "form"} & {tag for tag, _ in page.tags}
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", source)
    assert "prefers-color-scheme: dark" in source
    assert "@media print" in source


def test_embedded_pictures_are_the_written_ones(make_exact, tmp_path: Path) -> None:
    page = report_of(make_exact(1, ("dpo", "ipo")), None, tmp_path)
    embedded = {base64.b64decode((a["src"] or "").partition(",")[2]) for tag, a in page.tags if tag == "img"}
    assert embedded == {path.read_bytes() for path in (tmp_path / "figures").iterdir()}
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
    for module in ("statistics", "tables", "html"):
        monkeypatch.setattr(f"prefopt.report.{module}.scipy_installed", lambda: False)
    page = report_of(make_exact(3, ("dpo", "ipo")), None, tmp_path)
    assert "scipy is not installed" in page.text
    assert "±" not in page.text


def test_a_folder_without_results_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"results\.json: expected the results of a comparison"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
