"""Options: every fault is told at once, in one line each, and before anything is written."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import yaml

from bilevel import fields
from bilevel.errors import InputError
from bilevel.lora import LoRA
from bilevel.memory import LISA
from bilevel.options import parse
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.ridge import Ridge
from bilevel.run import main
from bilevel.solvers.implicit import AID
from bilevel.solvers.penalty import Penalty

QUADRATIC = "problem=quadratic"
LLM = "problem=llm_reweight"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["problem=quadratik"], ["unknown problem 'quadratik'; did you mean 'quadratic'?"]),
        (["steps=3"], ["problem=NAME is missing; choices: "]),
        (["llm_reweight"], ["did you mean problem=llm_reweight?", "problem=NAME is missing"]),
        ([QUADRATIC, "solver=scalbio"], ["did you mean 'scalebio'?"]),
        ([QUADRATIC, "memory=rola"], ["unknown memory 'rola'; choices: full, lisa, lora."]),
        ([QUADRATIC, "memory=lisa"], ["an nn.Module with a stack of blocks, got Tensor", "full"]),
        ([QUADRATIC, "launcher=x"], ["choices: single, ddp, fsdp2, deepspeed."]),
        ([QUADRATIC, "steps", "=", "5"], ["without spaces around =, got 'steps'", "got '='"]),
        ([QUADRATIC, "stepz=5"], ["unknown key stepz; the nearest is steps."]),
        (
            [QUADRATIC, "solver.penalti=3"],
            ["unknown key solver.penalti; the nearest is solver.pen"],
        ),
        ([QUADRATIC, "penalti=3"], ["the nearest is solver.penalty."]),
        (
            [LLM, "problem.soruces=x"],
            ["unknown key problem.soruces; the nearest is problem.sources"],
        ),
        ([QUADRATIC, "memory.gama=1"], ["the nearest is memory.gamma (of memory=lisa)."]),
        ([QUADRATIC, "memory.gamma=1"], ["the nearest is memory.gamma (of memory=lisa)."]),
        ([QUADRATIC, "zzz=1"], ["unknown key zzz; see --help."]),
        ([QUADRATIC, "steps=many"], ["steps must be a whole number, got 'many'."]),
        ([QUADRATIC, "steps=1.5"], ["steps must be a whole number, got '1.5'."]),
        ([QUADRATIC, "steps="], ["steps must be a whole number, got ''."]),
        ([QUADRATIC, "steps=0"], ["steps must be at least 1, got steps=0."]),
        ([QUADRATIC, "steps=-3"], ["steps must be at least 1, got steps=-3."]),
        ([QUADRATIC, "checkpoint_every=0"], ["checkpoint_every must be at least 1"]),
        ([QUADRATIC, f"seed={10**30}"], ["seed must be from 0 to 2**63 - 1"]),
        ([QUADRATIC, "resume=maybe"], ["resume must be one of auto, never, got 'maybe'."]),
        ([QUADRATIC, "solver.stencil=0"], ["solver.stencil must be at least 1, got 0."]),
        ([QUADRATIC, "lower_lr=nan"], ["solver.lower_lr must be a number, got 'nan'."]),
        (
            [QUADRATIC, "lower_lr=-1"],
            ["step size of sgd must be positive and finite, got lr=-1.0."],
        ),
        ([LLM, "verdict=maybe"], ["problem.verdict must be true or false, got 'maybe'."]),
        ([LLM, "sources=it's.jsonl"], ["problem.sources must be words separated by spaces"]),
        (
            [LLM, "data_seed=1", "problem.data_seed=1"],
            ["given twice (data_seed= and problem.data_"],
        ),
        ([QUADRATIC, "steps=5", "--steps=6"], ["steps is given twice; keep one."]),
        ([QUADRATIC, QUADRATIC], ["problem is given twice; keep one."]),
        ([QUADRATIC, "config=none.yaml"], ["config=none.yaml cannot be read"]),
        (["problem=nowhere:Class"], ["expected module:Class"]),
        (["problem=:"], ["expected module:Class"]),
        (["problem=../x:Y"], ["expected module:Class"]),
        (["problem=json:dumps"], ["must have a default for every field"]),
        (
            ["problem=collections:Counter"],
            ["a dataclass that extends bilevel.Problem, got Counter"],
        ),
    ],
)
def test_a_wrong_option_is_named(arguments, words, capsys, here):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for word in words:
        assert word in printed.err
    assert all(line.startswith("error: ") for line in printed.err.splitlines())
    assert len(printed.err.splitlines()) <= 3
    assert list(here.iterdir()) == []


def test_faults_of_all_parts_come_together(here, capsys):
    for name in ("bad.jsonl", "worse.jsonl"):
        (here / name).write_text('{"text": null}\n')
    wrong = ["stepz=1", "seed=-1", "lower_lr=0", "memory=lisa", "gamma=0", "launcher.threads=x"]
    assert main([LLM, *wrong, "sources=bad.jsonl none.jsonl", "target=worse.jsonl", "width=7"]) == 2
    text = capsys.readouterr().err
    for word in ("stepz", "seed", "lr=0", "gamma", "threads", "width", "null", "none.jsonl"):
        assert word in text
    assert len(text.splitlines()) == 9
    assert {p.name for p in here.iterdir()} == {"bad.jsonl", "worse.jsonl"}


@pytest.mark.parametrize(
    ("words", "value"), [("true TRUE Yes on 1", True), ("false False no OFF 0", False)]
)
def test_boolean_spellings(words, value):
    for word in words.split():
        assert parse([LLM, f"verdict={word}"]).problem.verdict is value


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a.jsonl b.jsonl", ("a.jsonl", "b.jsonl")),
        ("'my a.jsonl' b=\"x y/b.jsonl\"", ("my a.jsonl", "b=x y/b.jsonl")),
        ("one=lr=1.jsonl -b.jsonl", ("one=lr=1.jsonl", "-b.jsonl")),
        ("  ключ=данные.jsonl  ", ("ключ=данные.jsonl",)),
        ("", ()),
    ],
)
def test_sources_in_words(text, paths):
    assert fields.read(tuple[str, ...], text) == paths


def config(here, body):
    (here / "run.yaml").write_text(
        body if isinstance(body, str) else yaml.safe_dump(body, sort_keys=False)
    )
    return "config=run.yaml"


def write_data(here, *names):
    for i, name in enumerate(names):
        rows = [f'{{"text": "word{i} number {k}"}}\n' for k in range(9)]
        path = here / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(rows))


@pytest.mark.parametrize(
    "sources",
    [
        {"web": "data/my web.jsonl", "law": "data/law.jsonl"},
        ["web=data/my web.jsonl", "law=data/law.jsonl"],
        "'web=data/my web.jsonl' law=data/law.jsonl",
    ],
)
def test_sources_in_a_config(here, sources):
    write_data(here, "data/my web.jsonl", "data/law.jsonl", "data/target=1.jsonl")
    problem = {"name": "llm_reweight", "sources": sources, "target": "data/target=1.jsonl"}
    body = {"problem": problem, "steps": 7, "verdict": False, "out": None}
    options = parse([config(here, body), "seed=3", "verdict=yes"])
    assert isinstance(options.problem, LLMReweight)
    assert options.problem.names == ["web", "law"]
    assert options.problem.data.sources["web"].path == "data/my web.jsonl"
    assert options.problem.verdict is True  # the command line wins
    assert (options.settings.steps, options.settings.seed) == (7, 3)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("- a\n- b\n", "must be a mapping of keys, got list"),
        ("a: [1\n", "cannot be read"),
        ("\0", "cannot be read"),
        ({"problem": "llm_reweight", "steps": 2.5}, "steps must be a whole number, got 2.5."),
        ({"problem": "llm_reweight", "steps": [2]}, "steps must be a whole number, got [2]."),
        ({"problem": "llm_reweight", "steps": True}, "steps must be a whole number, got True."),
        ({"problem": "llm_reweight", "model": {"a": 1}}, "problem.model must be text"),
        ({"problem": {"name": "llm_reweight", "soruces": ["a"]}}, "nearest is problem.sources"),
        ({"problem": {"soruces": ["a"]}}, "problem=NAME is missing"),
        ({"problem": "llm_reweight", 7: 1}, "unknown key 7"),
        ({"problem": "llm_reweight", "sources": 5}, "problem.sources must be words"),
    ],
)
def test_a_wrong_config_is_told(here, body, words, capsys):
    assert main([config(here, body)]) == 2
    assert words in capsys.readouterr().err


def test_help_has_every_key_as_one_types_it(capsys):
    assert main([LLM, "memory=lisa", "--help"]) == 0
    text = capsys.readouterr().out
    for line in ("  steps=300 ", "  problem.sources= ", "  problem.verdict=true ", "auto, never"):
        assert line in text
    assert "  memory.gamma=2" in text and "--" not in text
    for field in dataclasses.fields(LLMReweight):
        assert f"  problem.{field.name}=" in text
        assert fields.documentation(LLMReweight)[field.name]
    assert max(map(len, text.splitlines())) <= 100


def test_help_and_usage_without_a_problem(capsys):
    assert main(["--help"]) == 0
    assert "problem=llm_reweight" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["problem=quadratik", "--help"]) == 2
    assert main(["--list"]) == 0
    assert "memory: full lisa" in capsys.readouterr().out


STRANGER = """
import dataclasses, enum, pathlib
from typing import Optional
import bilevel, torch

