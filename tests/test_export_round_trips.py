"""Every export read back by the rule of its tool, restated here, gives the learned shares."""

import dataclasses
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml
from exports_case import (
    KINDS,
    SIZES,
    TOKENS,
    TOTAL,
    WEIGHTS,
    answer_of,
    check,
    check_counts,
    expected,
    export,
    llamafactory,
    make_run,
    only_source,
    rows,
    source_of,
    token_shares,
)

from bilevel import InputError


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp(request.param), request.param)


UNITS = pytest.mark.parametrize("unit", ["examples", "tokens"])


@UNITS
def test_llamafactory_draws_by_probability(run, unit):
    config, found = llamafactory(export(run, "llamafactory", unit=unit))
    assert config["mix_strategy"] == "interleave_over" and "eval_dataset" not in config
    probabilities = list(map(float, config["interleave_probs"].split(",")))
    assert len(probabilities) == len(found) and abs(sum(probabilities) - 1) < 1e-8
    shares = {name: p for (name, _), p in zip(found, probabilities, strict=True)}
    check(shares, expected(unit), 1e-6)


@UNITS
def test_llamafactory_takes_counts_where_a_total_is_given(run, unit):
    config, found = llamafactory(export(run, "llamafactory", unit=unit, total=TOTAL))
    assert config["mix_strategy"] == "concat" and "interleave_probs" not in config
    assert sum(dict(found).values()) == TOTAL
    check_counts(dict(found), expected(unit))


@UNITS
def test_llamafactory_v1_repeats_answers(run, unit):
    """int(answers * weight) draws of all prefixes that end with an answer that is trained on."""
    folder, counts, answers = export(run, "llamafactory_v1", unit=unit, total=TOTAL), {}, {}
    for entry in yaml.safe_load((folder / "data.yaml").read_text("utf-8")).values():
        assert entry["source"] == "local" and Path(entry["path"]).suffix == ".jsonl"
        cuts = 0
        for row in rows(entry["path"]):
            for message in row["messages"]:
                assert [part["type"] for part in message["content"]] == ["text"]
                assert message["loss_weight"] == float(message["role"] == "assistant")
                cuts += message["loss_weight"] > 1e-6
        name = only_source(entry["path"])
        counts[name], answers[name] = int(cuts * entry["weight"]), cuts
    tokens = {name: TOKENS[name] * SIZES[name] / cuts for name, cuts in answers.items()}
    assert sum(counts.values()) == TOTAL
    check_counts(counts, expected(unit, tokens))


@UNITS
def test_axolotl_reads_one_mixed_file(run, unit):
    folder = export(run, "axolotl", unit=unit, total=TOTAL)
    (entry,) = yaml.safe_load((folder / "mix.yaml").read_text())["datasets"]
    needed = {"completion": "text", "alpaca": "output", "chat_template": "messages"}
    found = rows(entry["path"])
    assert entry["ds_type"] == "json" and all(needed[entry["type"]] in row for row in found)
    check_counts(Counter(source_of(answer_of(row)) for row in found), expected(unit))


@UNITS
def test_axolotl_keeps_fractions_when_asked(run, unit):
    """0 < weight <= 1, int(weight * size) records are kept."""
    folder, counts = export(run, "axolotl", unit=unit, per_source=True), {}
    for entry in yaml.safe_load((folder / "mix.yaml").read_text())["datasets"]:
        assert 0 < entry["weight"] <= 1
        counts[only_source(entry["path"])] = int(entry["weight"] * len(rows(entry["path"])))
    q = expected(unit)
    assert sum(counts.values()) == int(min(SIZES[n] / q[n] for n in q) + 1e-9)
    check_counts(counts, q)
    with pytest.raises(InputError, match="largest total without repetition"):
        export(run, "axolotl", unit=unit, per_source=True, total=TOTAL)


