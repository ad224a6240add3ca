"""What malloc keeps of freed memory: its behavior, and the plan's bytes against units of models."""

import dataclasses
import platform
import subprocess
import sys

import pytest

from bilevel import LISA, Full, forecast
from bilevel.blocks import units
from bilevel.footprint import work
from bilevel.fsdp import DDP, FSDP2
from bilevel.lora import LoRA
from bilevel.problems.llm_reweight import LLMReweight, footprint, heap, rehearsal
from bilevel.problems.llm_reweight.choices import Choices, choices
from bilevel.solvers.penalty import scalebio

HEAP = """
import ctypes, torch
libc, SIZE = ctypes.CDLL(None), 8 * 2**20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]
libc.mallinfo2.restype = Info
mapped = torch.empty(31 * 2**20, dtype=torch.uint8)
del mapped  # from now on what is smaller comes from the heap
def plain():
    libc.free(libc.malloc(SIZE))
def aligned():
    torch.empty(SIZE, dtype=torch.uint8)
for buffer in (plain, aligned):
    before, between = libc.mallinfo2().a, []
    for _ in range(8):
        buffer()
        between.append(libc.malloc(4096))
    print((libc.mallinfo2().a - before) / SIZE)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_malloc_does_not_use_the_hole_of_an_aligned_buffer_for_its_equal():
    found = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    plain, aligned = map(float, found.stdout.split())
    assert plain < 2  # of eight buffers, each freed before the next
    assert aligned > 3  # some fit what was free before


MEMORIES = {"full": Full(), "lisa": LISA(gamma=2, head=False), "lora": LoRA(rank=4)}


def made(problem, memory, launcher):
    of, does = footprint._shape(problem), work(scalebio())
    return of, choices(problem, does, memory, launcher, 2, of)


@pytest.mark.parametrize("launcher", [FSDP2(), DDP()])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("mapped", [2**40, 2**16])
def test_holes_are_the_buffers_of_the_units_that_engines_shard(
    launcher, memory, mapped, monkeypatch
):
    monkeypatch.setattr(heap, "MAPPED", mapped)
    problem = LLMReweight(layers=4, width=64, dtype="bfloat16", device="cpu")
    model = rehearsal._model(problem)
    frozen = {"full": [], "lisa": [model.lm_head, *model.model.layers[2:]], "lora": [model]}
    still = {id(p) for part in frozen[memory] for p in part.parameters()}
    want = 0
    for unit in units(model):
        sizes = [p.numel() for p in unit.parameters()]
        trains = all(id(p) not in still for p in unit.parameters())
        buffers = [2 * n for n in sizes] * (1 + trains)  # numbers, and gradients
        buffers += [2 * sum(sizes)] * isinstance(launcher, FSDP2) + [4 * sum(sizes)] * trains
        want += sum(size for size in buffers if size < mapped)
    of, chosen = made(problem, MEMORIES[memory], launcher)
    if memory == "lora":
        want += 2 * 4 * of.adapters(4)
    assert 2 * of.block > 2**16
    assert heap.holes(of, chosen) == pytest.approx(want, rel=1e-9)


def test_a_hole_is_counted_once():
    of, chosen = made(LLMReweight(device="cpu"), Full(), FSDP2())
    passing = {"activations": 100.0, "gathered": 10.0, "unreduced gradient": 1.0}
    found = heap.kept(of, chosen, passing)
    assert found["freed memory that malloc keeps"] == chosen.keeps * 100
    assert found["holes of buffers in malloc's heap"] == heap.holes(of, chosen) > 0
    one = heap.kept(of, dataclasses.replace(chosen, buffered=0), passing)
    assert list(one) == ["freed memory that malloc keeps"]
    assert not heap.kept(of, Choices(buffered=2), passing)


WORDS = ["problem=llm_reweight", "launcher=fsdp2", "devices=2", "dtype=float32"]


def test_only_a_processor_has_a_heap():
    processor = forecast.make([*WORDS, "problem.device=cpu"]).footprint
    card = forecast.make([*WORDS, "device=h100"]).footprint
    more = {"freed memory that malloc keeps", "holes of buffers in malloc's heap"}
    for moment, parts in card.moments.items():
        assert not more & parts.keys()
        others = processor.moments[moment].keys() - more
        assert others - {"interpreter and libraries"} == parts.keys() - {"context and slack"}


@pytest.mark.parametrize(("launcher", "blocks"), [("fsdp2", 2), ("ddp", 1)])
def test_a_block_is_copied_for_its_use(launcher, blocks):
    words = ["problem=llm_reweight", "problem.model=yi-34b", "devices=8", "device=a40"]
    parts = forecast.make([*words, f"launcher={launcher}"]).footprint.moments[
        "at the highest block"
    ]
    assert parts["gathered"] == 2 * blocks * 557_856_768
    assert parts["unreduced gradient"] == (2 + 4) * 557_856_768
