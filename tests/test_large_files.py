"""Files that are indexed instead of held: the same records, bounded memory, the same errors."""

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bilevel
from bilevel import InputError
from bilevel.problems.llm_reweight import LLMReweight, report
from bilevel.problems.llm_reweight import indexed as indexed_module
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.indexed import HEAD, Lines, is_large
from bilevel.problems.llm_reweight.model import tiny_tokenizer
from bilevel.problems.llm_reweight.records import overlaps, read_source
from bilevel.problems.llm_reweight.templates import Style
from bilevel.problems.llm_reweight.tokens import Stratified, distinct, tokenize
from bilevel.run import main
from bilevel.solvers.penalty import scalebio

WORDS = ["wave", "tide", "salt", "ship", "court", "judge", "claim", "bread", "oil", "flour"]
LARGE = Reading(held=10)


def text(draw, count):
    return " ".join(draw.choices(WORDS, k=count))


def write(path, records, end="\n"):
    path.write_bytes(end.join(json.dumps(r) for r in records).encode() + end.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer([" ".join(WORDS)] * 9)


FORMS = {
    "text": lambda draw, i: {"text": f"{i} {text(draw, 9)}", "id": i},
    "pair": lambda draw, i: {"prompt": text(draw, draw.randint(3, 40)), "completion": str(i)},
    "messages": lambda draw, i: {
        "messages": [
            {"role": "user", "content": text(draw, 4)},
            {"role": "assistant", "content": f"{i}"},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_rows_are_those_of_a_file_that_is_held(form, end, tmp_path, tokenizer):
    """Where no record is longer than a row, both ways give the same rows in the same order."""
    draw = random.Random(0)
    records = [FORMS[form](draw, i) for i in range(60)]
    path = write(tmp_path / "a.jsonl", [*records, *records[:7]], end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    held, large = read_source("a", path), read_source("a", path, LARGE)
    assert isinstance(large.examples, Lines) and not isinstance(held.examples, Lines)
    assert list(large.examples) == list(held.examples)
    assert (large.sha256, large.size, large.format) == (held.sha256, held.size, held.format)
    assert large.identity == held.identity
    style = Style(template="chatml")
    given = {"max_length": 48, "style": style}
    a, b = (tokenize(source, tokenizer, **given) for source in (held, large))
    assert tuple(b.ids) == a.ids and tuple(b.trained) == a.trained
    assert tuple(b.records) == a.records and len(b) == len(a) == 60
    assert (b.duplicates, b.truncated) == (a.duplicates, a.truncated)
    assert b.trained_tokens == pytest.approx(a.trained_tokens, rel=0.02)  # records are looked at
    assert b.ids[-1] == a.ids[-1]
    streams = [Stratified([rows], rows=[4], seed=1) for rows in (a, b)]
    for _ in range(20):  # over the end of the first epoch
        one, other = (next(stream) for stream in streams)
        assert one.labels == other.labels and bool((one.ids == other.ids).all())


def test_pieces_of_any_size_give_the_same_index(tmp_path, monkeypatch):
    draw = random.Random(1)
    record = json.dumps({"text": "wave tide"})
    body = "".join(draw.choice([f"{record}\n", "\n", "  \n", "\t\r\n"]) for _ in range(200))
    path = tmp_path / "a.jsonl"
    path.write_text(body + '{"text": "the end"}')
    wanted = [i for i, line in enumerate(path.read_text().split("\n"), 1) if line.strip()]
    for piece in (7, 64, 1000, 1 << 24):
        monkeypatch.setattr(indexed_module, "PIECE", piece)
        found = indexed_module.scan(str(path))
        assert found.lines.tolist() == wanted
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        data = path.read_bytes()
        cut = [data[a:b] for a, b in zip(found.starts[:-1], found.starts[1:], strict=True)]
        assert all(json.loads(part) for part in cut)


def test_long_text_is_cut_into_as_many_rows_as_its_bytes_make(tmp_path, tokenizer):
    draw = random.Random(2)
    texts = [text(draw, draw.randint(1, 600)) + f" {i}" for i in range(80)]
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    held = tokenize(read_source("a", path), tokenizer, max_length=32)
    rows = tokenize(read_source("a", path, LARGE), tokenizer, max_length=32)
    assert max(map(len, rows.ids)) <= 32
    assert len(rows) == pytest.approx(len(held), rel=0.1)
    assert rows.trained_tokens == pytest.approx(held.trained_tokens, rel=0.05)
    assert list(rows.records) == sorted(rows.records) and set(rows.records) == set(range(80))
    parts: dict[int, list[str]] = {}
    for ids, record in zip(rows.ids, rows.records, strict=True):
        parts.setdefault(record, []).append(tokenizer.decode(ids).removesuffix("<end>"))
    for record, whole in enumerate(texts):
        assert all(part in whole for part in parts[record])
        assert sum(map(len, parts[record])) > 0.8 * len(whole)
    covered = sum(map(len, rows.ids)) / sum(map(len, held.ids))
    assert covered > 0.95


def test_a_row_depends_on_its_number_alone(tmp_path, tokenizer):
    draw = random.Random(3)
    path = write(tmp_path / "a.jsonl", [FORMS["text"](draw, i) for i in range(2000)])
    made = [tokenize(read_source("a", path, LARGE), tokenizer, max_length=8) for _ in range(2)]
    places = draw.sample(range(len(made[0])), 900)
    forward = [made[0].ids[i] for i in places]
    assert [made[1].ids[i] for i in reversed(places)] == forward[::-1]


def test_a_bad_record_that_was_looked_at_is_told_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 5}, {"body": "b"}])
    with pytest.raises(InputError) as caught:
        read_source("a", path, LARGE)
    with pytest.raises(InputError) as held:
        read_source("a", path)
    assert caught.value.faults == held.value.faults
    source = read_source("a", path, Reading(held=10, skip=True))
    assert source.skipped == 2 and [e.text() for e in source.examples] == ["a"]


def hidden(tmp_path, records=9000):
    """A file with one bad record that is not looked at, and the number of it."""
    draw = random.Random(4)
    lines = [json.dumps(FORMS["text"](draw, i)) for i in range(records)]
    path = tmp_path / "law.jsonl"
    path.write_text("\n".join(lines))
    looked = set(read_source("a", path, LARGE).examples.looked_at().tolist())
    assert len(looked) == HEAD + 2000
    bad = next(i for i in range(HEAD, records) if i not in looked)
    lines[bad] = '{"text": "a", '
    path.write_text("\n".join(lines))
    return path, bad


def test_a_bad_record_that_is_drawn_is_told_with_its_line(tmp_path, tokenizer):
    path, bad = hidden(tmp_path)
    rows = tokenize(read_source("law", path, LARGE), tokenizer, max_length=500)
    assert len(rows) == 9000
    assert rows.ids[bad - 1] and rows.ids[bad + 1]
    with pytest.raises(InputError) as caught:
        rows.ids[bad]
    assert caught.value.faults[0].startswith(f"{path}:{bad + 1}: found malformed JSON at column")
    assert "problem.on_bad_record=skip" in caught.value.faults[1]
    source = read_source("law", path, Reading(held=10, skip=True))
    rows = tokenize(source, tokenizer, max_length=500)
    assert rows.ids[bad] == rows.ids[bad + 1]
    assert (rows.records[bad], rows.records[bad + 1]) == (bad + 1, bad + 1)


def test_a_file_that_changes_during_a_run_is_told(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i} wave"} for i in range(50)])
    rows = tokenize(read_source("a", path, LARGE), tokenizer, max_length=50)
    assert len(rows.ids[3]) > 2
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(InputError, match="changed while it is in use"):
        rows.ids[4]


@pytest.mark.parametrize(
    ("name", "body", "large"),
    [
        ("a.jsonl", '{"text": "a"}\n' * 9, True),
        ("a.json", '\n\n{"text": "a"}\n' * 9, True),
        ("a.jsonl", '[{"text": "aaaaaaaaa"}]', False),
        ("a.json", '{"type": "text_only",\n"instances": [{"text": "a"}]}', False),
        ("a.txt", '{"text": "aaaaaaaaa"}', False),
        ("a.csv", "text\naaaaaaaaaaa", False),
        ("a.jsonl", '{"a": 1}', False),
        ("a.jsonl", "\n" * 20, False),
    ],
)
def test_which_files_are_indexed(name, body, large, tmp_path):
    (tmp_path / name).write_text(body)
    assert is_large(str(tmp_path / name), LARGE) == large
    assert not is_large(str(tmp_path), LARGE) and not is_large("no\0file", LARGE)


def test_overlap_is_found_by_lines_and_by_text(tmp_path):
    draw = random.Random(5)
    records = [FORMS["text"](draw, i) for i in range(9000)]
    path = write(tmp_path / "a.jsonl", records)
    large = read_source("a", path, LARGE)
    unseen = next(i for i in range(HEAD, 9000) if i not in set(large.examples.looked_at().tolist()))
    spaced = {"text": records[3]["text"].replace(" ", "  "), "id": "other"}
    target = write(tmp_path / "t.jsonl", [{"text": "x"}, records[unseen], spaced])
    held, also = read_source("t", target), read_source("t", target, LARGE)
    assert overlaps(large, held) == overlaps(large, also) == [(3, 2), (unseen, 1)]
    assert overlaps(also, large) == overlaps(held, large) == [(1, unseen), (2, 3)]
    assert overlaps(large, read_source("b", write(tmp_path / "b.jsonl", [{"text": "y"}]))) == []


def test_parts_of_a_large_target(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"{i}"} for i in range(10)])
    lines = read_source("a", path, LARGE).examples
    test, rest = lines.part(3, 4), lines.without(3, 4)
    assert [e.text() for e in test] == ["3", "7"]
    assert [e.text() for e in rest] == ["0", "1", "2", "4", "5", "6", "8", "9"]
    assert [e.index for e in lines[2:4]] == [2, 3] and lines[-1].line == 10
    assert len(distinct(read_source("a", path, LARGE), 4)) == 4
    assert np.array_equal(lines.unlike, np.arange(10))


