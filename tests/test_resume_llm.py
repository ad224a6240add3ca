"""A run killed anywhere and started again ends as if nothing had happened, bit for bit."""

import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bilevel import checkpoint
from bilevel.run import main

# One process imports what is slow; every run is a fork of it, killed at the n-th event if told.
DRIVER = """
import json, os, pathlib, shutil, signal, sys
import torch
from bilevel import checkpoint, launch, run
from bilevel.problems.llm_reweight import report
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
import tokenizers

report.write = lambda *a, **k: None  # plots are slow and come after all that is tested here
os.fsync = lambda *a: None  # slow, and what a killed process wrote is not lost without it

def count(owner, name, left):
    whole = getattr(owner, name)
    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            if name == "save_file":
                pathlib.Path(arguments[1]).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments, **options)
    setattr(owner, name, counted)

EVENTS = {
    "backward": [(launch.Single, "backward")],
    "write": [(checkpoint, n) for n in ("save_file", "_sync", "replace_text")]
    + [(pathlib.Path, n) for n in ("mkdir", "rename", "replace", "write_text")]
    + [(shutil, "rmtree")],
}

def child(kind, at, arguments):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        left = [at]
        for owner, name in EVENTS.get(kind, []):
            count(owner, name, left)
        code = run.main(arguments)
        sys.stdout.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for line in sys.stdin:
    codes = [child(*request) for request in json.loads(line)]
    print("codes " + json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(*requests):
        process.stdin.write(json.dumps(requests) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if line.startswith("codes "):
                return json.loads(line.removeprefix("codes "))
        raise AssertionError("the driver ended")

    yield ask
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == 0


def write_data(folder):
    folder.mkdir()
    draw = random.Random(0)
    for name, letters in (("sea", "abcde"), ("law", "vwxyz"), ("target", "abcdef")):
        words = [["".join(draw.choices(letters, k=4)) for _ in range(12)] for _ in range(30)]
        rows = [json.dumps({"text": " ".join(row)}) + "\n" for row in words]
        (folder / f"{name}.jsonl").write_text("".join(rows))


def command(data, out, *more):
    return [
        *("problem=llm_reweight", "steps=10", "checkpoint_every=3", "verdict=false", "width=16"),
        *("batch=4", "target_batch=2", "max_length=16", "solver.warmup=2"),
        *(f"sources={data / 'sea.jsonl'} {data / 'law.jsonl'}", f"target={data / 'target.jsonl'}"),
        *(f"out={out}", *more),
    ]


def end(out):
    """Everything that a finished run holds: weights, all tensors, all numbers."""
    newest = checkpoint.latest(out / "checkpoints")
    state = json.loads((newest / "state.json").read_text())["state"]
    texts = [(out / n).read_text() for n in ("trajectory.jsonl", "result.json")]
    return newest.name, state, texts, load_file(newest / "tensors.safetensors")


def same(a, b):
    (*numbers_a, tensors_a), (*numbers_b, tensors_b) = end(a), end(b)
    assert numbers_a == numbers_b
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[k], tensors_b[k]) for k in tensors_a)


MEMORY = {"full": ["memory=full"], "lisa": ["memory=lisa", "memory.gamma=1", "memory.period=2"]}


@pytest.mark.parametrize("memory", MEMORY)
def test_killed_anywhere_goes_on_bit_for_bit(driver, tmp_path, memory):
    data = tmp_path / "data"
    write_data(data)
    whole = command(data, tmp_path / "whole", *MEMORY[memory])
    killed = command(data, tmp_path / "killed", *MEMORY[memory])
    # three backward passes a step: in the first, in the middle of the sixth, in the last step
    kills = [["backward", n, killed] for n in (1, 17, 12)]
    writes = [["write", n, killed] for n in (3, 9)]
    requests = [["", 0, whole], *kills, *writes, ["", 0, killed]]
    assert driver(*requests) == [0, -9, -9, -9, -9, -9, 0]
    same(tmp_path / "whole", tmp_path / "killed")
    weights = [(tmp_path / n / "weights.json").read_text() for n in ("whole", "killed")]
    assert weights[0] == weights[1]


def test_killed_at_every_write_goes_on_bit_for_bit(driver, tmp_path):
    """Between any two operations on files, of the run's folder and of its checkpoints."""
    arguments = ["problem=quadratic", "solver=f2sa", "steps=4", "checkpoint_every=2"]
    assert driver(["", 0, [*arguments, f"out={tmp_path / 'whole'}"]]) == [0]
    for n in range(1, 100):
        killed = [*arguments, f"out={tmp_path / str(n)}"]
        codes = driver(["write", n, killed], ["", 0, killed])
        assert codes[1] == 0
        same(tmp_path / "whole", tmp_path / str(n))
        left = {p.name for p in (tmp_path / str(n) / "checkpoints").iterdir()}
        assert left <= {f"step-0000000{k}" for k in (0, 2, 4)}, "a partial one stayed"
        if codes[0] == 0:
            break
    assert 25 < n < 100


@pytest.mark.parametrize("name", ["sea", "target"])
def test_changed_data_is_refused_and_named(tmp_path, capsys, name):
    write_data(tmp_path / "data")
    first = [w for w in command(tmp_path / "data", tmp_path / "out") if w != "steps=10"]
    assert main([*first, "steps=2"]) == 0
    moved = tmp_path / "elsewhere" / "data"
    moved.parent.mkdir()
    (tmp_path / "data").rename(moved)
    again = [w for w in command(moved, tmp_path / "out") if w != "steps=10"]
    assert main([*again, "steps=4"]) == 0  # the same content elsewhere
    with (moved / f"{name}.jsonl").open("a") as file:
        file.write('{"text": "one more record"}\n')
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    assert main([*again, "steps=6"]) == 2
    message = capsys.readouterr().err
    assert f"file of {name}: '{name}.jsonl, " in message and "bytes, sha256" in message
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert main([*again[:-1], f"out={tmp_path / 'new'}", "steps=2"]) == 0
