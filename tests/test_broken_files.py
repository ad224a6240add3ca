"""Thirty broken files through the command line: told in five parts, before a model is loaded."""

import gzip
import json
import re
import time

import pytest

from bilevel.problems.llm_reweight import model, report
from bilevel.run import main

GOOD = [{"text": f"the gull number {i} is back"} for i in range(8)]
USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "g(1)"}]}


def lines(*records):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records).encode()


# what is wrong: file name, content, line (None: the message names a record), words found
BROKEN = {
    "malformed line": ("a.jsonl", lines(*GOOD, "{'text': 'a'}"), 9, "malformed JSON"),
    "truncated last line": ("a.jsonl", lines(*GOOD, '{"text": "a'), 9, "truncated"),
    "trailing comma": ("a.jsonl", lines('{"text": "a"},', *GOOD), 1, "malformed JSON"),
    "two records on a line": ("a.jsonl", lines(*GOOD, '{"text": "a"}{"text": "b"}'), 9, "Extra"),
    "pretty printed": ("a.jsonl", b'{\n"text": "a"\n}\n', 1, "over several lines"),
    "truncated array": ("a.json", b'[{"text": "a"},\n{"text":', 2, "truncated"),
    "too deep": ("a.jsonl", lines(*GOOD, "[" * 200_000), 9, "cannot be read"),
    "Latin-1": ("a.jsonl", lines(*GOOD) + b'\n{"text": "\xe9"}', 9, "byte 0xe9"),
    "UTF-16": ("a.jsonl", lines(*GOOD).decode().encode("utf-16"), 1, "byte 0xff"),
    "null bytes": ("a.jsonl", lines(*GOOD) + b"\n\0\0\0", 9, "byte 0x00"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(lines(*GOOD))[:-9], 1, "truncated"),
    "not gzip": ("a.jsonl.gz", lines(*GOOD), 1, "not compressed"),
    "null": ("a.jsonl", lines(*GOOD, {"text": None}), 9, "null in field 'text'"),
    "number": ("a.jsonl", lines(*GOOD, {"text": 3.5}), 9, "the number 3.5"),
    "empty": ("a.jsonl", lines(*GOOD, "", {"text": " "}), 10, "an empty string"),
    "half a surrogate": ("a.jsonl", lines(*GOOD, '{"text": "\\ud800"}'), 9, "surrogate"),
    "no object": ("a.jsonl", lines(*GOOD, "7"), 9, "the number 7"),
    "key missing from a line on": ("a.jsonl", lines(*GOOD, {"body": "a"}), 9, "keys body"),
    "key twice": ("a.jsonl", lines(*GOOD, '{"text": "a", "text": "b"}'), 9, "'text' twice"),
    "mixed schemas": ("a.jsonl", lines(*GOOD, {"prompt": "p", "completion": "c"}), 9, "mixed"),
    "no answer": ("a.jsonl", lines({"prompt": "p", "completion": ""}), 1, "nothing to train on"),
    "unknown role": ("a.jsonl", lines({"messages": [USER | {"role": "bot"}]}), 1, "role 'bot'"),
    "no assistant turn": ("a.jsonl", lines({"messages": [USER]}), 1, "no assistant turn"),
    "no messages": ("a.jsonl", lines({"messages": []}), 1, "an empty list"),
    "no content": ("a.jsonl", lines({"messages": [{"role": "user"}]}), 1, "keys role"),
    "image": (
        "a.jsonl",
        lines({"messages": [USER | {"content": [{"type": "image"}]}]}),
        1,
        "image",
    ),
    "broken call": ("a.jsonl", lines({"messages": [USER, CALL]}), 1, "no call"),
    "preference set": ("a.jsonl", lines({"chosen": "a", "rejected": "b"}), 1, "a preference set"),
    "cells": ("a.csv", b"text,id\na,1\nb\n", 3, "1 cells"),
    "open quote": ("a.tsv", b'text\na\n"b\n', 3, "a row that cannot be read"),
    "JSON in a text file": ("a.txt", lines(*GOOD), 1, "a JSON object"),
    "record of an array": ("a.json", json.dumps([*GOOD, {"text": 1}]).encode(), None, "number 1"),
}
FAULT = re.compile(
    r"error: (?P<file>.*?)(:(?P<line>\d+)|: record (?P<record>\d+) \(counting from 0\)): "
    r"found (?P<found>.+?), expected (?P<expected>.+?); fix: (?P<fix>.+)\."
)


def test_there_are_thirty():
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_in_five_parts(name, tmp_path, capsys, monkeypatch):
    file, data, line, words = BROKEN[name]
    bad, good, target = (tmp_path / n for n in (file, "good.jsonl", "target.jsonl"))
    bad.write_bytes(data)
    good.write_bytes(lines(*GOOD))
    target.write_bytes(lines(*({"text": f"row {i}"} for i in range(8))))

    def loaded(*arguments, **options):
        raise AssertionError("a model was loaded")

    for function in ("tiny_model", "load_model", "tiny_tokenizer", "load_tokenizer"):
        monkeypatch.setattr(model, function, loaded)
    began = time.process_time()
    options = ["problem=llm_reweight", f"out={tmp_path / 'out'}", f"problem.target={target}"]
    assert main([*options, f"problem.sources=good={good} bad={bad}"]) == 2
    assert time.process_time() - began < 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    fault = FAULT.fullmatch(said[0])
    assert fault, said[0]
    assert fault["file"] == str(bad)
    assert fault["line"] == (str(line) if line else None)
    assert fault["record"] == (None if line else "8")
    assert words in fault["found"]
    assert fault["expected"] and fault["fix"]
    assert not (tmp_path / "out").exists()


def test_skipping_goes_on_and_says_what_was_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *a, **k: None)  # plots are slow
    bad, good, target = (tmp_path / f"{n}.jsonl" for n in ("bad", "good", "target"))
    bad.write_bytes(lines(*GOOD, "{'a'", {"text": 1}))
    good.write_bytes(lines(*({"text": f"another {i}"} for i in range(8))))
    target.write_bytes(lines(*({"text": f"row {i}"} for i in range(8))))
    options = ["problem=llm_reweight", f"out={tmp_path / 'out'}", f"problem.target={target}"]
    options += [f"problem.sources={good} {bad}", "problem.on_bad_record=skip", "verdict=false"]
    options += ["steps=2", "problem.batch=4", "problem.width=16", "problem.layers=1"]
    assert main(options) == 0
    said = capsys.readouterr().out
    assert f"warning: bad: 2 bad records left out, such as {bad}:9: found malformed" in said
    assert "source bad: text, 8 records" in said
    notes = json.loads((tmp_path / "out" / "weights.json").read_text())["notes"]
    assert any("2 bad records left out" in note for note in notes)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ("body", "expected key=column"),
        ("body=text", "a key among system"),
        ("sea.text=body", "a source among one, two, target"),
        ("text=nope", "found no record with the key 'nope' in any file"),
        ("two.text=nope", "found no record with the key 'nope' in "),
    ],
)
def test_wrong_columns_are_told(columns, words, tmp_path, capsys):
    for name in ("one", "two", "target"):
        texts = ({"text": f"{name} {i}"} for i in range(8))
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*texts))
    sources = f"{tmp_path / 'one.jsonl'} {tmp_path / 'two.jsonl'}"
    options = ["problem=llm_reweight", f"problem.sources={sources}"]
    options += [f"problem.target={tmp_path / 'target.jsonl'}", f"problem.columns={columns}"]
    assert main(options) == 2
    assert words in capsys.readouterr().err
