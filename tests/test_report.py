"""The report: names escaped, tables complete, plots legible, nothing from the network."""

import re
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


class Page(HTMLParser):
    """The table's rows, the tags and where links lead."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.links, self.inside = [], set(), [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [v for k, v in attributes if k in ("src", "href")]
        self.inside = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.inside:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module", params=[ODD, MANY, MANY[:2]], ids=["odd", "many", "two"])
def written(request, tmp_path_factory):
    """Folder and names of a report."""
    out, names = tmp_path_factory.mktemp("report"), request.param
    weights = np.random.default_rng(0).dirichlet(np.ones(len(names)))
    sources = [
        {"name": name, "weight": w, "share_tokens": w, "records": 10 + i, "trained_tokens": 1234567}
        | {"repeat_at_size_preserving_total": 1.0}
        for i, (name, w) in enumerate(zip(names, weights, strict=True))
    ]
    body = {"sources": sources, "unit": "example-mean", "model": "<b>tiny", "steps": 20}
    body |= {"counts": {"sweeps": 40}, "notes": ["a <i>note"]}
    body |= {"verdict": {"sentences": ["a <u>sentence"]}}
    start, history = 1 / len(names), []
    for step in range(1, 21):
        now = [start + (w - start) * step / 20 for w in weights]
        row = {"step": step, "upper": 5 - step / 10, "lower": 6 - step / 10}
        history.append(row | {"weights": dict(zip(names, now, strict=True))})
    report.write(body, history, out)
    return out, names


def test_every_source_has_its_row_and_its_name_as_given(written):
    out, names = written
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert [row[0] for row in page.rows[1:]] == names
    assert {len(row) for row in page.rows} == {6}


def test_names_and_notes_make_no_markup(written):
    out, _ = written
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not Page(text).tags & {"script", "b", "i", "u"}
    assert "a &lt;u&gt;sentence" in text


def test_the_page_needs_no_network_and_holds_the_plots(written):
    out, _ = written
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.links) == 3
    assert all(re.match("data:image/png;base64,", link) for link in page.links)


@pytest.mark.parametrize("name", ["weights", "losses", "bars"])
def test_axes_fill_the_plot_whatever_the_names(written, name):
    out, _ = written
    pixels = imread(out / "plots" / f"{name}.png")[..., :3].max(2)
    down = (pixels < 0.2).sum(0).max()  # the longest dark column is the left axis
    across = (pixels < 0.2).sum(1).max()
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
