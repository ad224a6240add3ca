"""LoRA: y and its twins are low-rank adapters on one frozen base, injected by peft."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # private name, used by transformers and torch.func too

from bilevel.errors import InputError
from bilevel.fields import out_of_range
from bilevel.memory import Memory, MemoryState
from bilevel.outline import stood_in
from bilevel.quantized import Quantization, missing, on_the_host, quantize
from bilevel.tree import Part, Value, digest, whole
from bilevel.variable import Variable

OLDEST = (0, 18)  # of peft; older ones do not work with transformers 5


@dataclass(frozen=True, kw_only=True)
class LoRA(Memory):
    """Adapters of low rank train, on a base that is frozen and held once for all copies.

        h = W h0 + alpha / rank * B A h0,    A [rank, in], B [out, rank], B = 0 at the start

    Every copy has its own A and B in every chosen layer; all start alike. They are float32 where
    the base is in half precision. With `quantization` the base holds the linear layers, but for the
    head, in four bits, which changes its numbers.

    Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, equation 3.
    Deviations: adapters on all linear layers but the head rather than on those of attention; A
    starts uniform (Kaiming), as peft has it, rather than Gaussian.
    """

    rank: int = 16
    """Columns of B and rows of A."""
    alpha: int = 32
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Linear layers that get adapters, by name or its end such as q_proj; all but the head without
    any."""
    quantization: Quantization = "none"
    """How linear layers of the base are held, but for the head: as they are, or in four bits, nf4
    or fp4, of the package bitsandbytes (QLoRA)."""

    def __post_init__(self) -> None:
        if faults := out_of_range("memory", self, rank="at least 1", alpha="at least 1"):
            raise InputError(faults)

    def check(
        self, *, constrained: bool, direct: Sequence[str], options: Mapping[str, Any]
    ) -> list[str]:
        faults = _check_peft() + missing(self.quantization)
        if constrained:
            faults.append(
                "memory=lora cannot project: the feasible set is one of whole matrices, of which "
                "only a part of low rank moves; use memory=full."
            )
        return faults

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext() if self.quantization == "none" else on_the_host()

    def prepare(self, value: Value, names: Sequence[str]) -> Adapter:
        """Put an adapter for every name into a module, in place; the module is the base then.

        Raises:
            InputError: If the value is not a module, or has no such linear layers.
        """
        if faults := _check_peft():
            raise InputError(faults)
        from peft import LoraConfig, inject_adapter_in_model

        targets = _targets(value, self.targets)
        identity = _identity(value)
        if self.quantization != "none":
            head = _head(value)
            layers = {name: part for name, part in _linear(value).items() if part is not head}
            quantize(value, layers, self.quantization)
            identity = f"{identity} {self.quantization}"
        for name in names:
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=0.0,  # losses are pure
                target_modules=targets,
            )
            # peft makes adapters where the base is: not without numbers, where that is an outline
            with warnings.catch_warnings(), stood_in(value):
                for known in ("Already found a `peft_config`", "fan_in_fan_out is set to False"):
                    warnings.filterwarnings("ignore", known)  # both are meant
                inject_adapter_in_model(config, value, adapter_name=name)
        for name in names:
            for _, owner, attribute in _places(value, name):
                p = getattr(owner, attribute).detach()
                wide = p.float() if p.dtype in (torch.bfloat16, torch.float16) else p
                setattr(owner, attribute, nn.Parameter(wide))
        return Adapter(value, names[0], self, identity)

    def init(self, value: Value, generator: torch.Generator) -> MemoryState:
        return _State(value.identity)


class Adapter(Part):
    """One adapter of a base that others share, as a module whose parameters are the adapter's.

    It computes what the base does with this adapter. Attributes that it has not are the base's.

    Args:
        base: A module with peft's layers in it.
        name: Of the adapter.
        options: Of all adapters.
        identity: Tells this base from others.
    """

    def __init__(self, base: nn.Module, name: str, options: LoRA, identity: str) -> None:
        super().__init__()
        self.whole, self.name, self.options, self.identity = base, name, options, identity
        self._layers = [layer for _, layer in _tuned(base)]
        self._places = list(_places(base, name))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self._choose()
        result = self.whole(*arguments, **named)
        for part in pytree.tree_leaves(result):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(self._choose)  # before checkpointed blocks are computed again
        return result

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapter's parameters; read anew every time, since engines put others in place."""
        for path, owner, attribute in self._places if recurse else ():
            yield f"{prefix}.{path}" if prefix else path, getattr(owner, attribute)

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get("_modules", {}):
            return vars(self)["_modules"][name]
        base = vars(self).get("_modules", {}).get("whole")
        if base is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        self._choose()  # so that what is called through here, such as generate, has this adapter
        return getattr(base, name)

    def twin(self, name: str) -> Adapter:
        other = Adapter(self.whole, name, self.options, self.identity)
        with torch.no_grad():
            for p, own in zip(other.parameters(), self.parameters(), strict=True):
                p.copy_(own)
        return other

    def renewed(self, base: nn.Module, *, seed: int) -> Adapter:
        """An adapter of the same kind on another base, as at the start; drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.options.prepare(base, (self.name,))

    def save_pretrained(self, folder: Path | str, *, main: bool = True) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as `PeftModel` reads them.

        Args:
            folder: Is made if it is not there.
            main: Whether this process writes; all that hold a part of the adapter must call this.
        """
        from safetensors.torch import save_file

        mark = f".{self.name}."
        tensors = {
            f"base_model.model.{path.removeprefix('whole.')}".replace(mark, "."): whole(p).detach()
            for path, p in self.named_parameters()
        }
        if not main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        held = {name: t.cpu().contiguous() for name, t in tensors.items()}
        save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        base: Any = self.whole
        config = copy(base.peft_config[self.name])
        config.inference_mode = True
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        config.task_type = "CAUSAL_LM" if getattr(base, "can_generate", bool)() else None
        if not isinstance(config.target_modules, str):
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(str(folder))

    def _choose(self, *gradient: Tensor) -> None:
        """Let the base compute with this adapter from now on."""
        for layer in self._layers:
            # peft's own set_adapter would also switch the gradients of the others off
            layer._active_adapter = [self.name]


