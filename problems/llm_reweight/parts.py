"""Models for several processes that cut them up: each reads its part, or gets it from the first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bilevel import InputError, processes
from bilevel.outline import Files, Sent, attach, stood_in
from bilevel.problems.llm_reweight import model as model_module
from bilevel.problems.llm_reweight.building import chunk_faults
from bilevel.problems.llm_reweight.losses import KNOWN, is_direct
from bilevel.problems.llm_reweight.placement import place

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight


def outline(problem: LLMReweight, seed: int) -> nn.Module:
    """What `problem.fresh_model(seed)` gives, on the meta device, with an outline.

    Where the files of a folder have the parameters of the model under their names, each process
    reads what it holds. All else (`tiny`, names of the hub, quantized models, those that
    transformers converts on loading) the main process makes, and sends.

    Raises:
        InputError: On every process, if the model cannot be loaded or does not suit the problem.
    """
    made: list[nn.Module] = []

    def prepared() -> str:
        if problem.model != "tiny":
            model = _empty(problem)
            if _places(model, problem.model):
                return json.dumps({"parts": True, "direct": _checked(problem, model)})
        made.append(problem.fresh_model(seed, by_engine=True))
        return json.dumps({"parts": False, "direct": is_direct(made[0])})

    told = json.loads(processes.on_main(prepared))
    model: Any = _empty(problem)
    setattr(model, KNOWN, told["direct"])
    places = _places(model, problem.model) if told["parts"] else {}
    model = place(model, replace(problem.placement, by_engine=True))
    if not told["parts"]:
        return attach(model, Sent(model, made[0] if made else None))
    if not places:
        raise processes.ProcessError(
            f"problem.model={problem.model} has other files on the machine of process "
            f"{processes.rank()} than on that of the first; give all of them the same."
        )
    return attach(model, Files(model, places))


def _empty(problem: LLMReweight) -> nn.Module:
    """The model as its config describes it, with its buffers alone, and not placed."""
    dtype = problem.placement.dtype
    if problem.model != "tiny":
        return model_module.empty_model(problem.model, dtype)
    size = {"layers": problem.layers, "width": problem.width}
    config = model_module.tiny_config(len(problem.tokenizer), **size)
    return model_module.outlined(config, dtype).train()


def _checked(problem: LLMReweight, model: nn.Module) -> bool:
    """Whether the logits of a model without numbers are direct.

    Raises:
        InputError: If it does not suit the rows, the tokenizer or the options.
    """
    rows = {"length": problem.max_length, "vocabulary": len(problem.tokenizer)}
    with stood_in(model):
        faults = model_module.unfit(model, problem.model, **rows) + chunk_faults(problem, model)
        if faults:
            raise InputError(faults)
        return is_direct(model)


def _places(model: nn.Module, name: str) -> dict[str, Path]:
    """The file of each parameter and saved buffer; none where they cannot be read one by one."""
    from safetensors import safe_open

    folder = Path(name)
    config: Any = model.config
    special = (folder / "adapter_config.json").exists() or hasattr(config, "quantization_config")
    if special or _converts(model):
        return {}
    shapes: dict[str, tuple[Path, list[int]]] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {key: (path, file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    own = dict(model.named_parameters())
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - own.keys()
    saved = model.state_dict().keys() - tied
    held = {**own, **{n: b for n, b in model.named_buffers() if n in saved}}
    fits = all(n in shapes and shapes[n][1] == list(t.shape) for n, t in held.items())
    if not fits or tied & shapes.keys():  # what is tied and there twice, transformers may untie
        return {}
    return {name: shapes[name][0] for name in held}


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError):
        return []
    files = [folder / name for name in sorted(set(names))]
    return files if all(path.is_file() for path in files) else []


def _converts(model: nn.Module) -> bool:
    """Whether transformers computes parameters from what is in the files rather than copy it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    return not all(isinstance(change, WeightRenaming) for change in found)
