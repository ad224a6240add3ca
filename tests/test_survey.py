"""The plan's view of data: counts from heads of files, padding, and this machine."""

import dataclasses
import gzip
import json
import os
import random
from pathlib import Path

import pytest
import torch

from bilevel import Full, InputError, cards, checkpoint, forecast, plan
from bilevel.lora import LoRA
from bilevel.memory import LISA
from bilevel.problems.llm_reweight import LLMReweight, footprint, rehearsal
from bilevel.problems.llm_reweight import survey as module
from bilevel.problems.llm_reweight.choices import Choices
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.passes import Passes
from bilevel.problems.llm_reweight.survey import padded, survey, table
from bilevel.solvers.penalty import scalebio

WORDS = ["wave", "tide", "salt", "ship", "sail", "harbor", "storm", "anchor", "deck", "gull"]
HEADS = ["source", "format", "records", "rows", "trained", "tokens", "truncated", "dropped"]


def records(count, seed, longest=30):
    draw = random.Random(seed)
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(3, longest)))} for _ in range(count)
    ]


def problem(folder, *, form="jsonl", counts=(60, 90), **options):
    for i, (name, count) in enumerate(zip("ab", counts, strict=True)):
        values = records(count, i)
        text = "".join(json.dumps(v) + "\n" for v in values)
        body = json.dumps(values) if form == "json" else text
        path = folder / f"{name}.{form}"
        path.write_bytes(gzip.compress(body.encode()) if form.endswith("gz") else body.encode())
    target = "".join(json.dumps(v) + "\n" for v in records(40, 7))
    (folder / "target.jsonl").write_text(target)
    fixed = {"layers": 1, "width": 16, "batch": 8, "target_batch": 3, "max_length": 24}
    sources = tuple(f"{n}={folder / n}.{form}" for n in "ab")
    return LLMReweight(
        sources=sources, target=str(folder / "target.jsonl"), **fixed | {"verdict": False} | options
    )


def test_small_files_are_counted_whole(tmp_path):
    own = problem(tmp_path)
    found = survey(own)
    assert [c.name for c in found.sources] == ["a", "b"] and not found.notes
    for counted, rows in zip(
        (*found.sources, *found.targets), [*own.rows, own.targets[0].rows], strict=True
    ):
        assert (counted.rows, counted.tokens, counted.read) == (len(rows), rows.trained_tokens, 1)
    assert [c.records for c in found.sources] == [60, 90] and found.longest == 24
    cells = table(found, own, 100)
    assert cells[1]["epochs"] == pytest.approx(4 * 100 / len(own.rows[1]))
    assert cells[2]["epochs"] == pytest.approx(3 * 100 / len(own.targets[0].rows))
    assert survey(LLMReweight()) is None


@pytest.mark.parametrize("form", ["jsonl", "json", "jsonl.gz"])
def test_large_files_are_estimated_from_their_heads(tmp_path, monkeypatch, form):
    own = problem(tmp_path, form=form, counts=(60, 6000))
    monkeypatch.setattr(module, "HEAD", 60_000)
    if form.endswith("gz"):
        monkeypatch.setattr(module, "HEAD", 15_000)
    found = survey(own)
    small, large = found.sources
    assert small.read == 1 > large.read > 0.05
    assert len(large.lengths) < 0.5 * len(own.rows[1])
    assert large.records == pytest.approx(6000, rel=0.1)
    assert large.tokens == pytest.approx(own.rows[1].trained_tokens, rel=0.1)
    assert "Of 1 files" in found.notes[0]


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_padding_is_that_of_batches(tmp_path, micro_batch):
    own = problem(tmp_path, micro_batch=micro_batch, max_length=64)
    upper, lower = own.batches(torch.Generator().manual_seed(0))
    want = []
    for stream in (lower, upper):
        sizes = [sum(p.ids[:, 1:].numel() for p in own.split(next(stream))) for _ in range(200)]
        want.append(sum(sizes) / 200)
    assert padded(survey(own), own, 1) == pytest.approx(want, rel=0.05)


def test_faults_of_a_head_name_the_file(tmp_path, monkeypatch, capsys):
    own = problem(tmp_path, counts=(60, 6000))
    monkeypatch.setattr(module, "HEAD", 60_000)
    path = tmp_path / "b.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "nonsense", *lines[1:]]))
    words = ["problem=llm_reweight", "sources=" + " ".join(own.sources), f"target={own.target}"]
    assert plan.main(words) == 2
    assert f"error: {path}:2: " in capsys.readouterr().err


