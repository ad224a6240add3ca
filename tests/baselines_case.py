"""A small problem whose right source is known, for the tests of baselines."""

import json
import random

from bilevel.problems.llm_reweight import LLMReweight

NAMES = ("right", "near", "wrong")
BUDGET = 20_000.0


def write_sources(folder, records=60):
    """The target speaks the words of `right`; `near` has half of them, `wrong` none."""
    draw = random.Random(0)
    right, wrong = (["".join(draw.choices(s, k=4)) for _ in range(12)] for s in ("abcde", "vwxyz"))
    words = {"right": right, "near": right[:6] + wrong[:6], "wrong": wrong, "target": right}
    for name, own in words.items():
        rows = [{"text": " ".join(draw.choices(own, k=20))} for _ in range(records)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def small_problem(folder):
    """Learning the weights of these sources, which are written into the folder."""
    write_sources(folder)
    options = {"width": 16, "layers": 1, "max_length": 24, "batch": 6, "target_batch": 3}
    found = LLMReweight(
        sources=tuple(str(folder / f"{n}.jsonl") for n in NAMES),
        target=str(folder / "target.jsonl"),
        verdict_lr=1e-2,
        **options,
    )
    found.prepare()
    return found
