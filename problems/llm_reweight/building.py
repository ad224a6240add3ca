"""The tokenizer and the models that the options of a run ask for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from bilevel import InputError
from bilevel.problems.llm_reweight import templates
from bilevel.problems.llm_reweight.losses import is_direct
from bilevel.problems.llm_reweight.model import (
    TINY_END,
    load_model,
    load_tokenizer,
    tiny_model,
    tiny_tokenizer,
)
from bilevel.problems.llm_reweight.tokens import distinct
from bilevel.quantized import stays_on_the_host

if TYPE_CHECKING:
    from bilevel.problems.llm_reweight.problem import LLMReweight

LEARNED_FROM = 2000
"""Examples of each source that the tiny tokenizer is trained on."""


def style(problem: LLMReweight) -> templates.Style:
    """How records are written; the tiny model's own template is chatml."""
    own = problem.model == "tiny" and problem.template in ("auto", "tokenizer")
    return templates.Style(
        template="chatml" if own else problem.template,
        train_on_prompt=problem.train_on_prompt,
        last_turn_only=problem.last_turn_only,
    )


def tokenizer(problem: LLMReweight) -> Any:
    """The model's own tokenizer; for `tiny` one that is trained on the sources."""
    if problem.model != "tiny":
        return load_tokenizer(problem.model)
    data = problem.data
    sources = [data.sources[name] for name in sorted(data.sources)]
    template = templates.named(problem.style.template, end=TINY_END)
    pieces = (
        templates.write(example, problem.style, template)[0]
        for source in sources
        for example in distinct(source, LEARNED_FROM)
    )
    return tiny_tokenizer(text for segments in pieces for text, _ in segments)


def model(problem: LLMReweight, seed: int, *, by_engine: bool) -> nn.Module:
    """A model as every run starts from it, see `LLMReweight.fresh_model`."""
    size = len(problem.tokenizer)
    placement = replace(problem.placement, by_engine=by_engine or stays_on_the_host())
    if problem.model == "tiny":
        shape = {"layers": problem.layers, "width": problem.width}
        made = tiny_model(size, **shape, seed=seed, placement=placement)
        is_direct(made)  # asked now, before several processes share it
        return made
    made = load_model(
        problem.model, length=problem.max_length, vocabulary=size, placement=placement
    )
    if faults := chunk_faults(problem, made):
        raise InputError(faults)
    return made


def chunk_faults(problem: LLMReweight, made: nn.Module) -> list[str]:
    """Why the loss of a model cannot be taken in the chunks that are asked for."""
    if is_direct(made) or not problem.loss_chunk:
        return []
    return [
        f"problem.loss_chunk={problem.loss_chunk} cannot be used with "
        f"problem.model={problem.model}, which changes the logits after its head; leave it out."
    ]
