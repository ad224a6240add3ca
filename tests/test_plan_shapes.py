"""Shapes of decoders: their parameters counted by part, against the models themselves."""

import pytest
import torch
from plan_case import QWEN, YI, folder, meta

from bilevel import InputError, forecast
from bilevel.blocks import parameter_groups
from bilevel.problems.llm_reweight import shapes


@pytest.mark.parametrize("name", [*shapes.PRESETS, "tiny", "qwen3"])
def test_parameters_of_every_part_are_those_of_the_model(name, tmp_path):
    if name == "qwen3":
        name = folder(tmp_path, QWEN | {"model_type": "qwen3", "head_dim": 32})
    model, of = meta(name), shapes.shape(name)
    groups, sizes = parameter_groups(model), {n: p.numel() for n, p in model.named_parameters()}
    assert {sum(map(sizes.get, names)) for names in groups["blocks"]} == {of.block}
    for part in ("embedding", "head", "norms"):
        assert sum(map(sizes.get, groups[part])) == getattr(of, part), part
    assert of.total == sum(sizes.values())
    matrices = [p for n, p in model.named_parameters() if n in groups["blocks"][0] and p.dim() == 2]
    assert sorted(of.linears) == sorted(tuple(p.shape[::-1]) for p in matrices)


def test_published_totals():
    published = {"llama-3-8b": 8_030_261_248, "qwen-2.5-32b": 32_763_876_352}
    published |= {"yi-34b": 34_388_917_248, "gpt-neox-20b": 20_554_567_680}
    assert {name: shapes.shape(name).total for name in published} == published


def test_adapters_of_yi_are_those_of_the_published_arithmetic():
    assert shapes.shape("yi-34b").adapters(16) == 122_880_000  # 16 * 60 * sum of in + out


@pytest.mark.parametrize("name", ["tiny", "yi-34b", "gpt-neox-20b", "qwen-2.5-0.5b"])
def test_linear_layers_have_the_names_and_sizes_of_the_model(name):
    linear = {
        n: (layer.in_features, layer.out_features)
        for n, layer in meta(name).named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    assert shapes.shape(name).layers() == linear


# q and v of 60 blocks: 7168 -> 7168 and 7168 -> 8 x 128; the head 7168 -> 64000
ADAPTED = {
    ("q_proj", "v_proj"): 16 * 60 * (7168 + 7168 + 7168 + 1024),
    ("self_attn.q_proj",): 16 * 60 * (7168 + 7168),
    ("layers.7.mlp.down_proj", "lm_head"): 16 * (20480 + 7168 + 7168 + 64000),
}


@pytest.mark.parametrize("targets", ADAPTED, ids="+".join)
def test_chosen_layers_are_planned(targets):
    words = [*YI, "memory=lora", f"memory.targets={' '.join(targets)}", "device=h200"]
    found = forecast.make(words).footprint
    assert found.trained == ADAPTED[targets]
    parts = found.moments["at the head"]
    assert parts["adapters"] == 2 * 4 * ADAPTED[targets]
    assert found.total < forecast.make([*YI, "memory=lora", "device=h200"]).footprint.total


def test_layers_that_are_not_there_are_told_as_a_run_tells_them():
    with pytest.raises(InputError, match=r"yi-34b has no linear layer q_lin; its linear layers"):
        forecast.make([*YI, "memory=lora", "memory.targets=q_lin"])


def test_shapes_that_cannot_be_planned_are_refused(tmp_path):
    name = folder(tmp_path, {"model_type": "gpt2"})
    with pytest.raises(InputError, match="is a gpt2, whose sizes"):
        shapes.shape(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        shapes.shape(name)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="names no model_type"):
        shapes.shape(name)
