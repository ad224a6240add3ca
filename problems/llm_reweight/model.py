"""Language models: a tiny Llama made here, or any causal model from a folder or the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel import InputError
from bilevel.problems.llm_reweight.losses import token_losses
from bilevel.problems.llm_reweight.placement import Placement, place
from bilevel.problems.llm_reweight.tokens import Batch

TINY_VOCABULARY = 1024
TINY_END = "<end>"


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of 1,024 entries trained on the texts; deterministic, without download."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=TINY_VOCABULARY, special_tokens=[TINY_END], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=TINY_END)


def tiny_model(
    vocabulary: int, *, layers: int, width: int, seed: int, placement: Placement | None = None
) -> nn.Module:
    """A Llama with random weights drawn from `seed`; by default on the CPU, in float32."""
    from transformers import LlamaForCausalLM

    config = tiny_config(vocabulary, layers=layers, width=width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).train()
    return place(model, placement or Placement())


def tiny_config(vocabulary: int, *, layers: int, width: int) -> Any:
    """The shape of `tiny_model`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=2048,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or hub name; no code from it is run.

    Raises:
        InputError: If it cannot be loaded, or encodes text to nothing.
    """
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # broken files raise whatever their parsers raise
        raise InputError(_not_loaded(name, error)) from None
    if not tokenizer("hello world", add_special_tokens=False)["input_ids"]:
        raise InputError(f"the tokenizer of {name} encodes text to no tokens; fix its files.")
    return tokenizer


def check_folder(name: str) -> list[str]:
    """What keeps a local folder from being loaded, told without reading its weights."""
    folder = Path(name)
    if not name or not os.path.isdir(name):  # which Path.is_dir raises for, if it is too long
        return _check_hub_name(name)
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return [f"problem.model={name} cannot be read: {error.strerror}; check its permissions."]
    weights = [file for file in present if file.endswith(".safetensors")]
    faults = _check_config(folder) + [f for file in weights for f in _check_weights(folder / file)]
    if not weights:
        pickled = [file for file in present if file.endswith((".bin", ".pt", ".pth"))]
        found = f" ({pickled[0]} is a pickle, which can run code: not read)" if pickled else ""
        faults.append(
            f"problem.model={name} has no *.safetensors{found}; save it again with "
            "model.save_pretrained(folder)."
        )
    if not any(file.startswith(("tokenizer", "vocab")) for file in present):
        faults.append(
            f"problem.model={name} has no tokenizer files; add them with "
            "tokenizer.save_pretrained(folder)."
        )
    return faults


def identity(name: str) -> str:
    """What tells a model from another: its JSON files and the names and sizes of its weights."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    parts = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            parts.append(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
        elif path.suffix == ".safetensors":
            parts.append(f"{path.name} {path.stat().st_size}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"files of sha256 {digest[:16]}"


def load_model(
    name: str, *, length: int = 1, vocabulary: int = 1, placement: Placement | None = None
) -> nn.Module:
    """The causal language model of a local folder or hub name, dropout off.

    Args:
        name: A folder or a hub name; no code from it is run.
        length: Tokens that a row may have.
        vocabulary: Entries of the tokenizer.
        placement: How it computes; by default on the CPU, in float32.

    Raises:
        InputError: If it cannot be loaded whole, or does not suit such rows or the placement.
    """
    from transformers import AutoModelForCausalLM

    placement = placement or Placement()
    try:
        with _quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=placement.dtype,
                ignore_mismatched_sizes=True,  # told below, with the names
                output_loading_info=True,
            )
    except Exception as error:  # broken files raise whatever their parsers raise
        raise InputError(_not_loaded(name, error)) from None
    model, found = loaded
    model = place(_still(model), placement)
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    faults = unfit(model, name, length=length, vocabulary=vocabulary)
    if missing:
        faults.append(
            f"problem.model={name} lacks {len(missing)} of the weights of {type(model).__name__} "
            f"or has them in another shape, such as {missing[0]}; give a folder that was saved "
            "whole from such a model."
        )
    if faults:
        raise InputError(faults)
    return model


