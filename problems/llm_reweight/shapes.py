"""Shapes of decoders: published configurations by name, and their parameters counted by part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bilevel import InputError
from bilevel.problems.llm_reweight.model import TINY_VOCABULARY

_LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_QWEN: dict[str, Any] = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen-2.5-0.5b": _QWEN
    | {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864}
    | {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
    | {"max_position_embeddings": 32768, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192}
    | {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "rope_theta": 5e5, "tie_word_embeddings": True},
    "llama-3-8b": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"max_position_embeddings": 8192, "rope_theta": 5e5},
    "qwen-2.5-32b": _QWEN
    | {"vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648}
    | {"num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}
    | {"max_position_embeddings": 32768, "tie_word_embeddings": False},
    "yi-34b": _LLAMA
    | {"vocab_size": 64000, "hidden_size": 7168, "intermediate_size": 20480}
    | {"num_hidden_layers": 60, "num_attention_heads": 56, "num_key_value_heads": 8}
    | {"max_position_embeddings": 4096, "rope_theta": 5e6},
    "gpt-neox-20b": {"model_type": "gpt_neox", "hidden_act": "gelu_fast", "rotary_pct": 0.25}
    | {"vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576}
    | {"num_hidden_layers": 44, "num_attention_heads": 64, "max_position_embeddings": 2048}
    | {"tie_word_embeddings": False},
}
"""The published config.json of each, written from memory; the totals agree with the published."""

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")
"""Model types whose parameters and activations are known here."""


_NAMES = {
    "llama": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    "gpt_neox": (
        ("attention.query_key_value", "attention.dense"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}
"""Of the matrices of a block, in the order of `Shape.linears`."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder's sizes; what is counted of it is counted in numbers, not bytes."""

    name: str
    source: str
    """Where the sizes are from, in words."""
    kind: str
    """The model type, one of `KNOWN`."""
    vocabulary: int
    width: int
    inner: int
    """Width inside the two-layer part of a block."""
    blocks: int
    heads: int
    groups: int
    """Heads of keys and values."""
    head_size: int
    positions: int
    """The longest row it takes, in tokens."""
    tied: bool
    """Whether the head is the embedding."""
    activation: str = "silu"
    attention_bias: bool = False
    output_bias: bool = False
    inner_bias: bool = False
    head_norms: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of every matrix of a block."""
        queries, keys = self.heads * self.head_size, self.groups * self.head_size
        if self.kind == "gpt_neox":
            return [
                (self.width, 3 * self.width),
                (self.width, self.width),
                (self.width, self.inner),
                (self.inner, self.width),
            ]
        attention = [(self.width, queries), (self.width, keys), (self.width, keys)]
        gated = [(self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]
        return [*attention, (queries, self.width), *gated]

    @property
    def matrices(self) -> int:
        """Numbers in the matrices of one block, each multiplied and added once for a token."""
        return sum(a * b for a, b in self.linears)

    @property
    def block(self) -> int:
        """Numbers in one block."""
        outs = [out for _, out in self.linears]
        attention = len(outs) - (2 if self.kind == "gpt_neox" else 3)
        biases = self.attention_bias * sum(outs[: attention - 1])
        biases += self.output_bias * outs[attention - 1] + self.inner_bias * sum(outs[attention:])
        norms = (4 if self.kind == "gpt_neox" else 2) * self.width
        return self.matrices + biases + norms + self.head_norms * 2 * self.head_size

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """Numbers in the output head; 0 where it is the embedding."""
        return 0 if self.tied else self.embedding

    @property
    def norms(self) -> int:
        """Numbers outside blocks, embedding and head."""
        return (2 if self.kind == "gpt_neox" else 1) * self.width

    @property
    def total(self) -> int:
        return self.blocks * self.block + self.embedding + self.head + self.norms

    def layers(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every linear layer by its name in the model of transformers."""
        attention, inner = _NAMES["gpt_neox" if self.kind == "gpt_neox" else "llama"]
        stack = "gpt_neox.layers" if self.kind == "gpt_neox" else "model.layers"
        found = {
            f"{stack}.{i}.{name}": size
            for i in range(self.blocks)
            for name, size in zip((*attention, *inner), self.linears, strict=True)
        }
        return found | {"lm_head": (self.width, self.vocabulary)}

    def adapted(self, targets: Sequence[str] = ()) -> list[tuple[int, int]]:
        """(in, out) of the linear layers with these names, or ends of names; all but the head
        without any.

        Raises:
            InputError: If there is no such layer.
        """
        if not targets:
            return self.blocks * self.linears
        own = self.layers()

        def fits(target: str, name: str) -> bool:
            return name == target or name.endswith(f".{target}")

        unknown = [t for t in targets if not any(fits(t, name) for name in own)]
        if unknown:
            ends = sorted({name.rpartition(".")[2] for name in own})
            raise InputError(
                f"memory.targets: {self.name} has no linear layer {', '.join(unknown)}; its "
                f"linear layers are called {', '.join(ends)}."
            )
        return [size for name, size in own.items() if any(fits(t, name) for t in targets)]

    def adapters(self, rank: int, targets: Sequence[str] = ()) -> int:
        """Numbers in low-rank adapters of that rank, on the layers that `adapted` gives."""
        return rank * sum(a + b for a, b in self.adapted(targets))


