"""Training files: what is accepted, what is refused, and that a refusal says where and why."""

import hashlib
import json
import os

import pytest

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.records import (
    Source,
    name_paths,
    overlaps,
    read_source,
    read_sources,
)

OK = '{"text": "a"}\n'


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
    "gzip": ("a.jsonl.gz", b"\x1f\x8b\x08\x00", ["@:1:", "gunzip"]),
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
    assert [list(e.segments) for e in source.examples] == segments
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
