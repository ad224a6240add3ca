"""Which records an export takes from the files, and in which form it writes them."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from exports_case import answer_of, command, export, lines_of, make_run, records, renewed, rows

import bilevel
from bilevel import InputError
from bilevel.problems.llm_reweight import LLMReweight, data, output
from bilevel.problems.llm_reweight.exports import TOOLS, originals
from bilevel.problems.llm_reweight.exports import source as source_module
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.records import read_source

jsonschema = pytest.importorskip("jsonschema")

SCHEMA = json.loads(Path(output.__file__).with_name("weights.schema.json").read_text())


def test_records_of_one_kind_are_copied_letter_by_letter(tmp_path):
    run = make_run(tmp_path, "alpaca")
    source = tmp_path / "my data" / "sea.jsonl"
    odd = '{ "instruction":"\\u00e9",  "output": "sea answer 0" , "id": 1e2}'
    lines = [odd, "", *source.read_text().splitlines()[1:]]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    renewed(run, "sea", source)
    written = (export(run, "mixed", total=400) / "train.jsonl").read_text().splitlines()
    assert odd in written
    assert set(written) <= {line for f in (tmp_path / "my data").iterdir() for line in lines_of(f)}
    forced = export(run, "mixed", total=400, records="messages") / "train.jsonl"
    assert all(set(json.loads(line)) == {"messages"} for line in forced.read_text().splitlines())


@pytest.mark.parametrize("kind", ["array", "text"])
def test_arrays_and_paragraphs_are_records_too(tmp_path, kind):
    run = make_run(tmp_path, "text")
    if kind == "array":
        path = tmp_path / "sky.jsonl"
        path.write_text(json.dumps(list(records("sky", "text", 31)), indent=1))
    else:
        path = tmp_path / "sky.txt"
        path.write_text("\n\n\n".join(r["text"] for r in records("sky", "text", 31)) + "\n")
    renewed(run, "sky", path)
    folder = export(run, "mixed", total=4000, unit="examples")
    found = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert {f"sky answer {i}" for i in range(31)} <= set(found)


def test_the_same_seed_gives_the_same_files(tmp_path):
    run = make_run(tmp_path, "mixed")
    names = ("mixed/train.jsonl", "trl/sea.jsonl")
    made = []
    for seed in (0, 0, 1):
        for tool in ("mixed", "trl"):
            export(run, tool, seed=seed)
        made.append([(run / "export" / name).read_bytes() for name in names])
    assert made[0] == made[1]
    assert all(a != b for a, b in zip(made[0], made[2], strict=True))


def test_the_demonstration_can_be_exported(tmp_path, monkeypatch):
    """Its texts lie in no file; a small one stands for it."""
    texts = {name: [f"{name}\nanswer {i}" for i in range(9)] for name in ("docs", "code")}
    small = data.Data(
        sources={name: data.text_source(name, found) for name, found in texts.items()},
        targets={"target": data.text_source("target", ["a"])},
        tests={"target": data.text_source("test", ["b"])},
    )
    monkeypatch.setattr(originals, "_demonstration", lambda: small)
    sources = [
        {"name": s.name, "path": s.path, "sha256": s.sha256, "format": s.format, "weight": 0.5}
        | {"records": 9, "tokens_per_record": 9.5}
        for s in small.sources.values()
    ]
    body = {"schema": "bilevel.llm_reweight/1", "status": "STEPS", "sources": sources}
    (tmp_path / "weights.json").write_text(json.dumps(body))
    for tool in TOOLS:
        export(tmp_path, tool)
    folder = export(tmp_path, "mixed", total=40)
    meta = json.loads((folder / "train.meta.json").read_text())
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines()
    for line, (source, index) in zip(lines, meta["rows"], strict=True):
        assert json.loads(line)["text"] == texts[meta["sources"][source]["name"]][index]
    body["sources"][0]["sha256"] = "0" * 64
    (tmp_path / "weights.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="comes with Python, and this is another version"):
        export(tmp_path, "mixed", total=40)


def test_every_format_that_is_read_can_be_written(tmp_path):
    """Renamed columns, ShareGPT with calls, gzip, preference sets and bad records left out."""
    call = json.dumps({"name": "look", "arguments": {"at": "sky"}})
    chat = [("human", "what?"), ("function_call", call), ("observation", "blue")]
    turns = [{"from": who, "value": said} for who, said in [*chat, ("gpt", "chat answer 0")]]
    tools = json.dumps([{"name": "look", "parameters": {}}])
    kept = [{"conversations": turns, "tools": tools}] * 2
    lines = {
        "chat.jsonl": [json.dumps(r) for r in kept],
        "table.csv": ["q,a", *(f"ask {i},table answer {i}" for i in range(4))],
        "best.jsonl": [
            json.dumps({"prompt": "p", "chosen": f"best answer {i}", "rejected": "no"})
            for i in range(3)
        ],
        "bad.jsonl": ['{"text": "bad answer 0"}', "{", '{"text": 5}', '{"text": "bad answer 3"}'],
        "target.jsonl": [json.dumps({"text": f"another {i}"}) for i in range(8)],
    }
    for name, found in lines.items():
        (tmp_path / name).write_text("\n".join(found) + "\n")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "packed answer 0"}\n{"text": "packed answer 1"}\n'))
    names = ["chat", "table", "best", "bad", "packed"]
    paths = [*(tmp_path / f"{n}.jsonl" for n in names[:4]), packed]
    paths[1] = tmp_path / "table.csv"
    problem = LLMReweight(
        sources=tuple(f"{n}={p}" for n, p in zip(names, paths, strict=True)),
        target=str(tmp_path / "target.jsonl"),
        columns=("table.prompt=q", "table.completion=a"),
        use_chosen=True,
        on_bad_record="skip",
        verdict=False,
    )
    run = left_by(problem, tmp_path / "run")
    for tool in TOOLS:
        export(run, tool, unit="examples")
    folder = export(run, "mixed", unit="examples", total=40)
    meta = json.loads((folder / "train.meta.json").read_text())
    found = rows(folder / "train.jsonl")
    for row, (source, index) in zip(found, meta["rows"], strict=True):
        name = names[source]
        assert answer_of(row) == f"{name} answer {0 if name == 'chat' else index}"
    assert {index for source, index in meta["rows"] if source == 3} == {0, 3}
    called = next(row["messages"] for row in found if len(row["messages"]) == 4)
    assert [m["role"] for m in called] == ["user", "assistant", "tool", "assistant"]
    assert called[1]["tool_calls"][0]["function"] == json.loads(call)
    info = json.loads((run / "export" / "llamafactory" / "dataset_info.json").read_text())
    assert info["chat"]["formatting"] == "openai" and info["table"]["formatting"] == "sharegpt"
    typed = rows(run / "export" / "llamafactory_v1" / "chat.jsonl")[0]["messages"]
    assert typed[1]["content"] == [{"type": "tool_call", "value": call}]


def test_names_that_differ_by_case_get_files_of_their_own():
    found = source_module._keys(["Code", "code", "CODE-2", "c de"])
    assert len({name.casefold() for name in found}) == 4 and found[:2] == ["Code", "code-2"]


def test_tools_of_conversations_stay_columns(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    line = json.dumps({"messages": turns, "tools": json.dumps([{"name": "look"}])}) + "\n"
    run = make_run(tmp_path, "text")
    body = json.loads((run / "weights.json").read_text())
    for source in body["sources"]:
        path = tmp_path / f"tools-{source['name']}.jsonl"
        path.write_text(line * source["records"])
        source |= {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        source["format"] = "messages"
    (run / "weights.json").write_text(json.dumps(body))
    assert command(run, "--to", "trl,hf") == 0
    mix = yaml.safe_load((run / "export" / "trl" / "mix.yaml").read_text())
    assert all(entry["columns"] == ["messages", "tools"] for entry in mix["datasets"])
    columns = json.loads((run / "export" / "hf" / "interleave.json").read_text())["columns"]
    assert columns == ["messages", "tools"]


def left_by(problem, run):
    """The folder of a run that ended with equal weights."""
    names = problem.names
    row = {"step": 1, "upper": 1.0, "lower": 1.0, "weights": dict.fromkeys(names, 1 / len(names))}
    result = bilevel.Result(
        **{"x": torch.zeros(()), "y": None, "message": "", "nit": 1, "upper": 1.0, "lower": 1.0},
        status=bilevel.Status.STEPS,
        history=[row],
    )
    run.mkdir()
    output.interim(problem, result, run)
    jsonschema.validate(json.loads((run / "weights.json").read_text()), SCHEMA)
    return run


@pytest.mark.parametrize("head", [True, False], ids=["met at once", "never met"])
def test_bad_records_of_a_large_file_are_left_out(tmp_path, head):
    """Of 4,000 lines some are cut off, beyond what is looked at or in what is."""
    filler = "x" * 300
    lines = [json.dumps({"text": f"large answer {i}", "filler": filler}) for i in range(4000)]
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(lines))
    looked = set(read_source("a", path, Reading(held=10)).examples.looked_at().tolist())
    unseen = [i for i in range(4000) if i not in looked][::9]
    bad = {*unseen, *([5, 17] if head else [])}
    path.write_text("\n".join(line[:-1] if i in bad else line for i, line in enumerate(lines)))
    for name in ("small", "target"):
        made = (json.dumps({"text": f"{name} answer {i}"}) + "\n" for i in range(50))
        (tmp_path / f"{name}.jsonl").write_text("".join(made))
    options = {"target": str(tmp_path / "target.jsonl"), "held_megabytes": 1, "verdict": False}
    names = ("large", "small")
    problem = LLMReweight(
        sources=tuple(f"{n}={tmp_path / n}.jsonl" for n in names), on_bad_record="skip", **options
    )
    run = left_by(problem, tmp_path / "run")
    for tool in TOOLS:
        export(run, tool, unit="examples")
    folder = export(run, "mixed", unit="examples", total=20_000)
    meta = json.loads((folder / "train.meta.json").read_text())
    found = rows(folder / "train.jsonl")
    for row, (source, index) in zip(found, meta["rows"], strict=True):
        assert answer_of(row) == f"{names[source]} answer {index}"
    assert {i for source, i in meta["rows"] if source == 0} == set(range(4000)) - bad
    shares = json.loads((run / "export" / "open_instruct" / "shares.json").read_text())
    assert shares["total"] == 4000 - len(bad) + 50
    path.unlink()
    assert command(run, "--to", "megatron", "--force") == 0  # which is given no records


def test_a_bad_record_that_no_run_drew_is_told(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    path = tmp_path / "my data" / "sea.jsonl"
    path.write_text(path.read_text().replace('"sea answer 7"}', '"sea answer 7"'))
    renewed(run, "sea", path)
    assert command(run, "--to", "hf,open_instruct", "--records", "messages") == 2
    said = capsys.readouterr().err
    assert 'sea.jsonl has a bad record, which the run never drew: \'{"text": "sea' in said
    assert "problem.on_bad_record=skip" in said