@pytest.fixture
def files(tmp_path):
    draw = random.Random(6)
    for name in ("one", "two", "target"):
        records = [{"text": f"{name} {text(draw, 900)}"} for _ in range(230)]
        write(tmp_path / f"{name}.jsonl", records)
    return tmp_path


def given(folder, **more):
    options = {"width": 16, "layers": 1, "max_length": 24, "batch": 4, "target_batch": 2}
    paths = {"target": str(folder / "target.jsonl"), "verdict": False, "held_megabytes": 1}
    sources = tuple(f"{name}={folder / name}.jsonl" for name in ("one", "two"))
    return LLMReweight(sources=sources, **(options | paths | more))


def test_a_run_resumes_bit_for_bit(files, tmp_path):
    """Nine steps are the same as five, a checkpoint and four more; all of the files are indexed."""
    task = given(files)
    lines = task.prepare()
    held = (task.data.targets["target"], task.data.tests["target"])
    assert all(isinstance(s.examples, Lines) for s in held)
    assert any(line.startswith("one: ") and "read as they are drawn" in line for line in lines)
    assert any("source one: text, 230 records" in line and "about" in line for line in lines)
    solver = scalebio(warmup=1)
    whole = bilevel.solve(given(files), solver, steps=9)
    for steps in (5, 9):
        result = bilevel.solve(
            given(files), solver, steps=steps, checkpoints=tmp_path / "c", resume=True
        )
    assert [r["weights"] for r in result.history] == [r["weights"] for r in whole.history]
    assert bool((result.x == whole.x).all())