@UNITS
def test_trl_takes_the_first_rows_of_shuffled_files(run, unit):
    """round(share * N) first rows, N the largest for which no file is too short; one schema."""
    entries = yaml.safe_load((export(run, "trl", unit=unit) / "mix.yaml").read_text())["datasets"]
    assert {(e["path"], e["split"], tuple(e["columns"])) for e in entries} == {
        ("json", "train", tuple(entries[0]["columns"]))
    }
    shares = [entry["fraction"] / sum(e["fraction"] for e in entries) for entry in entries]
    sizes = [len(rows(entry["data_files"])) for entry in entries]
    total = min(n / share for n, share in zip(sizes, shares, strict=True))
    found, kept = {}, Counter()
    for entry, share in zip(entries, shares, strict=True):
        part = [{c: r[c] for c in entry["columns"]} for r in rows(entry["data_files"])]
        numbers = [int(answer_of(row).rpartition(" ")[2]) for row in part]
        assert sorted(numbers) == list(range(len(part))) != numbers  # all of them, shuffled
        found[only_source(entry["data_files"])] = share
        kept[only_source(entry["data_files"])] = round(share * total)
    check(found, expected(unit), 1e-6)
    check({n: k / kept.total() for n, k in kept.items()}, expected(unit), 1 / kept.total())


@UNITS
def test_open_instruct_reads_factors_with_a_point(run, unit):
    words = shlex.split(
        (export(run, "open_instruct", unit=unit, total=TOTAL) / "args.txt").read_text()
    )
    assert words[0] == "--dataset_mixer_list" and words[-2:] == [
        "--dataset_mixer_list_splits",
        "train",
    ]
    counts = {}
    for path, number in zip(words[1:-2:2], words[2:-2:2], strict=True):
        value = float(number) if "." in number else int(number)
        assert isinstance(value, float) and path.endswith(".jsonl")
        found = rows(path)
        assert all(row["messages"][-1]["role"] == "assistant" for row in found)
        counts[only_source(path)] = int(value * len(found))
    check_counts(counts, expected(unit))


