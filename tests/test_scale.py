"""The benchmark of large models, tried on a tiny one: the code that a GPU will run."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    for name in ("scale", "record"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import scale

    return scale


def rows_of(scale, folder, *words):
    code = scale.main([*words, "--results", str(folder)])
    body = json.loads((folder / "scale.json").read_text())
    assert (folder / "scale.md").read_text().count("\n| ") == len(
        body["rows"]
    ) + 2  # names and rule
    return code, body["rows"]


def test_rows_run_and_are_compared_with_plain_steps(scale, tmp_path):
    words = ["--device", "cpu", "--shapes", "tiny", "--only", "lisa 1"]
    code, (plain, own) = rows_of(scale, tmp_path, *words)
    assert code == 0 and plain["outcome"] == own["outcome"] == "run"
    assert own["x plain lisa 1"] == pytest.approx(own["seconds"] / plain["seconds"])
    assert "x plain full" not in own  # was not run
    assert own["planned GB"] > plain["planned GB"] > 0


def test_what_cannot_run_says_why(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, (row,) = rows_of(scale, tmp_path, "--shapes", "34B", "--only", "bilevel full")
    assert code == 0 and row["outcome"] == "not run: no GPU" and "seconds" not in row
    monkeypatch.setattr(scale, "measured", lambda *_: 1 / 0)
    words = ["--device", "cpu", "--shapes", "tiny", "--only", "plain full"]
    code, (row,) = rows_of(scale, tmp_path, *words)
    assert code == 1 and row["outcome"] == "failed: ZeroDivisionError: division by zero"
    big, small = (scale.Case(shape=s, memory="full", plain=False) for s in ("8B", "0.5B"))
    away = scale.Case(shape="8B", memory="states 1", plain=False)
    plans, plan = (big.footprint(), small.footprint()), away.footprint()
    card = type("Card", (), {"total_memory": 85.0e9})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert "by plan, and the card has 85.0" in scale.obstacle(big, plans[0], "cuda", 1.0)
    assert scale.obstacle(small, plans[1], "cuda", 1.0) == ""
    assert scale.obstacle(small, plans[1], "cuda", 0.0) == "the time was over"
    assert "GB of host memory by plan" in scale.obstacle(small, plans[1], "cuda", 1.0, host=1e9)
    pinned = plan.host["what is away from the device, pinned"]
    assert scale.obstacle(away, plan, "cuda", 1.0, host=2 * pinned) == ""
    assert "host memory" in scale.obstacle(away, plan, "cuda", 1.0, host=pinned)


def test_what_tells_most_is_run_first_after_what_it_is_compared_with(scale, monkeypatch, tmp_path):
    seen = []

    def note(case, device, seconds, *, host):
        seen.append(case.name)
        return {"case": case.name, "outcome": "run", "seconds": 1.0}

    monkeypatch.setattr(scale, "attempt", note)
    _, rows = rows_of(scale, tmp_path)
    assert {f"{c.shape} {c.memory}" for c in scale.CASES} >= {*scale.FIRST}
    assert sorted(seen) == sorted(c.name for c in scale.CASES if c.shape != "tiny")
    assert seen[:2] == ["0.5B plain lora 16", "0.5B bilevel lora 16"]
    assert seen.index("34B bilevel lora 16") < seen.index("3B plain lisa 1")
    own = [c for c in scale.CASES if not c.plain and c.shape != "tiny" and c.memory in scale.PLAIN]
    for c in own:
        assert seen.index(f"{c.shape} plain {c.memory}") < seen.index(c.name)
    assert [row["case"] for row in rows] == [c.name for c in scale.CASES if c.shape != "tiny"]


def test_a_row_leaves_no_memory_behind(scale, monkeypatch):
    freed = []
    monkeypatch.setattr(scale, "obstacle", lambda *_, **__: "")
    monkeypatch.setattr(scale, "measured", lambda *_: 1 / 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("device"))
    host = "empty_host_cache"
    monkeypatch.setattr(torch.accelerator, host, lambda: freed.append("host"), raising=False)
    row = scale.attempt(scale.Case(shape="tiny", memory="full", plain=True), "cuda", 1.0)
    assert row["outcome"].startswith("failed") and freed == ["device", "host"]


def test_a_row_that_no_plan_allows_leaves_the_others(scale, tmp_path):
    words = ["--device", "cpu", "--shapes", "tiny", "--only", "bilevel idle"]
    code, (row,) = rows_of(scale, tmp_path, *words)
    assert code == 0 and row["outcome"].startswith("not run: memory.gamma must be at most")


def test_a_row_that_takes_too_long_is_ended(scale):
    with pytest.raises(TimeoutError), scale.limited(0.05):
        time.sleep(10)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with scale.limited(10):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_random_models_have_the_buffers_of_any_other(scale):
    from transformers import AutoModelForCausalLM

    problem = scale.SHAPES["tiny"]
    found = scale.random_model(problem, "cpu")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert found.model.layers[0].mlp.up_proj.weight.std() > 0.01
    expected = dict(AutoModelForCausalLM.from_config(found.config).named_buffers())
    assert expected
    for name, b in found.named_buffers():
        assert b.dtype == torch.float32 and torch.equal(b, expected[name])


@pytest.mark.parametrize("memory", ["full", "lisa 1"])
@pytest.mark.parametrize("plain", [True, False])
def test_operations_are_those_of_steps_that_compute_nothing_twice(scale, plain, memory):
    case = scale.Case(shape="tiny", memory=memory, plain=plain)
    assert case.problem.checkpointing
    stage = scale.Stage(losses=scale.SHAPES["tiny"])  # without checkpoints
    step = (scale.plain_step if plain else scale.bilevel_step)(stage, scale.MEMORIES[memory])
    with FlopCounterMode(display=False) as counter:
        step()
    seen = 4 * 3.5 * 64 * 32 * 2  # of attention, whose CPU kernel is not counted, for each token
    tokens = (4 if plain else 10) * 32
    assert case.operations == pytest.approx(counter.get_total_flops() + seen * tokens, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "memory", "card"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA H100 PCIe", 85e9, None),
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "a100-80"),
        ("NVIDIA A40", 48e9, "a40"),
        ("Tesla T4", 16e9, None),
    ],
)
def test_cards_are_known_by_their_names(scale, monkeypatch, name, memory, card):
    properties = type("Card", (), {"total_memory": memory})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = scale.card_here()
    assert (found and found.name) == card
