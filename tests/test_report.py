"""The page about a run, and about several: what it says, what it must not say, and what it bears."""
import json
import math
import re

import pytest
from browsers import needs_chromium, show_as, start_chromium

from proxy_sft.commands import main
from proxy_sft.core.settings import load_settings, save_settings
from proxy_sft.launch.curves import axis_of, curve, thinned
from proxy_sft.launch.report import comparison_html, report_html

UGLY = "<script>window.pwned=1</script>"


def a_run(folder, losses, **settings):
    "What a training of so many steps leaves, with an evaluation."
    save_settings(load_settings("demo", output_dir=str(folder), **settings), folder)
    (folder / "logs").mkdir()
    lines = [dict(step=10 * i, max_steps=10 * len(losses), loss=loss, grad_norm=2 * loss, time=1e9 + 60 * i,
                  tokens_per_second=5000 + i, peak_memory_gib=3.5) for i, loss in enumerate(losses)]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, dict(step=lines[-1]["step"], eval_loss=losses[0])])
    (folder / "logs" / "progress.jsonl").write_text(text + '{"step": 30, "lo')
    rate = {"right": 9, "of": 10, "rate": 0.9, "interval": [0.6, 0.98]}
    answer = {"text": UGLY, "calls": None, "problem": "", "verdict": {"exact": False, "names": True}}
    turns = [{"row": 4, "message": 2, "expected": [{"name": UGLY, "arguments": {}}], "tuned": answer}]
    found = {"metrics": {"tuned": {"exact": rate}}, "turns": turns}
    (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


def converted(settings):
    "The folder of a conversion that rejected one row."
    folder = settings.converted_dir
    folder.mkdir(parents=True)
    report = {"rows": 3, "kept": 2, "rejected": {"count_mismatch": 1_234}, "by_source": {}}
    (folder / "report.json").write_text(json.dumps(report))
    entry = {"id": "r1", "line": 3, "reason": "count_mismatch", "message": f"2 calls, 1 results {UGLY}"}
    (folder / "rejected.jsonl").write_text(json.dumps(entry) + '\n{"id": "r2", "rea')


def test_a_report_opens_with_the_verdict_and_shows_everything(tmp_path):
    workspace = {"workspace": str(tmp_path / "secret-place"), "dataset": str(tmp_path / "secret-place" / "rows.jsonl")}
    converted(load_settings("demo", **workspace))
    page = report_html(a_run(tmp_path / "first", [8.0, 1.0, 0.1], **workspace))
    opening = page[page.index("<h1>"):page.index("<h2>")]
    for part in ("20 of 30 steps", "8.000 → 0.100", "exact calls tuned 90%", "2001-09-09", "2 min", "3.5 GiB"):
        assert part in opening, part
    assert "results and calls differ in number" in page and "row r1: 2 calls, 1 results" in page
    assert "failures: the first of 1" in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert str(tmp_path) not in page and "secret-place/" not in page.replace("…/", "")


def test_a_comparison_says_what_differs_and_draws_all_runs(tmp_path):
    runs = [a_run(tmp_path / name / "demo", [8.0, 1.0, last], learning_rate=rate, workspace=str(tmp_path))
            for name, last, rate in (("a", 0.1, 1e-3), ("b", 0.2, 2e-3))]
    page = comparison_html(runs)
    different = page[page.index("Settings that differ"):page.index("Reached")]
    assert re.findall(r"<td[^>]*>(\w+)</td>", different)[0] == "learning_rate" and "max_length" not in different
    assert "demo (1)" in page and "demo (2)" in page and str(tmp_path) not in page
    loss = page[page.index('aria-label="training loss"'):]
    assert loss[:loss.index("</svg>")].count("<polyline") == 2


def test_the_commands_take_one_run_or_several(tmp_path, capsys):
    first, second = (str(a_run(tmp_path / name, [3.0, 2.0])) for name in ("first", "second"))
    for runs in ([first], [first, second]):
        assert main(["report", *runs, "--output", str(tmp_path / "page.html")]) == 0
        assert "<!doctype html>" in (tmp_path / "page.html").read_text()
        assert main(["status", "--once", *runs]) == 0
    assert "no setting differs" in capsys.readouterr().out


@pytest.mark.parametrize("values", [
    [1.0, math.nan, 2.0], [1.0, math.inf, -math.inf, 2.0], [0.0, 0.0], [5, 5], [1e-12, 1e12], [-3.0, 1000.0],
    [0.0, 1e-300, 1e300],
], ids=str)
def test_a_curve_bears_any_values(values):
    "Every point lies in the figure, and no number that is none is drawn."
    drawn = curve("loss", {"a": list(enumerate(values))})
    for points in re.findall('points="([^"]*)"', drawn):
        for x, y in (map(float, pair.split(",")) for pair in points.split()):
            assert 0 <= x <= 400 and 0 <= y <= 230
    assert "nan" not in drawn and ">inf" not in drawn and drawn.count("text-anchor") >= 4


def test_axes_end_at_ticks_and_no_spike_is_lost():
    for values, logarithmic in (([0.123, 8.15], True), ([969.5, 1499.0], False), ([2e-7, 3e-3], True)):
        axis = axis_of(values, True)
        assert axis.logarithmic == logarithmic and axis.ticks[0] <= min(values) and axis.ticks[-1] >= max(values)
        assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in axis.ticks)
    points = [(i, 50.0 if i == 77_777 else 1.0) for i in range(100_000)]
    assert (77_777, 50.0) in thinned(points) and len(thinned(points)) < 500


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_a_telephone(tmp_path, scheme):
    "420 pixels wide, nothing has to be scrolled sideways; text and page differ in brightness."
    given = {"workspace": str(tmp_path), "dataset": f"./{'rows' * 30}.jsonl"}
    runs = [a_run(tmp_path / name, [8.0, 1.0, 0.1], **given) for name in ("a" * 60, "b")]
    converted(load_settings("demo", **given))
    browser = start_chromium()
    try:
        show_as(browser, 420, scheme)
        for name, text in (("report", report_html(runs[0])), ("comparison", comparison_html(runs))):
            (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
            browser.get((tmp_path / f"{name}.html").as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
            wider = "return [...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth + 1)"
            assert not browser.execute_script(f"{wider}.map(s => s.innerText.slice(0, 40))")
            broken = """return [...document.querySelectorAll('td:not([style])')].filter(cell => {
              const range = document.createRange(); range.selectNodeContents(cell);
              return range.getClientRects().length > 1; }).map(cell => cell.innerText)"""
            assert browser.execute_script(broken) == []  # no number goes over two lines
            page, ink = (browser.execute_script(f"return getComputedStyle(document.body).{what}")
                         for what in ("backgroundColor", "color"))
            brightness = lambda color: sum(map(int, re.findall(r"\d+", color)[:3]))
            assert (brightness(page) > 600 > 200 > brightness(ink)) == (scheme == "light")
            assert abs(brightness(page) - brightness(ink)) > 500
    finally: browser.quit()
