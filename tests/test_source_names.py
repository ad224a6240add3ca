"""What sources are called, and which records of one stand in another."""

import json
import os

import pytest
from records_case import OK

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.examples import Source
from bilevel.problems.llm_reweight.records import (
    name_paths,
    overlaps,
    read_source,
)


def source_of(tmp_path, name: str, texts: list[str]) -> Source:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return read_source(name, path)


def test_overlaps_ignore_whitespace_and_count_each_record_once(tmp_path):
    a = source_of(tmp_path, "a", ["x y", "z", " x\n\ty "])
    b = source_of(tmp_path, "b", ["w", "x  y", "x y", "Z"])
    assert overlaps(a, b) == [(0, 1), (2, 1)]
    assert overlaps(b, a) == [(1, 0), (2, 0)]
    assert overlaps(a, source_of(tmp_path, "c", ["xy"])) == []


def test_overlaps_between_formats(tmp_path):
    a = source_of(tmp_path, "a", ["p c"])
    path = tmp_path / "b.jsonl"
    path.write_text('{"prompt": "p ", "completion": "c"}')
    assert overlaps(a, read_source("b", path)) == [(0, 0)]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([], {}),
        (["x/a.jsonl", "code=x/b.json"], {"a": "x/a.jsonl", "code": "x/b.json"}),
        (["x/a.json", "y/a.json", "b.txt"], {"x-a": "x/a.json", "y-a": "y/a.json", "b": "b.txt"}),
        (["p/x/a.json", "q/x/a.json"], {"p-x-a": "p/x/a.json", "q-x-a": "q/x/a.json"}),
        (["a=x/b.json", "y/a.json"], {"a": "x/b.json", "y-a": "y/a.json"}),
        (["x/lr=1.json"], {"lr=1": "x/lr=1.json"}),
        (["q=x/lr=1.json"], {"q": "x/lr=1.json"}),
    ],
)
def test_names(entries, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_paths(entries) == names
    assert list(name_paths(entries)) == list(names)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (["n=a.json", "n=b.json"], "the name 'n' for several files"),
        (["a.json", "a.jsonl"], "several files"),
        (["a.json", "./a.json"], "the same file twice"),
        (["n=a.json", "m=x/../a.json"], "the same file twice"),
        (["n="], "name=path or path"),
        (["=a.json"], "name=path or path"),
        ([""], "name=path or path"),
        (["a.json", "b\0.json"], "a null byte"),
    ],
)
def test_names_refused(entries, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        name_paths(entries)


def test_a_name_with_a_slash_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(OK)
    with pytest.raises(InputError, match="the name 'x/y' with a slash"):
        name_paths(["x/y=a.jsonl"])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y=a.jsonl").write_text(OK)
    assert name_paths(["x/y=a.jsonl"]) == {"y=a": "x/y=a.jsonl"}


def test_link_is_the_same_file(tmp_path):
    (tmp_path / "a.jsonl").write_text(OK)
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    with pytest.raises(InputError, match="the same file twice"):
        name_paths([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
