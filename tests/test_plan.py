"""The planner on the command line: what it says, its exit codes, and what it refuses."""

import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from plan_case import LONG, MIXED, YI

from bilevel import Full, InputError, Single, forecast, plan, remedies
from bilevel.cards import CARDS, find
from bilevel.footprint import work
from bilevel.problems.llm_reweight import LLMReweight, footprint
from bilevel.solvers.penalty import scalebio


def run(capsys, *words):
    code = plan.main(words)
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def test_the_plan_of_34_billion_fits_eight_cards(capsys):
    code, out, err = run(capsys, *YI, *MIXED, *LONG)
    assert (code, err) == (0, "")
    assert "fits" in out and "34.389 (blocks 33.471, embedding 0.459, head 0.459" in out
    assert "problem.target_batch=8 rather than 6" in out
    assert "Computed from shapes; nothing was run on a device" in out


def test_json_has_the_same_numbers(capsys):
    code, out, _ = run(capsys, *YI, *MIXED, "--json")
    body = json.loads(out)
    found = body["footprint"]
    assert code == 0 and body["fits"]
    assert found["total"] == pytest.approx(sum(found["moments"][found["peak"]].values()))
    assert body["spare"] == pytest.approx(CARDS["a40"].usable - found["total"])
    machine = 8 * CARDS["a40"].flops * 0.4
    assert body["compute_seconds"] == pytest.approx(found["flops"] / machine)


def test_what_would_fit_does_fit(capsys):
    words = ["problem=llm_reweight", "problem.model=llama-3-8b", "device=a40"]
    code, out, _ = run(capsys, *words, "memory=full", "problem.max_length=1024", "--json")
    body = json.loads(out)
    assert code == 1 and not body["fits"] and body["remedies"]
    totals = []
    for remedy in body["remedies"]:
        keep = [
            w
            for w in words
            if w.partition("=")[0] not in {c.partition("=")[0] for c in remedy["change"]}
        ]
        made = forecast.make([*keep, "problem.max_length=1024", *remedy["change"]])
        assert made.fits
        totals.append(made.footprint.total == pytest.approx(remedy["total"]))
    assert all(totals)


def test_options_are_added_up_before_devices_are_bought():
    """One card holds 34 billion numbers in four bits, 32 what training all of them needs."""
    words = ["problem=llm_reweight", "problem.model=yi-34b", "device=a40"]
    found = remedies.remedies(forecast.make(words))
    change, total = found[0]
    assert not any(word.startswith(("devices=", "device=", "launcher=")) for word in change)
    made = forecast.make([*words, *change])
    assert made.fits and made.footprint.total == total
    assert any("devices=32" in change for change, _ in found)
    for word in change:  # none of them is idle
        fewer = [*words, *(w for w in change if w != word)]
        with contextlib.suppress(InputError):
            assert not forecast.make(fewer).fits


def test_options_of_a_replaced_part_go_with_it():
    words = ("memory=lisa", "memory.gamma=4", "devices=2", "batch=8")
    assert remedies._changed(words, ("memory=full", "problem.batch=4")) == (
        "devices=2",
        "memory=full",
        "problem.batch=4",
    )


def test_a_step_of_the_real_code_is_counted(capsys):
    words = ["problem=llm_reweight", "dtype=float32", "--measure", "--json"]
    body = json.loads(run(capsys, *words)[1])
    counted, found = body["counted_on_fake_tensors"], body["footprint"]
    slack = found["moments"][found["peak"]]["context and slack"]
    assert counted["peak"] == pytest.approx(found["total"] - slack, rel=0.1)
    with pytest.raises(InputError, match="one process"):
        forecast.measure(forecast.make([*YI, *MIXED]))
    with pytest.raises(InputError, match="memory=lora cannot be counted"):
        forecast.measure(forecast.make(["problem=llm_reweight", "memory=lora"]))


def test_all_faults_are_told_together(capsys):
    words = ["problem=llm_reweight", "problem.model=yi-34", "devices=8", "device=h10"]
    code, out, err = run(capsys, *words, "launcher=single", "problem.batch=20", "mfu=2")
    assert (code, out) == (2, "")
    assert "did you mean yi-34b?" in err and "did you mean h100?" in err
    assert "problem.batch must be a multiple of devices=8, got 20" in err
    assert "launcher=single uses one device, got devices=8" in err
    assert "mfu must be in (0, 1]" in err
    assert err.count("error:") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["devices=0"], "devices must be at least 1, got devices=0"),
        (["devices=two"], "devices must be a whole number"),
        (["devices=1", "devices=1"], "devices is given twice"),
        (["problem.max_length=1"], "problem.max_length must be at least 2"),
        (["memory=lisa", "memory.gamma=3"], "at most the number of blocks, 2, got 3"),
        (["problem.attention=eager"], "problem.attention=eager"),
        (["problem.max_length=9000"], "at most 2048 tokens"),
        (["nonsense=1"], "unknown key nonsense"),
        (["problem=toy"], "does not say what it needs"),
    ],
)
def test_wrong_input_is_told(capsys, words, message):
    first = [] if words[0].startswith("problem=") else ["problem=llm_reweight"]
    code, _, err = run(capsys, *first, *words)
    assert code == 2 and message in err


def test_unknown_strategies_and_launchers_are_refused():
    @dataclasses.dataclass(frozen=True)
    class Sparse(Full):
        pass

    @dataclasses.dataclass(frozen=True)
    class Cloud(Single):
        pass

    problem, does = LLMReweight(), work(scalebio())
    with pytest.raises(InputError) as error:
        footprint.footprint(problem, does, Sparse(), Cloud(), 1, 1)
    assert error.value.faults == (
        "memory=sparse cannot be planned yet.",
        "launcher=cloud cannot be planned yet.",
    )


def test_cards_name_their_source():
    assert find("H200").usable == 149e9
    assert all(card.source and card.usable < 150e9 for card in CARDS.values())


def test_34_billion_are_planned_in_seconds_without_memory():
    command = [sys.executable, "-m", "bilevel.plan", *YI, *MIXED]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert busy < 20  # of the processor: the wall clock depends on who else is there
    assert after.ru_maxrss * 1024 < 2e9  # kB on Linux


def test_the_time_is_that_of_all_seeds(capsys):
    words = ("problem=llm_reweight", "steps=100")
    one, three = (
        json.loads(run(capsys, *words, seeds, "--json")[1]) for seeds in ("seeds=1", "seeds=3")
    )
    assert (one["steps"], one["seeds"], three["steps"], three["seeds"]) == (100, 1, 100, 3)
    assert three["run_seconds"] == pytest.approx(3 * one["run_seconds"])
    step = max(one["compute_seconds"], one["traffic_seconds"]) + one["swap_seconds"]
    assert one["run_seconds"] == pytest.approx(100 * step)
    made = forecast.make([*words, "seeds=3", "device=here"])
    said = "\n".join(plan.lines(made, timed=(2.0, 1e9)))
    assert f"100 steps of 3 seeds: {plan.duration(made.steps * made.seconds)} by" in said
    assert "measured here: 2.00 s a step, 100 steps of 3 seeds 10.0 minutes" in said
