"""Markdown tables with hostile text, read back by two parsers."""

import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bilevel.markdown import escaped, table
from bilevel.problems.llm_reweight.baselines import comparison

NASTY = ["a|b", "two\nlines", "<b>x</b>", "[x](javascript:1)", "`code`", "*a* _b_ c_d", "\\|"]


class Cells(HTMLParser):
    """The text of every cell, and all tags."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.tags, self.inside = [], set(), False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag in ("td", "th")
        self.cells += [""] if self.inside else []

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, text):
        if self.inside:
            self.cells[-1] += text


def python_markdown(text):
    return pytest.importorskip("markdown").markdown(text, extensions=["tables"])


def commonmark(text):
    return pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").render(text)


@pytest.mark.parametrize("parser", [python_markdown, commonmark])
@example(NASTY)
@given(st.lists(st.text("ab_*`|\\<>&[]()! \n\t~#", min_size=1), min_size=1, max_size=5))
def test_cells_are_read_back_as_they_are(parser, names):
    names = [" ".join(name.split()) for name in names]
    found = Cells(parser("\n".join(table(["x", *names], [["y", *names], ["z", *names[::-1]]]))))
    assert found.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert found.cells == ["x", *names, "y", *names, "z", *names[::-1]]


@pytest.mark.parametrize("parser", [python_markdown, commonmark])
def test_names_and_methods_of_a_comparison_are_escaped(parser):
    names = ["a|b", "<script>x", "two\nlines"]
    seed = {"loss": 1.0, "tokens": 0.0, "weights": dict.fromkeys(names, 1 / 3), "note": ""}
    row = {"method": "given:file=a|<b>.json", "loss": 1.0, "gain_over_uniform": 0.0} | {
        "interval": [0.0, 0.0],
        "better_than_uniform": "0 of 3",
        "share_of_budget": 0.0,
        "search_seconds": 0.0,
        "weights": seed["weights"],
    }
    body = {"rows": [row], "sentences": ["best: <b>"], "notes": [], "steps": 1, "seeds": 3}
    page = parser(comparison.markdown(body | {"budget_tokens": 1.0}))
    found = Cells(page)
    assert not found.tags & {"script", "b"} and "best: &lt;b&gt;" in page
    assert found.cells[7:11] == ["a|b", "<script>x", "two lines", "given:file=a|<b>.json"]
    assert len(found.cells) == 20


def test_plain_names_stay_readable():
    assert escaped("my_data-2.jsonl (old)") == "my_data-2.jsonl (old)"
    assert re.fullmatch(r"a\\\|b", escaped("a|b"))
