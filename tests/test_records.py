"""Training files: what is accepted, what is refused, and that a refusal says where and why."""

import gzip
import hashlib
import io
import json
import os
import sys

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.examples import Source
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.records import (
    name_paths,
    overlaps,
    read_records,
    read_source,
    read_sources,
)
from bilevel.problems.llm_reweight.templates import Style, named, write

OK = '{"text": "a"}\n'
GZIP = gzip.compress(OK.encode(), mtime=0)
ZST = zstandard.ZstdCompressor().compress(OK.encode())


def written(example):
    return list(write(example, Style(), named("chatml", end=""))[0])


def table(rows):
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def messages(*turns):
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]})


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


TEXT = [[("a", True)], [("b", True)]]
CHAT = [("user", "hi"), ("assistant", "yo"), ("user", "more"), ("assistant", "end")]
CHAT_SEGMENTS = [
    ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", False),
    ("yo<|im_end|>", True),
    ("\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n", False),
    ("end<|im_end|>", True),
    ("\n", False),
]
PARTS = [
    ("system", "s"),
    ("tool", "t"),
    ("assistant", [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]),
]
PARTS_SEGMENTS = [
    ("<|im_start|>system\ns<|im_end|>\n<|im_start|>tool\nt<|im_end|>\n", False),
    ("yo<|im_end|>", True),
    ("\n", False),
]
PARTS_SEGMENTS[0] = (PARTS_SEGMENTS[0][0] + "<|im_start|>assistant\n", False)
PAIR = [[("p", False), ("c", True)]]

SHAREGPT = [("human", "hi"), ("gpt", "yo"), ("human", "more"), ("gpt", "end")]

