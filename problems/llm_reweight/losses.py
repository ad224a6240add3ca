"""The loss of every token, whole or with the logits of a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25  # entries that exist at once where no chunk is given: 128 MB in float32


def token_losses(model: nn.Module, ids: Tensor, *, chunk: int = 0) -> Tensor:
    """[rows, length - 1], the cross-entropy of each token given those before it, nats, float32.

    With more than `chunk` tokens, the head gets that many at a time: their logits are reduced to
    losses at once, and computed again in the backward pass. The head does so within its own
    `forward`, called by the model's. So whatever hooks gather a sharded weight before the head and
    free it after (FSDP2's pre-forward and post-forward hooks, and its pre-backward hook on what
    the head returned; ZeRO-3's likewise) run once a pass, as they do without chunks, and the
    weight is there when the logits are computed again.

    Args:
        model: A causal language model of transformers, possibly wrapped.
        ids: [rows, length]
        chunk: Tokens; 0 takes as many as have `LOGITS` logits. Ignored where `is_direct` says no.
    """
    inputs, targets = ids[:, :-1], ids[:, 1:]
    tokens = chunk or _fitting(model)
    if targets.numel() > tokens and is_direct(model):
        head = _causal(model).get_output_embeddings()
        chunked = partial(_chunked, head.forward, targets, tokens)
        with _forward(head, chunked):
            return model(input_ids=inputs).logits.squeeze(-1)
    logits = model(input_ids=inputs).logits
    return _losses(logits.flatten(0, 1), targets.flatten()).view(targets.shape)


def is_direct(model: nn.Module) -> bool:
    """Whether the logits of a model are what its head returns, so that it can work in chunks.

    Not so where they are capped or scaled afterwards, as in Gemma 2 or Cohere. Found by planting
    values in the place of the head's, once: the answer stays with the model and its copies. Where
    several processes share a model they must ask before that, since it takes a pass.
    """
    found = getattr(model, KNOWN, None)
    if found is None:
        found = _probe(model)
        setattr(model, KNOWN, found)
    return found


KNOWN = "logits_are_direct"
"""The attribute of a model that holds the answer."""


@torch.no_grad()
def _probe(model: nn.Module) -> bool:
    causal = _causal(model)
    head = causal and causal.get_output_embeddings()
    if head is None:
        return False
    device = next(model.parameters()).device
    # far from where tanh is the identity, and not representable in half precision
    planted = torch.tensor([-97.03, 0.51, 97.03], device=device).view(1, 3, 1)
    ids = torch.zeros(1, 3, dtype=torch.long, device=device)
    try:
        with _forward(head, lambda hidden: planted):
            logits = model(input_ids=ids).logits
    except Exception:  # a model's own code raises what it likes on logits of one entry
        return False
    return logits.dtype == planted.dtype and logits.equal(planted)


def _chunked(head: Callable[[Tensor], Tensor], targets: Tensor, tokens: int, hidden: Tensor) -> Any:
    pieces = zip(hidden.flatten(0, 1).split(tokens), targets.flatten().split(tokens), strict=True)
    losses = torch.cat(
        [
            checkpoint(_head_losses, head, *piece, use_reentrant=False, preserve_rng_state=False)
            for piece in pieces
        ]
    )
    return losses.view(*targets.shape, 1).clone()  # FSDP2's hooks want no view


def _head_losses(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    return _losses(head(hidden), targets)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block a module computes `function`, between its hooks as ever."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _causal(model: nn.Module) -> Any:
    """The model of transformers that `model` is or wraps, None if there is none."""
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)


def _fitting(model: nn.Module) -> int:
    causal = _causal(model)
    return LOGITS // causal.config.get_text_config().vocab_size if causal else LOGITS