def empty_model(name: str, dtype: torch.dtype) -> nn.Module:
    """What `load_model` gives for a folder or hub name, with buffers alone, and not placed.

    Raises:
        InputError: If its files do not describe a model.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            model = outlined(config, dtype)
            if (Path(name) / "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(name)
    except Exception as error:  # broken files raise whatever their parsers raise
        raise InputError(_not_loaded(name, error)) from None
    return _still(model)


def outlined(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters on the meta device, its buffers on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # what is in buffers is in no file
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def example_losses(model: nn.Module, batch: Batch, *, chunk: int = 0) -> Tensor:
    """[rows], the mean cross-entropy over each row's trained tokens, in nats, in float32.

    Rows are padded on the right, which a causal model cannot see, so no attention mask is needed.
    Logits exist for `chunk` tokens at a time, see `token_losses`.
    """
    device = next(model.parameters()).device
    ids, trained = batch.ids.to(device), batch.trained.to(device)
    losses = token_losses(model, ids, chunk=chunk) * trained[:, 1:]
    return losses.sum(1) / trained[:, 1:].sum(1)


@torch.no_grad()
def unfit(model: Any, name: str, *, length: int, vocabulary: int) -> list[str]:
    """Why a model does not go with rows of `length` tokens from `vocabulary` entries."""
    faults = []
    entries = model.get_input_embeddings().weight.shape[0]
    if vocabulary > entries:
        faults.append(
            f"has {entries} embeddings, but its tokenizer has {vocabulary} entries; use the "
            "tokenizer of this model."
        )
    positions = getattr(model.config, "max_position_embeddings", None) or length
    if length > positions:
        faults.append(
            f"takes at most {positions} tokens; lower problem.max_length={length} to that."
        )
    pair = torch.tensor([[0, 0], [0, entries - 1]], device=model.device)
    first = model(input_ids=pair).logits[:, 0]
    near = max(1e-4, 4 * torch.finfo(first.dtype).eps)  # rounding may depend on the row
    if not torch.allclose(first[0], first[1], atol=near, rtol=near):
        faults.append("lets a token see the next one; expected a causal (decoder) model.")
    return [f"problem.model={name} {fault}" for fault in faults]


def _check_hub_name(name: str) -> list[str]:
    """A hub name is NAME or OWNER/NAME; anything else can only have meant a folder."""
    part = r"\w[\w.-]{0,95}"
    if re.fullmatch(f"{part}(/{part})?", name, re.ASCII) and not os.path.exists(name):
        return []
    found = "a file" if os.path.isfile(name) else "no such folder"
    return [f"problem.model={name}: found {found}, expected 'tiny', a folder or a hub name."]


def _check_config(folder: Path) -> list[str]:
    remedy = "give the folder of a model saved with save_pretrained."
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [f"problem.model={folder} has no config.json; {remedy}"]
    except (OSError, ValueError, RecursionError) as error:
        return [f"{folder / 'config.json'} cannot be read ({error}); {remedy}"]
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return [f"{folder / 'config.json'} names no model_type; {remedy}"]
    return []


def _check_weights(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            return []
    except (OSError, SafetensorError) as error:
        return [f"{file} is damaged ({error}); copy or save the model again."]


def _still(model: Any) -> Any:
    """A model as both copies must see it, without dropout."""
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block transformers draws no bars and says no more than errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _not_loaded(name: str, error: Exception) -> str:
    where = "a folder" if Path(name).is_dir() else "no folder of that name exists here"
    reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
    if "trust_remote_code" in reason:
        reason = "it needs code of its own, which is never run"
    return (
        f"problem.model={name} cannot be loaded ({where}: {reason[:300]}); expected 'tiny', a "
        "folder with config.json, tokenizer files and *.safetensors, or a hub name."
    )