# file name, its bytes, format, segments, lines
GOOD = {
    "text": ("a.jsonl", b'{"text": "a", "id": 1}\n{"text": "b"}', "text", TEXT, [1, 2]),
    "blank lines": ("a.jsonl", b'\n{"text": "a"}\n\n{"text": "b"}\n\n', "text", TEXT, [2, 4]),
    "mark": ("a.jsonl", b'\xef\xbb\xbf{"text":"a"}\n{"text":"b"}\n', "text", TEXT, [1, 2]),
    "crlf": ("a.jsonl", b'{"text": "a"}\r\n{"text": "b"}\r\n', "text", TEXT, [1, 2]),
    "array": ("a.json", b'[{"text": "a"}, {"text": "b"}]', "text", TEXT, [None, None]),
    "array in jsonl": (
        "a.jsonl",
        b'\xef\xbb\xbf\r\n[\r\n{"text": "a"},\r\n{"text": "b"}]\r\n',
        "text",
        TEXT,
        [None, None],
    ),
    "line separator": (
        "a.jsonl",
        '{"text": "a\u2028b"}'.encode(),
        "text",
        [[("a\u2028b", True)]],
        [1],
    ),
    "prompt": ("a.jsonl", b'{"prompt": "p", "completion": "c"}', "prompt_completion", PAIR, [1]),
    "question": ("a.jsonl", b'{"question": "p", "answer": "c"}', "prompt_completion", PAIR, [1]),
    "query": ("a.jsonl", b'{"query": "p", "response": "c"}', "prompt_completion", PAIR, [1]),
    "input": ("a.jsonl", b'{"input": "p", "output": "c"}', "prompt_completion", PAIR, [1]),
    "alpaca": (
        "a.jsonl",
        b'{"instruction": "i", "input": "x", "output": "o", "system": "s", "text": "t"}\n'
        b'{"instruction": "i", "input": "", "output": "o"}\n'
        b'{"instruction": "i", "input": null, "output": "o"}\n'
        b'{"instruction": "i", "output": "o"}\n',
        "alpaca",
        [
            [("s\n\nInstruction:\ni\n\nInput:\nx\n\nResponse:\n", False), ("o", True)],
            *[[("Instruction:\ni\n\nResponse:\n", False), ("o", True)]] * 3,
        ],
        [1, 2, 3, 4],
    ),
    "messages": (
        "a.jsonl",
        (messages(*CHAT) + "\n" + messages(*PARTS)).encode(),
        "messages",
        [CHAT_SEGMENTS, PARTS_SEGMENTS],
        [1, 2],
    ),
    "sharegpt": (
        "a.jsonl",
        json.dumps(
            {"conversations": [{"from": f, "value": v} for f, v in SHAREGPT], "system": "s"}
        ).encode(),
        "sharegpt",
        [
            [
                ("<|im_start|>system\ns<|im_end|>\n" + CHAT_SEGMENTS[0][0], False),
                *CHAT_SEGMENTS[1:],
            ]
        ],
        [1],
    ),
    "history": (
        "a.jsonl",
        b'{"instruction": "i", "output": "o", "history": [["a", "b"]]}\n'
        b'{"instruction": "i", "output": "o", "history": null}\n',
        "alpaca",
        [
            [
                ("Instruction:\na\n\nResponse:\n", False),
                ("b", True),
                ("\n\nInstruction:\ni\n\nResponse:\n", False),
                ("o", True),
            ],
            [("Instruction:\ni\n\nResponse:\n", False), ("o", True)],
        ],
        [1, 2],
    ),
    "message lists": (
        "a.jsonl",
        json.dumps(
            {
                "prompt": [{"role": r, "content": c} for r, c in CHAT[:3]],
                "completion": [{"role": "assistant", "content": "end"}],
            }
        ).encode(),
        "prompt_completion",
        [
            [
                ("".join(text for text, _ in CHAT_SEGMENTS[:3]), False),
                ("end<|im_end|>", True),
                ("\n", False),
            ]
        ],
        [1],
    ),
    "lmflow": (
        "a.json",
        b'{"type": "text2text",\n"instances": [{"input": "p", "output": "c"}]}',
        "prompt_completion",
        PAIR,
        [None],
    ),
    "lmflow on one line": (
        "a.json",
        b'{"type": "text_only", "instances": [{"text": "a"}, {"text": "b"}]}\n',
        "text",
        TEXT,
        [None, None],
    ),
    "lmflow conversation": (
        "a.json",
        json.dumps(
            {
                "type": "conversation",
                "instances": [{"messages": [{"role": r, "content": c} for r, c in CHAT]}],
            }
        ).encode(),
        "messages",
        [CHAT_SEGMENTS],
        [None],
    ),
    "gzip": ("a.jsonl.gz", GZIP, "text", TEXT[:1], [1]),
    "gzip in parts": ("a.jsonl", GZIP + gzip.compress(b'{"text": "b"}'), "text", TEXT, [1, 2]),
    "zst": ("a.jsonl.zst", ZST, "text", TEXT[:1], [1]),
    "zst in parts": ("a.jsonl", ZST * 2, "text", [TEXT[0]] * 2, [1, 2]),
    "csv": (
        "a.csv",
        b'\xef\xbb\xbfid,prompt,completion\r\n1,p,c\r\n\r\n2,"q, ""r""\r\ns",c\r\n',
        "prompt_completion",
        [*PAIR, [('q, "r"\ns', False), ("c", True)]],
        [2, 4],
    ),
    "tsv of messages": (
        "a.tsv.gz",
        gzip.compress(
            b'messages\n"'
            + json.dumps([{"role": r, "content": c} for r, c in CHAT]).replace('"', '""').encode()
            + b'"\n'
        ),
        "messages",
        [CHAT_SEGMENTS],
        [2],
    ),
    "parquet": (
        "a.parquet",
        table([{"messages": [{"role": r, "content": c} for r, c in CHAT]}]),
        "messages",
        [CHAT_SEGMENTS],
        [None],
    ),
    "txt": (
        "a.TXT",
        b"\xef\xbb\xbf\r\none\r\ntwo\r\n \r\n\r\nthree",
        "paragraphs",
        [[("one\ntwo", True)], [("three", True)]],
        [2, 6],
    ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_file_is_read(name, tmp_path):
    file, data, format_name, segments, lines = GOOD[name]
    path = tmp_path / file
    path.write_bytes(data)
    source = read_source("a", path)
    assert (source.name, source.path, source.format) == ("a", str(path), format_name)
    assert [written(e) for e in source.examples] == segments
    assert [e.line for e in source.examples] == lines
    assert [e.index for e in source.examples] == list(range(len(segments)))
    assert source.size == len(data)
    assert source.sha256 == hashlib.sha256(data).hexdigest()


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


def test_columns_are_renamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "p", "text": "c", "prompt": "other"}')
    reading = Reading(columns=(("prompt", "q"), ("completion", "text")))
    source = read_source("a", path, reading)
    assert source.format == "prompt_completion"
    assert [written(e) for e in source.examples] == PAIR
    assert source.columns == {"q", "text"}
    swapped = Reading(columns=(("input", "output"), ("output", "input")))
    path.write_text('{"input": "c", "output": "p"}')
    assert [written(e) for e in read_source("a", path, swapped).examples] == PAIR


HEADER, ANSWER = "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n", ("c<|im_end|>", True)
CHOSEN = [[(HEADER, False), ANSWER, ("\n", False)]]
USER, C, R = (
    {"role": r, "content": t} for r, t in (("user", "p"), ("assistant", "c"), ("assistant", "r"))
)


@pytest.mark.parametrize(
    ("record", "segments"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, PAIR),
        ({"chosen": "Q: p A: c", "rejected": "Q: p A: r"}, [[("Q: p A: ", False), ("c", True)]]),
        ({"prompt": "p", "chosen": [C], "rejected": [R]}, CHOSEN),
        ({"prompt": [USER], "chosen": [C], "rejected": [R]}, CHOSEN),
        ({"chosen": [USER, C], "rejected": [USER, R]}, CHOSEN),
        ({"prompt": "p", "chosen": [USER, C], "rejected": [USER, R], "score": 2}, CHOSEN),
        ({"chosen": [USER, C]}, CHOSEN),
        ({"conversations": [USER], "chosen": C, "rejected": R}, CHOSEN),
        ({"instruction": "p", "input": "", "chosen": "c", "rejected": "r"}, PAIR),
        ({"prompt": "p", "completion": "c"}, PAIR),
    ],
)
def test_the_chosen_answer_of_a_preference_set(record, segments, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    source = read_source("a", path, Reading(use_chosen=True))
    assert [written(e) for e in source.examples] == segments


def test_a_preference_set_with_messages_is_read_as_messages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [USER, C], "chosen": [USER, C], "rejected": [USER, R]}))
    assert read_source("a", path).format == "messages"


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


class Dataset:
    """What a `datasets.Dataset` is to us: a length, and mappings by number."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if not 0 <= i < len(self.rows):
            raise IndexError(i)
        return self.rows[i]


def test_records_from_memory():
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": None}]
    for given in (rows, Dataset(rows)):
        source = read_records("a", given[:1] if given is rows else Dataset(rows[:1]))
        assert [written(e) for e in source.examples] == PAIR
        with pytest.raises(InputError, match=r"records of a: record 1 .*: found null in field 'c"):
            read_records("a", given)
    assert read_records("a", rows[:1]).identity == read_records("a", rows[:1]).identity
    assert read_records("a", rows[:1]).sha256 != read_records("a", [{"text": "p"}]).sha256


@pytest.mark.parametrize(("package", "file"), [("pyarrow", "a.parquet"), ("zstandard", "a.jsonl")])
def test_a_missing_reader_names_the_extra(package, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # makes the import fail
    path = tmp_path / file
    path.write_bytes(ZST if package == "zstandard" else table([{"text": "a"}]))
    with pytest.raises(InputError, match=rf"needs {package}.*pip install 'bilevel\[formats\]'"):
        read_source("a", path)