class _State(MemoryState):
    """Nothing changes; a checkpoint knows the base that its adapters belong to."""

    def __init__(self, base: str) -> None:
        self.base = base

    def before_step(self, step: int, variables: Sequence[Variable]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base}

    def load_state_dict(self, state: dict[str, Any], variables: Sequence[Variable]) -> None:
        if state["base"] != self.base:
            raise InputError(
                "the checkpoint holds adapters of another base model: its frozen weights differ "
                "from those of this run; give the same model and seed, or start anew."
            )


def _check_peft() -> list[str]:
    install = "pip install 'bilevel[llm]'"
    if find_spec("peft") is None:
        return [f"memory=lora needs the package peft, which is not installed: {install}."]
    found = metadata.version("peft")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return [f"memory=lora needs peft {oldest} or newer, found {found}: {install} --upgrade."]
    return []


def _targets(value: Value, wanted: Sequence[str]) -> list[str] | str:
    """What peft calls the target modules: ends of names if they tell these apart, else a pattern.

    Raises:
        InputError: If there are none, or one that is wanted is not among the linear layers.
    """
    if not isinstance(value, nn.Module):
        raise InputError(
            "memory=lora needs a lower variable that is an nn.Module, "
            f"got {type(value).__name__}; use memory=full."
        )
    if any(True for _ in _tuned(value)):
        raise InputError(
            f"memory=lora needs a {type(value).__name__} without adapters, and this one has some; "
            "merge them with merge_and_unload() and save the model again."
        )
    linear = _linear(value)
    if not linear:
        raise InputError(
            f"memory=lora needs linear layers, but {type(value).__name__} has none; use "
            "memory=full."
        )
    ends = sorted({name.rpartition(".")[2] for name in linear})
    unknown = [t for t in wanted if not any(_is_end(t, name) for name in linear)]
    if unknown:
        raise InputError(
            f"memory.targets: {type(value).__name__} has no linear layer {', '.join(unknown)}; its "
            f"linear layers are called {', '.join(ends[:20])}."
        )
    head = _head(value)
    chosen = {
        name
        for name, layer in linear.items()
        if (any(_is_end(t, name) for t in wanted) if wanted else layer is not head)
    }
    if not chosen:
        raise InputError(
            f"the only linear layer of {type(value).__name__} is its head; name it in "
            "memory.targets, or use memory=full."
        )
    found = sorted({name.rpartition(".")[2] for name in chosen})
    hit = {n for n, _ in value.named_modules() if any(_is_end(end, n) for end in found)}
    return found if hit == chosen else "|".join(n.replace(".", r"\.") for n in sorted(chosen))


def _linear(module: nn.Module) -> dict[str, nn.Module]:
    """The layers by name that peft adapts and that are called by themselves."""
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.pytorch_utils import Conv1D

    inner = NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention, which reads its weight
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D) and not isinstance(part, inner)
    }


def _head(module: nn.Module) -> nn.Module | None:
    get: Any = getattr(module, "get_output_embeddings", None)
    return get() if get is not None else None


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _tuned(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that peft has put in place, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield path, layer


def _places(base: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, str]]:
    """The parameters of an adapter: path below `whole`, the module that owns it, and its name."""
    for path, layer in _tuned(base):
        for part in layer.adapter_layer_names:
            for inner, owner in getattr(layer, part).named_modules():
                for attribute, _ in owner.named_parameters(recurse=False):
                    key = f"{inner}.{attribute}" if inner else attribute
                    if key.split(".")[0] == name:
                        yield ".".join(filter(None, ("whole", path, part, key))), owner, attribute


def _identity(base: nn.Module) -> str:
    return hashlib.sha256(digest(base).encode()).hexdigest()[:16]