class Color(enum.Enum):
    RED = "red"

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(bilevel.Problem):
    where: pathlib.Path = pathlib.Path("x")
    count: int | None = None
    rates: tuple[float, float] = (0.1, 0.2)
    color: Color = Color.RED
    penalty: float = 1.0

    def __post_init__(self):
        if self.count == 3:
            raise ValueError("three is too many")
    def init(self, generator):
        return torch.zeros(1), torch.zeros(1)
    def upper(self, x, y, batch):
        return (y - 1).square().sum()
    def lower(self, x, y, batch):
        return (y - x).square().sum()
"""


def test_fields_of_a_stranger(here, capsys):
    (here / "stranger_problem.py").write_text(STRANGER)
    mine = "problem=stranger_problem:Mine"
    made = parse([mine, "where=a b", "count=4", "rates=1e-3 2", "color=red"]).problem
    assert (made.where, made.count, made.rates) == (Path("a b"), 4, (0.001, 2.0))
    assert parse([mine, "count=none"]).problem.count is None
    with pytest.raises(InputError, match="count must be a whole number or none"):
        parse([mine, "count=x"])
    with pytest.raises(InputError, match="three is too many"):
        parse([mine, "count=3"])
    with pytest.raises(InputError, match=r"rates must be words"):
        parse([mine, "rates=1 2 3"])
    with pytest.raises(InputError, match=r"penalty may be problem\.penalty or solver\.penalty"):
        parse([mine, "penalty=3"])
    assert main([mine, "steps=2", "out=run"]) == 0
    assert main(["config=run/config.yaml", "steps=4", "out=run"]) == 0  # the same fingerprint
    assert main([mine, "--help"]) == 0


@pytest.mark.parametrize(
    ("hint", "value"), [(Literal["a"], "b"), (int, "0x"), (float, {}), (tuple[int, int], [1])]
)
def test_read_refuses(hint, value):
    with pytest.raises(ValueError, match=r"."):
        fields.read(hint, value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AID(engine="trace"), "solver.engine must be one of autograd, traced, compiled"),
        (lambda: AID(linear="cgg"), "solver.linear must be one of cg, .*, got 'cgg'"),
        (lambda: Penalty(upper_lr="0.1"), "solver.upper_lr must be a number, got '0.1'"),
        (lambda: Penalty(upper_lr=None), "solver.upper_lr must be a number, got None"),
        (lambda: Penalty(inner_steps=1.5), "solver.inner_steps must be a whole number, got 1.5"),
        (lambda: Penalty(inner_steps=True), "solver.inner_steps must be a whole number, got True"),
        (lambda: LISA(stepping="part"), "memory.stepping must be one of whole, parts, got 'part'"),
        (lambda: LISA(gamma=1.5), "memory.gamma must be a whole number, got 1.5"),
        (lambda: LoRA(targets="q_proj"), "memory.targets must be a tuple or list, got 'q_proj'"),
        (lambda: Ridge(rows="3"), "problem.rows must be a whole number, got '3'"),
    ],
)
def test_a_value_of_another_type_is_refused_in_python_too(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_whole_numbers_and_numbers_of_numpy_are_numbers():
    assert Penalty(upper_lr=1, inner_steps=np.int64(2), lower_lr=np.float32(0.5)).upper_lr == 1
    assert LoRA(targets=["q_proj"]).targets == ["q_proj"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("file", "file is a file, expected a folder"),
        ("file/sub", "file is a file, expected a folder"),
        ("full", "already holds files"),
        ("broken", "cannot be used"),
        ("n" * 300, "name too long"),
        ("/proc/none", "cannot be written"),
    ],
)
def test_an_unusable_out_is_refused(here, out, words, capsys):
    (here / "file").write_text("")
    for name, file in (("full", "mine.txt"), ("broken", "fingerprint.json")):
        (here / name).mkdir()
        (here / name / file).write_text("mine")
    before = sorted(here.rglob("*"))
    assert main([QUADRATIC, "steps=2", f"out={out}"]) == 2
    assert words in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_an_out_without_permission_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *a: False)  # a superuser may write everywhere
    assert main([QUADRATIC, "steps=2", "out=a/b"]) == 2
    assert f"no permission on {here}" in capsys.readouterr().err