def config(
    name: str, *, layers: int = 2, width: int = 64, vocabulary: int = TINY_VOCABULARY
) -> Any:
    """The transformers config of a preset, of 'tiny', or of a local folder; no weights are read.

    Args:
        name: A key of `PRESETS`, 'tiny', or a folder with config.json.
        layers: Blocks of 'tiny'.
        width: Of 'tiny'.
        vocabulary: Entries of 'tiny'.

    Raises:
        InputError: If there is no such preset (names the nearest), or no readable config.json.

    >>> config("yi-34b").num_hidden_layers
    60
    """
    from transformers import AutoConfig

    if name == "tiny":
        size = {"hidden_size": width, "intermediate_size": width * 8 // 3}
        size |= {"num_hidden_layers": layers, "num_attention_heads": max(1, width // 16)}
        body = {"model_type": "llama", "vocab_size": vocabulary, **size}
        body |= {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    else:
        body = dict(PRESETS[name]) if name in PRESETS else _folder(name)
    body |= {"use_cache": False}
    kind = body.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **body)
    except Exception as error:  # whatever a wrong value makes the class of the config raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"problem.model={name}: config.json cannot be used: {reason}.") from None


def shape(name: str, *, layers: int = 2, width: int = 64) -> Shape:
    """The sizes of a preset, of 'tiny', or of a local folder's config.json.

    Raises:
        InputError: As `config`, or if its model type is not in `KNOWN`.

    >>> shape("yi-34b").total
    34388917248
    """
    own = config(name, layers=layers, width=width)
    kind = own.model_type
    if kind not in KNOWN:
        raise InputError(
            f"problem.model={name} is a {kind}, whose sizes cannot be planned yet; expected one of "
            f"{', '.join(KNOWN)}."
        )
    words = {"tiny": "made here"} | dict.fromkeys(PRESETS, "published config, from memory")
    heads = own.num_attention_heads
    biased = getattr(own, "attention_bias", False)
    return Shape(
        name=name,
        source=words.get(name, "config.json of that folder"),
        kind=kind,
        vocabulary=own.vocab_size,
        width=own.hidden_size,
        inner=own.intermediate_size,
        blocks=own.num_hidden_layers,
        heads=heads,
        groups=getattr(own, "num_key_value_heads", None) or heads,
        head_size=getattr(own, "head_dim", None) or own.hidden_size // heads,
        positions=own.max_position_embeddings,
        tied=bool(own.tie_word_embeddings),
        activation=own.hidden_act,
        attention_bias=kind == "qwen2" or biased,
        output_bias=biased and kind != "qwen2",
        inner_bias=kind == "gpt_neox" or getattr(own, "mlp_bias", False),
        head_norms=kind == "qwen3",
    )


def _folder(name: str) -> dict[str, Any]:
    folder = Path(name)
    if not folder.is_dir():
        near = get_close_matches(name, [*PRESETS, "tiny"], n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"problem.model={name} is no shape that can be planned; {hint}Choices: tiny, "
            f"{', '.join(PRESETS)}, or a folder with config.json."
        )
    try:
        body = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}.") from None
    if not isinstance(body, dict) or not isinstance(body.get("model_type"), str):
        raise InputError(f"{folder / 'config.json'} names no model_type.")
    return body
