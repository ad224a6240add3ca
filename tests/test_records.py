"""Training files that are read: their formats, the texts of their records, what is trained on."""

import gzip
import hashlib
import json
import subprocess
import sys

import pytest
from records_case import GZIP, ZST, messages, table, written

from bilevel.errors import InputError
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.records import (
    read_records,
    read_source,
)

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


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_parquet_is_read_without_threads(tmp_path):
    """Those of pyarrow 26 abort many a process at its end, where torch is loaded too."""
    file = tmp_path / "a.parquet"
    file.write_bytes(table([{"text": "a"}]))
    code = (
        "import os, sys\n"
        "from bilevel.problems.llm_reweight.files import parse\n"
        "import pyarrow.parquet\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "parse(open(sys.argv[1], 'rb').read(), sys.argv[1])\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