def test_the_plan_shows_the_sources(tmp_path, monkeypatch, capsys):
    own = problem(tmp_path, counts=(60, 6000))
    monkeypatch.setattr(module, "HEAD", 60_000)
    words = ["problem=llm_reweight", "sources=" + " ".join(own.sources), f"target={own.target}"]
    words += ["max_length=24", "batch=8", "steps=500", "device=here"]
    assert plan.main(words) == 0
    out = capsys.readouterr().out
    head, first, second, target = out.splitlines()[:4]
    assert head.split() == [*HEADS, "epochs"]
    assert first.split()[:3] == ["a", "text", "60"] and target.split()[0] == "target"
    assert second.split()[:2] == ["b", "text"] and second.split()[2].startswith("~")
    assert "500 steps: " in out and "interpreter and libraries" in out and "host memory" not in out


def test_a_model_without_tokenizer_is_counted_with_another(tmp_path):
    found = survey(problem(tmp_path, model="yi-34b"))
    assert "a small tokenizer: yi-34b has none here" in found.notes[0]
    assert survey(problem(tmp_path)).sources == found.sources


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without GPU")
def test_this_machine_is_a_card():
    card = cards.find("here")
    kilobytes = Path("/proc/meminfo").read_text().partition("MemTotal:")[2]
    assert card.usable == 1024 * int(kilobytes.split()[0]) and card.flops > 1e8
    own = LLMReweight().on(card)
    assert (own.device, own.dtype) == ("cpu", "float32")
    assert LLMReweight().on(cards.find("a40")).dtype == "bfloat16"
    assert LLMReweight(dtype="float32").on(cards.find("a40")).dtype == "float32"


@pytest.mark.parametrize("memory", [Full(), LISA(gamma=1), LoRA(rank=2)])
def test_real_steps_are_timed(tmp_path, memory):
    seconds, peak = rehearsal.timed(problem(tmp_path, layers=2, device="cpu"), scalebio(), memory)
    assert 0 < seconds < 60 and peak > 1e8


@pytest.mark.parametrize("words", [["device=h100"], ["device=here", "devices=2", "launcher=ddp"]])
def test_steps_are_timed_on_this_machine_only(capsys, words):
    assert plan.main(["problem=llm_reweight", "--time", *words]) == 2
    assert "--time runs on this machine, in one process" in capsys.readouterr().err


def test_on_a_processor_freed_memory_counts(tmp_path):
    base = Choices(blocks=2, weight=4.0)
    kept = dataclasses.replace(base, keeps=0.5)
    of, passes = (
        footprint._shape(LLMReweight()),
        Passes(rows=4, length=9, lower=1, upper=0),
    )
    name = "freed memory that malloc keeps"
    plain = moments(of, base, passes)["at the head"]
    more = moments(of, kept, passes)["at the head"]
    passing = ("gradients", "activations", "loss and head")
    assert more.pop(name) == pytest.approx(0.5 * sum(plain[p] for p in passing)) and more == plain


def test_durations_and_tables():
    assert [plan.duration(s) for s in (30, 7200, 3 * 86400)] == ["30 s", "2.0 hours", "3.0 days"]
    rows = [{"source": "é\n" * 30, "format": "x", "rows": 1234, "dropped": 0.5, "estimated": True}]
    head, line = plan.columns(rows)
    assert "estimated" not in head and line.endswith("x       ~1,234    50.0%")


def test_a_run_leaves_its_plan(tmp_path):
    own = problem(tmp_path)
    options = forecast.read(["problem=llm_reweight", "memory=lora", "launcher=single"])[0]
    found = forecast.here(dataclasses.replace(options, problem=own))
    body = json.loads(json.dumps(plan.as_dict(found)))
    assert body["here"] and body["footprint"]["total"] == found.footprint.total
    assert forecast.here(forecast.read(["problem=quadratic"])[0]) is None
    assert forecast.here(forecast.read(["problem=llm_reweight", "attention=eager"])[0]) is None


def test_checkpoints_copy_no_memory_but_what_is_shared(tmp_path):
    whole = torch.arange(10.0)
    state = {"step": 1, "own": whole, "same": whole, "part": torch.arange(9.0)[2:5]}
    state |= {"turned": torch.arange(6.0).view(2, 3).t(), "empty": torch.empty(0)}
    tensors: dict = {}
    checkpoint._encode(state, tensors)
    checkpoint._separate(tensors)
    starts = [t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()]
    assert starts[0] == whole.data_ptr() and len(set(starts)) == len(starts)
    path = checkpoint.save(tmp_path / "c", state, fingerprint={})
    loaded = checkpoint.load(path, fingerprint={})
    assert all(torch.equal(loaded[k], v) for k, v in state.items() if k != "step")


def test_heads_leave_nothing_behind(tmp_path, monkeypatch):
    own = problem(tmp_path, counts=(60, 6000))
    monkeypatch.setattr(module, "HEAD", 60_000)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "temporary"))
    os.mkdir(tmp_path / "temporary")
    survey(own)
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(InputError):
        survey(dataclasses.replace(own, target=str(tmp_path / "none.jsonl")))
