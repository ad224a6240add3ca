"""Models from a local folder: what is loaded, tied weights under LISA, and what is refused."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bilevel import checkpoint
from bilevel.memory import LISA
from bilevel.problems.llm_reweight.model import load_model, tiny_tokenizer
from bilevel.run import main
from bilevel.tree import clone

WORDS = {
    "sea": ("wave", "tide", "salt", "ship", "sail", "harbor", "storm", "anchor"),
    "law": ("court", "judge", "claim", "appeal", "statute", "clause", "brief", "ruling"),
}


def records(words, count):
    draw = random.Random(words[0])
    return [json.dumps({"text": " ".join(draw.choices(words, k=12))}) for _ in range(count)]


def make(kind, vocabulary, tied):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied}
    if kind == "gpt2":
        size = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **size, **ends))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=3, **size, **ends)
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data and three saved models."""
    root = tmp_path_factory.mktemp("models")
    for name, words in WORDS.items():
        (root / f"{name}.jsonl").write_text("\n".join(records(words, 40)))
    (root / "target.jsonl").write_text("\n".join(records(WORDS["sea"][::-1], 40)))
    tokenizer = tiny_tokenizer([" ".join(words) for words in WORDS.values()])
    kinds = [("llama", "llama", False), ("tied", "llama", True), ("gpt2", "gpt2", True)]
    for name, kind, tied in kinds:
        make(kind, len(tokenizer), tied).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def folder(work, tmp_path, monkeypatch):
    """A copy of `llama` called `model` to be damaged, in the current folder."""
    for path in work.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    shutil.copytree(work / "llama", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "model"


def run(model, *more):
    base = {"problem": "llm_reweight", "problem.model": model, "problem.target": "target.jsonl"}
    base |= {"problem.sources": "sea.jsonl law.jsonl", "problem.max_length": 24, "steps": 4}
    base |= {"problem.batch": 4, "problem.verdict": "false", "out": "out", "solver.warmup": 1}
    base |= dict(word.split("=", 1) for word in more)
    return main([f"{key}={value}" for key, value in base.items()])


@pytest.mark.parametrize("memory", [["memory=full"], ["memory=lisa", "memory.gamma=1"]])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_a_saved_model_is_reweighted_for(folder, work, capfd, name, memory):
    assert run(work / name, *memory) == 0
    streams = capfd.readouterr()
    assert streams.err == ""  # no bars and notices of the libraries
    assert json.loads((folder.parent / "out/weights.json").read_text())["model"].endswith(name)


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_tied_embeddings_stay_tied_and_follow_lisa(folder, work, name):
    was = load_file(work / name / "model.safetensors")
    embedding = next(n for n in was if n.endswith(("wte.weight", "embed_tokens.weight")))
    for trains in ("true", "false"):
        words = ["memory=lisa", "memory.gamma=1", f"memory.embedding={trains}", f"out={trains}"]
        assert run(work / name, *words, "solver.lower_lr=0.01") == 0
        newest = checkpoint.latest(folder.parent / trains / "checkpoints")
        state = json.loads((newest / "state.json").read_text())
        assert "lm_head" not in json.dumps(state)  # one tensor, saved once
        saved = load_file(newest / "tensors.safetensors").values()
        kept = [t for t in saved if t.shape == was[embedding].shape and t.equal(was[embedding])]
        assert len(kept) == (0 if trains == "true" else 2)  # y and z


def test_tied_twins_are_tied_each_for_itself(work):
    model = load_model(str(work / "tied"))
    generator = torch.Generator().manual_seed(0)
    twin = clone(model)
    for m in (model, twin):
        assert m.get_input_embeddings().weight is m.get_output_embeddings().weight
    assert twin.get_input_embeddings().weight is not model.get_input_embeddings().weight
    assert LISA(gamma=1).init(model, generator).groups["head"] == []


def drop_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def set_config(**change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))

    return edit


def remove(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def own_code(folder):
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    set_config(model_type="evil", auto_map=names)(folder)
    write("evil.py", "open('ran', 'w')")(folder)


DAMAGE = {
    "only a pickle": (only_pickle, "pytorch_model.bin is a pickle"),
    "no tokenizer": (remove("tok*"), "no tokenizer files"),
    "broken tokenizer": (write("tokenizer.json", "{nope"), "model=model cannot be loaded"),
    "no config": (remove("config.json"), "no config.json"),
    "broken config": (write("config.json", "{nope"), "config.json cannot be read"),
    "config of a list": (write("config.json", "[1]"), "names no model_type"),
    "config without type": (write("config.json", "{}"), "names no model_type"),
    "unknown type": (set_config(model_type="nosuch"), "model type `nosuch`"),
    "code of its own": (own_code, "code of its own, which is never run"),
    "truncated weights": (truncate, "model.safetensors is damaged"),
    "a weight missing": (drop_weight, "lacks 1 of the weights"),
    "another shape": (set_config(intermediate_size=80), "in another shape"),
    "fewer positions": (set_config(max_position_embeddings=16), "at most 16 tokens"),
    "fewer embeddings": (set_config(vocab_size=30), "in another shape"),
    "empty": (remove("*"), "no config.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_model_that_cannot_be_used_is_refused(folder, capfd, damage):
    change, words = DAMAGE[damage]
    change(folder)
    assert run("model") == 2
    said = capfd.readouterr().err
    assert words in said
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert not (folder.parent / "out").exists()
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("name", ["a/b/c", "/no", "./model2", "sea.jsonl", "", "a" * 300])
def test_what_is_no_folder_and_no_hub_name_is_told_at_once(folder, capfd, name):
    assert run(name) == 2
    assert "expected 'tiny', a folder or a hub name" in capfd.readouterr().err


def test_pickles_are_refused_before_anything_is_loaded(folder, monkeypatch):
    only_pickle(folder)
    for name in ("load", "load_state_dict"):
        owner = torch if name == "load" else torch.nn.Module
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("loaded"))
    assert run("model") == 2


def test_a_tokenizer_with_more_entries_than_embeddings_is_refused(folder, capfd):
    make("llama", 40, False).save_pretrained(folder)
    assert run("model") == 2
    assert "40 embeddings" in capfd.readouterr().err


def test_a_model_that_sees_ahead_is_refused(folder, capfd):
    from transformers import BertConfig, BertLMHeadModel

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=1024, intermediate_size=64, **size)
    BertLMHeadModel(config).save_pretrained(folder)
    assert run("model") == 2
    assert "lets a token see the next one" in capfd.readouterr().err
