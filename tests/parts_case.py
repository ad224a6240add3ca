"""One process of those that tests/test_outline.py starts: the start of every model by parts."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bilevel import LISA, Full, InputError, Launcher, LoRA, processes
from bilevel.fsdp import DDP, FSDP2
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.problem import from_records
from bilevel.solve import start
from bilevel.solvers.penalty import scalebio
from bilevel.tree import Part, local, whole

LAUNCHERS = {"fsdp2": FSDP2(), "ddp": DDP()}
MEMORIES = {"full": Full(), "lisa": LISA(gamma=1, period=1), "lora": LoRA(rank=2)}
MODELS = ("tiny", "llama", "several", "tied", "gpt2", "experts", "half")
BY_PARTS = ("llama", "several", "tied", "gpt2", "half")
"""Those of which every process reads its shards alone."""


def problem_of(folder: Path, model: str, dtype: str = "float32") -> LLMReweight:
    """A problem with few records, whose batches two processes can share."""
    name = model if model == "tiny" else str(folder / model)
    rows = [{"text": f"{'one two three ' * (1 + i % 3)}{i}"} for i in range(24)]
    size = {"layers": 3, "width": 32, "batch": 4, "target_batch": 4, "verdict": False}
    sources = {"a": rows[:8], "b": rows[8:16]}
    return from_records(sources, rows[16:], model=name, dtype=dtype, **size)


def tensors(problem: LLMReweight, memory: str, launcher: Launcher) -> dict[str, torch.Tensor]:
    """All that both copies compute with at the start, whole, and the bytes of the base's identity.

    After the first draw of LISA, so that the twin has a block of its own.
    """
    state = start(problem, scalebio(), seed=3, memory=MEMORIES[memory], launcher=launcher)
    state.memory.before_step(0, state.copies)
    found = {"held": torch.tensor(0)}
    for copy in state.copies:
        y = copy.value
        module = y.whole if isinstance(y, Part) else y
        for name, p in module.named_parameters(remove_duplicate=False):
            found[f"{copy.name}.{name}"] = whole(p.detach()).clone()
            found["held"] += local(p).numel() * (copy.name == "y")
            found[f"{copy.name}.{name}.trains"] = torch.tensor(p.requires_grad)
        for name, b in module.named_buffers():
            found[f"{copy.name}.{name}"] = b.clone()
    base = state.memory.state_dict().get("base", "")
    return found | {"base": torch.tensor(list(base.encode()), dtype=torch.uint8)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ways = [(memory, name) for memory in MEMORIES for name in LAUNCHERS]
    cases = [(m, "float32", "full", "fsdp2") for m in MODELS if m not in ("tiny", "several")]
    cases += [("several", "bfloat16", "full", "fsdp2"), ("half", "bfloat16", "lora", "fsdp2")]
    cases += [(model, "float32", *way) for model in ("tiny", "several") for way in ways]
    cases += [("tied", "bfloat16", "lisa", "ddp")]
    for model, dtype, memory, name in cases:
        launcher = LAUNCHERS[name]
        found = tensors(problem_of(folder, model, dtype), memory, launcher)
        if launcher.is_main:
            save_file(found, folder / f"{model}-{dtype}-{memory}-{name}.safetensors")
    told = refused(problem_of(folder, "untied"), LAUNCHERS["fsdp2"])
    (folder / f"told-{processes.rank()}.txt").write_text(told)
    (folder / "done.json").write_text(json.dumps(cases))


def refused(problem: LLMReweight, launcher: Launcher) -> str:
    try:
        start(problem, scalebio(), launcher=launcher)
    except InputError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
