"""The text that comes with Python: the same every time, disjoint, and what is done without it."""

import ast
import gc
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from bilevel.problems.llm_reweight import LLMReweight, embedded
from bilevel.problems.llm_reweight.data import text_source
from bilevel.problems.llm_reweight.records import overlaps
from bilevel.run import main

SOURCES = ["docstrings", "reference", "code", "unicode", "scrambled", "base64"]


def digest(corpus):
    return hashlib.sha256(repr(corpus).encode()).hexdigest()


@pytest.fixture(scope="module")
def corpus():
    return embedded.corpus()


def test_it_is_the_same_in_every_process(corpus):
    code = (
        "import hashlib; from bilevel.problems.llm_reweight import embedded\n"
        "print(hashlib.sha256(repr(embedded.corpus()).encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(corpus)
    assert embedded.corpus() == corpus
    assert gc.isenabled()


def test_it_has_what_the_demonstration_says(corpus):
    assert list(corpus.sources) == SOURCES
    assert corpus.relevant == ("docstrings", "reference")
    assert corpus.notes == ()
    sizes = {n: sum(len(t.encode()) for t in texts) for n, texts in corpus.sources.items()}
    assert all(150_000 <= size <= 300_000 for size in sizes.values())
    for held in (corpus.target, corpus.test):
        assert 100_000 <= sum(len(t.encode()) for t in held) <= 150_000


def test_sources_target_and_test_are_disjoint(corpus):
    parts = corpus.sources | {"target": corpus.target, "test": corpus.test}
    named = [text_source(name, texts) for name, texts in parts.items()]
    for a, b in itertools.combinations(named, 2):
        assert overlaps(a, b) == [], f"{a.name} and {b.name}"


def test_target_and_test_come_from_modules_that_no_source_has(corpus, tmp_path):
    text = '"""{0} {1}"""\n\ndef f():\n    """{0} inner {1}"""\n    return 1\n'
    names = [f"module{i}" for i in range(40)]
    for name in names:
        (tmp_path / f"{name}.py").write_text(text.format(name, "word " * 60))
    found = embedded.corpus(stdlib=tmp_path)
    held = {t.split()[0] for t in (*found.target, *found.test)}
    train = {t.split()[0] for t in found.sources["docstrings"]}
    assert train | held == set(names)
    assert not train & held
    assert not {t.split()[0] for t in found.target} & {t.split()[0] for t in found.test}


def test_code_has_no_docstrings(tmp_path):
    body = "".join(f"def name{i}(a, b):\n    return a + b + {i}\n\n" for i in range(60))
    for i in range(20):
        documented = f'"""Words {i}."""\nclass A:\n    """More\n    words."""\n    x = 1\n\n' + body
        (tmp_path / f"module{i}.py").write_text(documented)
    code = "".join(embedded.corpus(stdlib=tmp_path).sources["code"])
    assert "def name3(a, b):" in code
    assert "ords" not in code


def test_without_library_sources_compiled_modules_are_used(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        found = embedded.corpus(stdlib=folder)
        assert "docstrings of compiled modules instead" in found.notes[0]
        assert found.sources["docstrings"] and found.target and found.test
        assert not set(found.target) & set(found.test)
        assert not {*found.target, *found.test} & set(found.sources["docstrings"])
        assert "source code left out: its text is missing from this Python" in found.notes
        assert "code" not in found.sources


def test_without_the_topics_the_reference_is_left_out(monkeypatch, tmp_path):
    (tmp_path / "os.py").write_text(f'"""{"word " * 60}"""\n')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # makes the import fail
    found = embedded.corpus(stdlib=tmp_path)
    assert "reference" not in found.sources
    assert "source reference left out: its text is missing from this Python" in found.notes
    assert found.relevant == tuple(n for n in ("docstrings",) if n in found.sources)


def test_modules_that_cannot_be_read_or_parsed_are_passed_over(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"def (:\n")
    (tmp_path / "zeros.py").write_bytes(b"x = 1\0\n")
    (tmp_path / "latin.py").write_bytes(b'"""' + b"caf\xe9 " * 60 + b'"""\n')
    found = embedded.corpus(stdlib=tmp_path)
    texts = [t for part in (*found.sources.values(), found.target, found.test) for t in part]
    assert any("caf\ufffd" in t for t in texts)


@pytest.mark.parametrize("missing", ["library", "topics"])
def test_a_run_goes_on_without_some_of_the_text(monkeypatch, tmp_path, missing):
    if missing == "library":
        monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    problem = LLMReweight(width=16, layers=1)
    assert problem.check() == []
    lines = problem.prepare()
    assert any("is missing from this Python" in line for line in lines)
    assert len(problem.names) >= 2


def test_statements_are_walked_as_by_ast():
    with open(embedded.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    want = [node for node in ast.walk(tree) if not isinstance(node, ast.expr)]
    found = list(embedded._statements(tree))
    kinds = (ast.stmt, ast.mod)
    assert [n for n in found if isinstance(n, kinds)] == [n for n in want if isinstance(n, kinds)]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_scramble_shuffles_the_characters_of_a_share(share):
    texts = [f"paragraph {i} of some words that can be shuffled" for i in range(50)]
    found = embedded.scramble(texts, share, seed=3)
    assert [Counter(t) for t in found] == [Counter(t) for t in texts]
    assert sum(a != b for a, b in zip(found, texts, strict=True)) == round(50 * share)
    assert found == embedded.scramble(texts, share, seed=3)
    assert share in (0.0, 1.0) or found != embedded.scramble(texts, share, seed=4)


@pytest.mark.parametrize("n", [2, 6])
def test_halves_part_a_source_evenly(n):
    texts = [str(i) for i in range(25)]
    parts = embedded.halves(texts, n)
    assert len(parts) == n
    assert sorted(itertools.chain(*parts), key=int) == texts
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.slow
def test_the_demonstration_is_true(tmp_path):
    """The weights find the relevant text, and fresh models are better for it."""
    assert main(["problem=llm_reweight", f"out={tmp_path / 'demo'}"]) == 0
    body = json.loads((tmp_path / "demo" / "weights.json").read_text())
    weights = {source["name"]: source["weight"] for source in body["sources"]}
    assert body["steps"] == 300 and body["verdict"]["steps"] == 200
    assert weights["docstrings"] + weights["reference"] >= 0.8
    assert len(body["verdict"]["gain_over_uniform"]) == 3
    assert min(body["verdict"]["gain_over_uniform"]) > 0
    assert body["verdict"]["gap_closed"] >= 0.8
