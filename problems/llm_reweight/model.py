"""Language models: a tiny Llama made here, or any causal model from a folder or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel import InputError
from bilevel.problems.llm_reweight.tokens import Batch

TINY_VOCABULARY = 1024


def tiny_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of 1,024 entries trained on the texts; deterministic, without download."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=TINY_VOCABULARY, special_tokens=["<end>"], show_progress=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>")


def tiny_model(vocabulary: int, *, layers: int, width: int, seed: int) -> nn.Module:
    """A Llama with random weights drawn from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).train()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or hub name; no code from it is run.

    Raises:
        InputError: If it cannot be loaded, or encodes text to nothing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(name, error)) from None
    if not tokenizer("hello world", add_special_tokens=False)["input_ids"]:
        raise InputError(f"the tokenizer of {name} encodes text to no tokens; fix its files.")
    return tokenizer


def check_folder(name: str) -> list[str]:
    """What keeps a local folder from being loaded, told from its file names."""
    folder = Path(name)
    if not folder.is_dir():
        return []
    present = {path.name for path in folder.iterdir()}
    faults = []
    if "config.json" not in present:
        faults.append(f"problem.model={name} has no config.json; give the folder of a saved model.")
    if not any(file.endswith(".safetensors") for file in present):
        pickled = sorted(file for file in present if file.endswith((".bin", ".pt", ".pth")))
        found = f" ({pickled[0]} is a pickle, which can run code: not read)" if pickled else ""
        faults.append(
            f"problem.model={name} has no *.safetensors{found}; save it again with "
            "save_pretrained(folder, safe_serialization=True)."
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


def load_model(name: str) -> nn.Module:
    """The causal language model of a local folder or hub name, dropout off, in float32.

    Raises:
        InputError: If it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise InputError(_not_loaded(name, error)) from None
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # both copies must see the same network
    return model.eval()


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """[rows], the mean cross-entropy over each row's trained tokens, in nats, in float32.

    Rows are padded on the right, which a causal model cannot see, so no attention mask is needed.
    """
    device = next(model.parameters()).device
    ids, trained = batch.ids.to(device), batch.trained.to(device)
    logits = model(input_ids=ids[:, :-1]).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1) * trained[:, 1:]
    return losses.sum(1) / trained[:, 1:].sum(1)


def _not_loaded(name: str, error: Exception) -> str:
    where = "a folder" if Path(name).is_dir() else "no folder of that name exists here"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"problem.model={name} cannot be loaded ({where}: {reason}); expected 'tiny', a folder "
        "with config.json, tokenizer files and *.safetensors, or a hub name."
    )