def test_a_bad_record_stops_a_run_that_then_goes_on(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *a, **k: None)  # plots are slow
    draw = random.Random(7)
    lines = [json.dumps({"text": f"{i} {text(draw, 60)}"}) for i in range(4200)]
    path = files / "two.jsonl"
    path.write_text("\n".join(lines))
    looked = set(read_source("a", path, LARGE).examples.looked_at().tolist())
    lines = [line if i in looked or i % 3 else line[:-1] for i, line in enumerate(lines)]
    path.write_text("\n".join(lines))
    options = ["problem=llm_reweight", f"problem.target={files / 'target.jsonl'}", "steps=12"]
    options += [f"problem.sources={files / 'one.jsonl'} {path}", "problem.held_megabytes=1"]
    options += ["problem.batch=4", "problem.width=16", "problem.layers=1", "verdict=false"]
    options += ["checkpoint_every=1", f"out={tmp_path / 'out'}"]
    assert main(options) == 2
    said = capsys.readouterr().err
    assert f"{path}:" in said and "found malformed JSON" in said
    assert "problem.on_bad_record=skip" in said
    assert main([*options, "problem.on_bad_record=skip"]) == 0
    assert "left out: " in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file():
    """Half a gigabyte of JSON Lines costs less than a fifth of it beyond a small file."""
    script = Path(__file__).parent.parent / "benchmarks" / "large_file.py"
    command = [sys.executable, str(script), "--gigabytes", "0.5", "--dry"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    more = float(run.stdout.rsplit("small source:")[1].split()[0])
    assert more < 0.1
