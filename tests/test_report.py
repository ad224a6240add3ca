"""The report: names escaped, tables complete, plots legible, nothing from the network."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from bilevel.problems.llm_reweight import report

ODD = [
    "<script>alert(1)</script>",
    "\"quotes\" & 'more'",
    "Ünïcödé 数据 🎉",
    "very_" * 60,
    "a$b$c_{x}^2",
    "$",
    "_hidden",
    "line\nbreak",
    "{{ 7 * 7 }}",
    "{% raise %}",
    "\\",
    "100 %",
]
MANY = [f"source-{i:02d}" for i in range(30)]


SEEDS = 3


class Page(HTMLParser):
    """The rows of every table, all tags, where links lead, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.links, self.inside, self.text = {}, set(), [], False, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        self.inside = tag in ("td", "th")
        if tag == "table":
            self.rows = self.tables[dict(attributes)["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data


def history(names, weights, seed=0):
    """Twenty steps from even weights to these; the loss of source i is i + 1 / step."""
    start, rows, noise = 1 / len(names), [], np.random.default_rng(seed)
    for step in range(1, 21):
        now = [start + (w - start) * step / 20 for w in weights]
        row = {"step": step, "upper": 5 - step / 10, "lower": 6 - step / 10 + noise.normal() / 9}
        losses = {name: i + 1 / step for i, name in enumerate(names)}
        row["weights"] = dict(zip(names, now, strict=True))
        rows.append(row | {"losses": losses})
    return rows


def content(names, weights):
    sources = [
        {"name": name, "weight": w, "share_tokens": w, "records": 10 + i, "trained_tokens": 1234567}
        | {"repeat_at_size_preserving_total": 1.0, "weight_std": 0.01}
        for i, (name, w) in enumerate(zip(names, weights, strict=True))
    ]
    body = {"sources": sources, "unit": "example-mean", "model": "<b>tiny", "steps": 20}
    body |= {"counts": {"sweeps": 40}, "notes": ["a <i>note"], "warnings": ["a <em>warning"]}
    sentences = ["test loss <u>of models", "the learned mixture beats uniform in 3 of 3 seeds"]
    losses = {"learned": [3.0, 3.1, 3.2], "uniform": [3.3, 3.4, 3.5]}
    return body | {"verdict": {"sentences": sentences, "losses": losses}}


def lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module", params=[ODD, MANY, MANY[:2]], ids=["odd", "many", "two"])
def written(request, tmp_path_factory):
    """Folder and names of a report of several seeds, with all that may lie beside."""
    out, names = tmp_path_factory.mktemp("report"), request.param
    draws = np.random.default_rng(0).dirichlet(np.ones(len(names)), size=SEEDS)
    for seed, weights in enumerate(draws):
        rows = history(names, weights, seed)
        lines(out / f"seed-{seed}" / "trajectory.jsonl", rows)
        used = [{"step": r["step"], "seconds": r["step"], "resident": 10**9} for r in rows]
        lines(out / f"seed-{seed}" / "resources.jsonl", [u | {"peak": 2 * 10**9} for u in used])
    parts = {"weights": 1.5e9, "<s>activations": 0.25e9, "buffers": 0}
    plan = {
        "footprint": {"peak": "at the head", "total": 1.75e9, "moments": {"at the head": parts}}
    }
    (out / "plan.json").write_text(json.dumps(plan | {"here": True, "device": {"name": "here"}}))
    row = {"loss": 3.0, "gain_over_uniform": 0.1, "interval": [-0.1, 0.3], "share_of_budget": 0.5}
    compared = [row | {"method": m, "better_than_uniform": "2 of 3"} for m in ("<tt>one", "two")]
    (out / "comparison.json").write_text(json.dumps({"rows": compared, "sentences": ["<q>best"]}))
    report.write(content(names, draws.mean(0)), rows, out)
    return out, names


def page(out):
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_every_source_has_its_row_and_its_name_as_given(written):
    out, names = written
    rows = page(out).tables["sources"]
    assert [row[0] for row in rows[1:]] == names
    assert {len(row) for row in rows} == {7}


def test_a_comparison_of_other_weights_is_not_shown(written, tmp_path):
    out, names = written
    (tmp_path / "comparison.json").write_text((out / "comparison.json").read_text())
    rows = history(names, [1 / len(names)] * len(names), 0)
    body = content(names, [1 / len(names)] * len(names))
    for compared in (True, False):
        report.write(body, rows, tmp_path, compared=compared)
        assert ("<q>best" in str(page(tmp_path).__dict__)) is compared


def test_texts_make_no_markup(written):
    found = page(written[0])
    assert not found.tags & {"script", "b", "i", "u", "em", "s", "tt", "q"}
    texts = ("<b>tiny", "a <i>note", "a <em>warning", "loss <u>of", "<s>activations", "<tt>one")
    assert all(text in found.text for text in texts)


def test_the_verdict_comes_first(written):
    text = " ".join(page(written[0]).text.partition("Learned data weights")[2].split())
    first = "Learned data weights The learned mixture beats uniform in 3 of 3 seeds. Test loss <u>"
    assert text.startswith(first.removeprefix("Learned data weights "), text.index("The learned"))
    assert text.index("The learned mixture") < text.index("Warning: a <em>") < text.index("Sources")


def test_tables_beside_are_shown(written):
    tables = page(written[0]).tables
    assert [row[0] for row in tables["comparison"][1:]] == ["<tt>one", "two"]
    assert tables["comparison"][1][1:] == ["3.000", "+0.100", "-0.100 to +0.300", "2 of 3", "50 %"]
    plan = {row[0]: row[1] for row in tables["plan"]}
    assert plan["weights"] == "1.50" and plan["planned in all, on here"] == "1.75"
    assert plan["measured, the peak of the run"] == "2.00" and "buffers" not in plan
    assert "Time of the search: 60 s" in page(written[0]).text  # three seeds of 20


def test_the_page_needs_no_network_and_is_small(written):
    out, _ = written
    found = page(out)
    assert len(found.links) == 6
    assert all(re.match("data:image/png;base64,", link) for link in found.links)
    assert "link" not in found.tags and "@import" not in (out / "report.html").read_text()
    assert (out / "report.html").stat().st_size < 2e6


def test_bands_are_over_the_seeds():
    paths = [([1, 2, 3], [0.0, 1.0, 2.0]), ([2, 3], [3.0, 6.0])]
    assert report._mean(paths) == ([2, 3], [2.0, 4.0], [1.0, 2.0], [3.0, 6.0])


def test_smoothing_keeps_steps_and_lines():
    steps = list(range(100))
    assert report._smooth(steps, [2.0 * s for s in steps])[1][10:90] == [
        2.0 * s for s in steps[10:90]
    ]
    assert report._smooth([1, 2], [5.0, 7.0]) == ([1, 2], [5.0, 7.0])


def test_paths_leave_out_what_is_not_known_and_stay_short():
    rows = [{"step": i, "losses": {"a": None if i % 2 else i}} for i in range(4)]
    assert report._paths([rows, [{"step": 1}]], "losses", "a") == [([0, 2], [0, 2]), ([], [])]
    long = [{"step": i, "upper": 0.0} for i in range(10 * report.POINTS)]
    assert len(report._paths([long], "upper")[0][0]) == report.POINTS


def test_one_seed_alone_without_verdict_or_anything_beside(tmp_path):
    body = content(MANY[:2], [0.5, 0.5])
    del body["verdict"], body["warnings"]
    rows = [{k: v for k, v in r.items() if k != "losses"} for r in history(MANY[:2], [0.5, 0.5])]
    report.write(body, rows, tmp_path)
    found = page(tmp_path)
    assert list(found.tables) == ["sources"] and len(found.links) == 3
    assert "there is no verdict" in found.text and "seeds" not in found.text
    assert {len(row) for row in found.tables["sources"]} == {6}


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_scrolls_tables_but_not_the_page(written, tmp_path, width):
    out, _ = written
    code = """
    const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll, pre") &&
        e.getBoundingClientRect().right > innerWidth).map(e => e.tagName)
    const loaded = [...document.images].every(i => i.complete && i.naturalWidth > 100)
    const tables = [...document.querySelectorAll(".scroll")].map(e => e.clientWidth)
    parent.document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth, wide,
        loaded, Math.max(...tables), getComputedStyle(document.body).fontSize])"""
    code = f"<script>addEventListener('load', () => {{ {code} }})</script>"
    inner = html.escape((out / "report.html").read_text(encoding="utf-8") + code)
    frame = f'<title>nothing</title><iframe width={width} height=844 srcdoc="{inner}"></iframe>'
    (tmp_path / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{frame}")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    own = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900"]
    command = [CHROMIUM, *flags.split(), *own, (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1])
    inside, whole, wide, loaded, tables, size = json.loads(title)
    assert (inside, size, wide) == (width, "16px", [])  # headless windows have 500 at least
    assert whole <= inside and tables < inside and loaded


@pytest.mark.parametrize("name", ["weights", "losses", "bars", "sources", "memory", "verdict"])
def test_axes_fill_the_plot_whatever_the_names(written, name):
    out, _ = written
    pixels = imread(out / "plots" / f"{name}.png")[..., :3].max(2)
    down = (pixels < 0.6).sum(0).max()  # the longest dark column is the left axis
    across = (pixels < 0.6).sum(1).max()
    assert down >= 0.6 * pixels.shape[0] or down >= 200
    assert across >= 0.3 * pixels.shape[1]


def test_bars_have_room_for_their_names(written):
    out, names = written
    assert imread(out / "plots" / "bars.png").shape[0] >= 25 * len(names)


@pytest.mark.parametrize("name", ODD)
def test_names_in_plots_are_short_and_plain(name):
    plain = report._plain(name)
    assert len(plain.replace("\\$", "$")) <= 28
    assert "\n" not in plain and not plain.startswith("_")
    assert re.search(r"(?<!\\)\$", plain) is None