@UNITS
def test_lmflow_finds_one_file_of_one_type(run, unit):
    folder = export(run, "lmflow", unit=unit, total=TOTAL) / "data"
    (file,) = folder.glob("*.json")
    head = file.read_text("utf-8")[:100]
    kind = re.search(r"[\"\']type[\"\']:\s*[\'\"]([^\"]+)[\'\"]", head)[1]
    assert re.search(r"[\"\']instances[\"\']", head)
    fields = {"text_only": "text", "text2text": "output", "conversation": "messages"}
    instances = json.loads(file.read_text("utf-8"))["instances"]
    assert all(fields[kind] in row for row in instances)
    if kind == "conversation":
        roles = {tuple(m["role"] for m in row["messages"]) for row in instances}
        assert all(r == ("user", "assistant") * (len(r) // 2) for r in roles)
    check_counts(Counter(source_of(answer_of(row)) for row in instances), expected(unit))


@UNITS
def test_megatron_blends_tokens(run, unit):
    """Words in turn; float() of the first of each pair is its weight."""
    paths = tuple(
        f"{name}=/data/{i}_text_document" for i, name in enumerate(WEIGHTS) if WEIGHTS[name]
    )
    folder = export(run, "megatron", unit=unit, paths=paths)
    words = (folder / "data_args.txt").read_text().split()
    split = json.loads((folder / "per_split.json").read_text())
    assert split == {"train": words, "valid": None, "test": None} and len(words) % 2 == 0
    weights = [float(word) for word in words[::2]]
    names = [list(WEIGHTS)[int(Path(word).name[0])] for word in words[1::2]]
    found = {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}
    check(found, token_shares(unit), 1e-6)
    with pytest.raises(InputError, match="has a space, where Megatron-LM would cut it"):
        export(run, "megatron")


@UNITS
def test_nanotron_takes_lists_of_one_length(run, unit):
    body = yaml.safe_load((export(run, "nanotron", unit=unit) / "mix.yaml").read_text())
    args = body["data_stages"][0]["data"]["dataset"]
    assert len(args["dataset_folder"]) == len(args["dataset_weights"])
    names = [Path(folder).name for folder in args["dataset_folder"]]
    total = sum(args["dataset_weights"])
    found = {n: w / total for n, w in zip(names, args["dataset_weights"], strict=True)}
    check(found, token_shares(unit), 1e-6)


@UNITS
def test_streaming_normalizes_proportions(run, unit):
    folder = export(run, "streaming", unit=unit, paths=("a, law!=/mds/law",))
    streams = yaml.safe_load((folder / "streams.yaml").read_text())["streams"]
    assert all(set(stream) == {"local", "proportion"} for stream in streams.values())
    assert streams["a_law"]["local"] == "/mds/law"
    total = sum(stream["proportion"] for stream in streams.values())
    names = {"a_law": "a, law!"}
    found = {names.get(k, k): s["proportion"] / total for k, s in streams.items()}
    check(found, expected(unit), 1e-6)


@UNITS
def test_datasets_interleaves_files_of_one_schema(run, unit):
    body = json.loads((export(run, "hf", unit=unit) / "interleave.json").read_text("utf-8"))
    assert all(set(body["columns"]) <= row.keys() for f in body["data_files"] for row in rows(f))
    assert body["stopping_strategy"] == "all_exhausted" and 0 not in body["probabilities"]
    found = dict(zip(map(only_source, body["data_files"]), body["probabilities"], strict=True))
    check(found, expected(unit), 1e-6)


@UNITS
def test_ms_swift_takes_counts(run, unit):
    """What stands behind the last # is a count, if no file is called so."""
    words = shlex.split((export(run, "ms_swift", unit=unit, total=TOTAL) / "args.txt").read_text())
    assert words[0] == "--dataset"
    counts = {}
    for word in words[1:]:
        assert not Path(word).exists() and "::" not in word
        path, _, count = word.rpartition("#")
        counts[only_source(path)] = int(count)
    check_counts(counts, expected(unit))


@UNITS
def test_doremi_maps_domains_to_token_shares(run, unit):
    body = json.loads((export(run, "doremi", unit=unit) / "doremi.json").read_text("utf-8"))
    for key in ("train_domain_weights", "eval_domain_weights"):
        total = sum(body[key].values())
        check({n: w / total for n, w in body[key].items()}, token_shares(unit), 1e-6)


@UNITS
def test_the_mixed_file_is_whole_copies_and_a_draw_without_replacement(run, unit):
    folder = export(run, "mixed", unit=unit, total=TOTAL)
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines()
    meta = json.loads((folder / "train.meta.json").read_text("utf-8"))
    names = [source["name"] for source in meta["sources"]]
    assert len(lines) == len(meta["rows"]) == TOTAL
    for line, (source, index) in zip(lines, meta["rows"], strict=True):
        assert answer_of(json.loads(line)) == f"{names[source]} answer {index}"
    counts = Counter(names[source] for source, _ in meta["rows"])
    check_counts(counts, expected(unit))
    used = Counter(map(tuple, meta["rows"]))
    for i, name in enumerate(names):
        copies, rest = divmod(counts[name], SIZES[name])
        uses = Counter(used[i, k] for k in range(SIZES[name]))
        assert uses == +Counter({copies: SIZES[name] - rest, copies + 1: rest})
    order = [source for source, _ in meta["rows"]]
    assert order != sorted(order)


@pytest.mark.slow
def test_the_real_interleave_and_loader(run):
    datasets = pytest.importorskip("datasets")
    mix = json.loads((export(run, "hf") / "interleave.json").read_text("utf-8"))
    parts = [
        datasets.load_dataset("json", data_files=file, split="train").select_columns(mix["columns"])
        for file in mix["data_files"]
    ]
    keys = ("probabilities", "stopping_strategy", "seed")
    found = datasets.interleave_datasets(parts, **{key: mix[key] for key in keys})
    counts = Counter(source_of(answer_of(row)) for row in found)
    for name, share in expected("tokens").items():
        bound = 5 * (share * (1 - share) / len(found)) ** 0.5  # five standard deviations
        assert counts[name] / len(found) == pytest.approx(share, abs=bound)


@pytest.mark.slow
def test_the_real_trl_mixture(run):
    utils = pytest.importorskip("trl.scripts.utils")
    config = yaml.safe_load((export(run, "trl") / "mix.yaml").read_text())
    if "fraction" not in {field.name for field in dataclasses.fields(utils.DatasetConfig)}:
        pytest.skip("this TRL has no fractions")
    found = utils.get_dataset(utils.DatasetMixtureConfig(**config))["train"]
    counts = Counter(source_of(answer_of(row)) for row in found)
    check({n: c / len(found) for n, c in counts.items()}, expected("tokens"), 2 / len(found))
