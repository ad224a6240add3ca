"""Shapes and options that the tests of plans share."""

import dataclasses
import json

import torch

from bilevel import LISA, Single
from bilevel.footprint import work
from bilevel.problems.llm_reweight import footprint, shapes
from bilevel.problems.llm_reweight.choices import choices
from bilevel.problems.llm_reweight.moments import moments
from bilevel.problems.llm_reweight.passes import passes_of

YI = ["problem=llm_reweight", "problem.model=yi-34b"]
MIXED = ["memory=lisa", "launcher=fsdp2", "devices=8", "device=a40"]
LONG = ["problem.max_length=1024", "problem.checkpointing=true", "problem.micro_batch=1"]
TOP = LISA(gamma=1, pool=1, pool_from="top", embedding=False)
NEOX = {"model_type": "gpt_neox", "hidden_act": "gelu_fast", "vocab_size": 1000}
NEOX |= {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
NEOX |= {"num_attention_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": False}
QWEN = {"model_type": "qwen2", "vocab_size": 40000, "hidden_size": 128, "intermediate_size": 512}
QWEN |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
QWEN |= {"max_position_embeddings": 256, "tie_word_embeddings": True}


def folder(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def meta(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shapes.config(name))


def bytes_of(problem, solver, memory, **changes):
    """The moments of one process on a CPU, where the optimizer steps tensor by tensor."""
    of, passes = footprint._shape(problem), passes_of(problem, 1)
    does = work(solver, problem.number(memory), memory)
    made = choices(problem, does, memory, Single(), 1, of)
    return moments(of, dataclasses.replace(made, foreach=False, **changes), passes)
