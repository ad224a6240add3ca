"""Training files that are refused, or read without their bad records: where, why, what to do."""

import sys

import pytest
from records_case import GZIP, OK, ZST, messages, table

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.records import (
    read_source,
    read_sources,
)

# file name, its bytes, what the message says; "@" stands for the file's path
BROKEN = {
    "empty file": ("a.jsonl", b"", ["@: found an empty file"]),
    "only blank lines": ("a.jsonl", b"\n \n\n", ["@: found no records"]),
    "only a mark": ("a.jsonl", b"\xef\xbb\xbf", ["@: found no records"]),
    "empty array": ("a.json", b"[]", ["@: found no records"]),
    "empty txt": ("a.txt", b"\n\n", ["@: found no records"]),
    "malformed": (
        "a.jsonl",
        (OK + "{'text': 'b'}\n" + OK).encode(),
        ["@:2: found malformed JSON at column 2"],
    ),
    "malformed last": (
        "a.jsonl",
        (OK + "{'text': 'b'}").encode(),
        ["@:2: found malformed JSON at column 2"],
    ),
    "truncated string": ("a.jsonl", (OK + '{"text": "b').encode(), ["@:2:", "truncated"]),
    "truncated nested": (
        "a.jsonl",
        (messages(("assistant", "x")) + "\n" + messages(("assistant", "y"))[:-2]).encode(),
        ["@:2:", "truncated"],
    ),
    "truncated array": ("a.json", b'[{"text": "a"},\n {"text": "b"', ["@:2:", "truncated"]),
    "malformed array": ("a.json", b'[{"text": "a"},\n {text: 1}]', ["@:2:", "column 3"]),
    "trailing comma": ("a.jsonl", b'{"text": "a"},\n{"text": "b"}\n', ["@:1:", "without commas"]),
    "two on a line": ("a.jsonl", b'{"text": "a"}{"text": "b"}\n', ["@:1:", "own line"]),
    "pretty printed": ("a.jsonl", b'{\n "text": "a"\n}\n', ["@:1:", "over several lines"]),
    "too deep": ("a.jsonl", (OK + "[" * 200_000).encode(), ["@:2:", "cannot be read"]),
    "latin-1": (
        "a.jsonl",
        (OK + '{"text": "é"}').encode("latin-1"),
        ["@:2:", "byte 0xe9 at byte offset 24", "iconv -f WINDOWS-1252 -t UTF-8"],
    ),
    "latin-1 behind a mark": (
        "a.jsonl",
        b"\xef\xbb\xbf" + '{"text": "é"}'.encode("latin-1"),
        ["@:1:", "byte 0xe9 at byte offset 13"],
    ),
    "utf-16": ("a.jsonl", OK.encode("utf-16"), ["@:1:", "byte offset 0", "iconv -f UTF-16"]),
    "utf-16 no mark": ("a.jsonl", OK.encode("utf-16-le"), ["@:1:", "offset 1", "UTF-16"]),
    "gzip cut off": ("a.jsonl.gz", GZIP[:-9], ["@:1: found gzip data that stops early"]),
    "gzip damaged": ("a.jsonl", GZIP[:-8] + bytes(8), ["@:1: found gzip data that is damaged"]),
    "not gzip": ("a.jsonl.gz", OK.encode(), ["@:1: found a .gz file that is not", "end in .jsonl"]),
    "zst cut off": ("a.jsonl.zst", ZST[:-4], ["@:1: found zst data that stops early"]),
    "zst damaged": ("a.jsonl", ZST[:6] + b"\xff" * 9, ["@:1: found zst data that is damaged"]),
    "not parquet": ("a.parquet", b"PAR1 and so on", ["@: found no readable Parquet data"]),
    "cells": ("a.csv", b"prompt,completion\nP,C\np,c,d\n", ["@:3: found 3 cells", "2 as in the"]),
    "open quote": ("a.csv", b'text\na\n"b\nc\n', ["@:3: found a row that cannot be read"]),
    "column twice": ("a.csv", b"text,text\na,b\n", ["@:1: found the column 'text' twice"]),
    "no header": ("a.csv", b"a,b\nc,d\n", ["@:2: found keys a, b", "problem.columns"]),
    "empty cell": ("a.tsv", b"question\tanswer\nq\t\n", ["@:2: found an empty string", "'answer'"]),
    "no rows": ("a.csv", b"text\n", ["@: found no records"]),
    "no instances": (
        "a.json",
        b'{"type": "text_only", "instances": []}',
        ["@: found no instances"],
    ),
    "wrong instance": (
        "a.json",
        b'{"type": "text_only",\n "instances": [{"text": "a"}, {"text": 1}]}',
        ["@: record 1 (counting from 0): found the number 1"],
    ),
    "key twice": (
        "a.jsonl",
        (OK + '{"text": "a", "text": "b"}').encode(),
        ["@:2: found the key 'text' twice, expected every key once"],
    ),
    "key twice inside": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        ["@:1: found the key 'role' twice in messages[0]"],
    ),
    "preference": (
        "a.jsonl",
        b'{"prompt": "p", "chosen": "c", "rejected": "r"}',
        ["@:1: found a preference set", "problem.use_chosen=true"],
    ),
    "sharegpt role": (
        "a.jsonl",
        b'{"conversations": [{"from": "bot", "value": "a"}]}',
        ["@:1: found role 'bot' in conversations[0]", "human, user, gpt"],
    ),
    "function call": (
        "a.jsonl",
        b'{"conversations": [{"from": "function_call", "value": "f(1)"}]}',
        ["@:1:", "conversations[0].value[0] that is no call"],
    ),
    "tool call": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]}',
        ["@:1: found an object in messages[0].tool_calls[0] that is no call"],
    ),
    "tools": (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "search"}',
        ["@:1: found the string 'search' in field 'tools'"],
    ),
    "history": (
        "a.jsonl",
        b'{"instruction": "i", "output": "o", "history": [["a"]]}',
        ["@:1: found a list in field 'history'", "[[question, answer], ...]"],
    ),
    "completion without an answer": (
        "a.jsonl",
        b'{"prompt": "p", "completion": [{"role": "user", "content": "u"}]}',
        ["@:1: found no assistant turn in field 'completion'"],
    ),
    "null text": ("a.jsonl", (OK + '{"text": null}').encode(), ["@:2: found null", "'text'"]),
    "numeric text": ("a.jsonl", (OK + '{"text": 3.5}').encode(), ["@:2: found the number 3.5"]),
    "boolean text": ("a.jsonl", b'{"text": true}', ["@:1: found the boolean true"]),
    "list text": ("a.jsonl", b'{"text": ["a"]}', ["@:1: found a list in field 'text'"]),
    "empty text": ("a.jsonl", (OK + '\n{"text": " "}').encode(), ["@:3: found an empty string"]),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}', ["@:1:", "surrogate"]),
    "not an object": ("a.jsonl", (OK + '"b"\n').encode(), ["@:2: found the string 'b'"]),
    "number record": ("a.jsonl", (OK + "7\n").encode(), ["@:2: found the number 7"]),
    "array item": ("a.json", b'[{"text": "a"}, 5]', ["@: record 1 (counting from 0): found the n"]),
    "array field": ("a.json", b'[{"text": "a"}, {"text": null}]', ["@: record 1", "found null"]),
    "unknown keys": (
        "a.jsonl",
        b'{"body": "a", "id": 1}',
        ["@:1: found keys body, id", "text {text}", "messages {messages}"],
    ),
    "no keys": ("a.jsonl", b"{}", ["@:1: found keys (none)"]),
    "instruction alone": ("a.jsonl", b'{"instruction": "a"}', ["@:1: found keys instruction"]),
    "mixed": (
        "a.jsonl",
        (OK + '\n{"prompt": "p", "completion": "c"}\n').encode(),
        ["@:3: found mixed schemas", "prompt_completion", "line 3", "text {text} as at line 1"],
    ),
    "mixed aliases": (
        "a.jsonl",
        b'{"input": "p", "output": "c"}\n{"instruction": "i", "input": "p", "output": "c"}\n',
        ["@:2: found mixed schemas, alpaca"],
    ),
    "mixed array": (
        "a.json",
        b'[{"text": "a"}, {"prompt": "p", "completion": "c"}]',
        ["@: record 1", "mixed schemas", "as at record 0"],
    ),
    "empty completion": (
        "a.jsonl",
        b'{"prompt": "p", "completion": ""}',
        ["@:1:", "'completion' (nothing to train on)"],
    ),
    "null prompt": ("a.jsonl", b'{"question": null, "answer": "c"}', ["@:1:", "'question'"]),
    "both fields": ("a.jsonl", b'{"query": 1, "response": 2}', ["'query'", "'response'"]),
    "empty alpaca": ("a.jsonl", b'{"instruction": "i", "output": ""}', ["@:1:", "'output' (noth"]),
    "alpaca input": (
        "a.jsonl",
        b'{"instruction": "i", "input": 4, "output": "o"}',
        ["@:1: found the number 4 in field 'input'"],
    ),
    "unknown role": (
        "a.jsonl",
        messages(("human", "hi"), ("gpt", "yo")).encode(),
        ["@:1: found role 'human' in messages[0]", "system, user, assistant, tool", "'gpt'"],
    ),
    "no assistant": ("a.jsonl", messages(("user", "hi")).encode(), ["@:1:", "no assistant turn"]),
    "empty answer": (
        "a.jsonl",
        messages(("user", "hi"), ("assistant", "")).encode(),
        ["@:1:", "messages[1].content (nothing to train on)"],
    ),
    "null content": (
        "a.jsonl",
        messages(("user", None), ("assistant", "a")).encode(),
        ["@:1: found null in messages[0].content"],
    ),
    "image": (
        "a.jsonl",
        messages(("user", [{"type": "image", "url": "u"}]), ("assistant", "a")).encode(),
        ["@:1: found type 'image' in messages[0].content[0]"],
    ),
    "no messages": ("a.jsonl", b'{"messages": []}', ["@:1: found an empty list"]),
    "messages string": ("a.jsonl", b'{"messages": "hi"}', ["@:1: found the string 'hi'"]),
    "sharegpt": ("a.jsonl", b'{"messages": [{"from": "human"}]}', ["@:1: found keys from"]),
    "bare message": ("a.jsonl", b'{"messages": ["hi"]}', ["@:1:", "'hi' in messages[0]"]),
    "json in txt": (
        "a.txt",
        b'{"text": "a"}\n{"text": "b"}\n',
        ["@:1:", "a JSON object", ".jsonl"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused(name, tmp_path):
    file, data, words = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_source("a", path)
    message = str(caught.value)
    for word in words:
        assert word.replace("@", str(path)) in message
    for fault in caught.value.faults:
        assert fault.startswith(str(path))
        assert ": found " in fault and ", expected " in fault and "; fix: " in fault


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.jsonl").write_text(OK)
    with pytest.raises(InputError, match=r"tran\.jsonl: found no such file.*/train\.jsonl"):
        read_source("a", tmp_path / "tran.jsonl")
    with pytest.raises(InputError, match="nothing there is similar"):
        read_source("a", tmp_path / "zzzzzz")
    with pytest.raises(InputError, match="found no folder"):
        read_source("a", tmp_path / "none" / "a.jsonl")


def test_folder_and_unreadable_path(tmp_path):
    with pytest.raises(InputError, match="found a folder, expected a file"):
        read_source("a", tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        read_source("a", "a\0b")


def test_five_faults_are_shown_and_the_rest_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n' * 12)
    with pytest.raises(InputError) as caught:
        read_source("a", path)
    assert len(caught.value.faults) == 6
    assert caught.value.faults[-1] == f"{path}: and 7 more."


def test_faults_of_all_files_come_together(tmp_path):
    (tmp_path / "good.jsonl").write_text(OK)
    (tmp_path / "bad.jsonl").write_text("{}")
    paths = {n: str(tmp_path / f"{n}.jsonl") for n in ("good", "bad", "gone")}
    with pytest.raises(InputError) as caught:
        read_sources(paths)
    assert len(caught.value.faults) == 2
    assert "bad.jsonl:1" in str(caught.value) and "gone.jsonl" in str(caught.value)
    sources = read_sources({"good": paths["good"]})
    assert list(sources) == ["good"] and sources["good"].name == "good"


def test_bad_records_are_left_out_and_counted(tmp_path):
    lines = [OK.strip(), "{'a'", '{"text": 5}', '{"prompt": "p", "completion": "c"}', "7", "{}"]
    lines += ['{"prompt": "q", "completion": "c"}', '{"text": "b"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"text": "\xe9"}\n{"text": "c"}')
    source = read_source("a", path, Reading(skip=True))
    assert [e.text() for e in source.examples] == ["a", "b", "c"]
    assert [e.line for e in source.examples] == [1, 8, 10]
    assert source.skipped == 7
    assert len(source.complaints) == 5
    assert ":9: found byte 0xe9" in source.complaints[0]
    path.write_text("\n".join(lines[1:3]))
    with pytest.raises(InputError, match=":2: found the number 5"):
        read_source("a", path, Reading(skip=True))


@pytest.mark.parametrize(("package", "file"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl")])
def test_a_missing_reader_names_the_extra(package, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    path = tmp_path / file
    path.write_bytes(ZST if package == "zstandard" else table([{"text": "a"}]))
    with pytest.raises(InputError, match=rf"needs {package}.*pip install 'bilevel\[formats\]'"):
        read_source("a", path)
