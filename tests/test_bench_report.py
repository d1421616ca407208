"""The tables of the benchmarks' results (bench/report.py): who is bold, and that the pages say what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))
import report  # noqa: E402
import tables  # noqa: E402
import targets  # noqa: E402


def test_the_least_median_is_bold_whoever_has_it() -> None:
    cells = tables.bold({"kvpool-core": [5.0, 9.0], "kvbm-logical": [7.0, 8.0]})
    assert cells == {"kvpool-core": "5 / 9", "kvbm-logical": "**7 / 8**"}


def test_numbers_have_three_digits_before_the_point_only() -> None:
    assert [tables.number(x) for x in (12345.6, 100.4, 12.34, 1.234, 0)] == ["12,346", "100", "12.3", "1.23", "0"]


def test_pages_say_what_the_results_say() -> None:
    found = report.results()
    for page in report.PAGES:
        text = page.read_text()
        assert report.MARKED.search(text)
        assert report.with_tables(text, found) == text, f"{page.name}: run python bench/report.py"


def test_a_changed_result_changes_its_table() -> None:
    found = report.results()
    before = tables.rust(found)
    figures = found["rust"]["claim"]["W1"]["figures"]
    figures["kvpool-core"] = [1e6, 1e6]
    after = tables.rust(found)
    assert before != after
    rival = tables.pair(figures["kvbm-logical"])
    assert f"**{rival}**" in after.splitlines()[2]


def test_each_target_is_met_or_marked_as_missed() -> None:
    found = report.results()
    lines = targets.markdown(found).splitlines()[2:]
    judged = targets.figures(found)
    assert len(lines) == len(judged) > 20
    for line, (_, bound, kind, value, met) in zip(lines, judged, strict=True):
        assert met == (value >= bound if kind == "least" else value <= bound)
        assert met is not line.endswith("missed |")


def test_pictures_exist_for_each_that_a_page_shows() -> None:
    for page in report.PAGES:
        for part in page.read_text().split("](")[1:]:
            path = part.partition(")")[0]
            if path.endswith(".svg"):
                assert (page.parent / path).exists(), f"{page.name}: {path}"
