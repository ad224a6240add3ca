"""Every export read back by the rule of its tool, restated here, gives the learned shares."""

import dataclasses
import gzip
import hashlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel import InputError
from bilevel.export import main
from bilevel.problems.llm_reweight import LLMReweight, data, output
from bilevel.problems.llm_reweight.exports import TOOLS, Export, finetuners, job, originals
from bilevel.problems.llm_reweight.exports.shares import Shares, exact_fraction

WEIGHTS = {"sea": 0.55, "a, law!": 0.2, "food": 0.2, "sky": 0.05, "none": 0.0}
TOKENS = {"sea": 20.0, "a, law!": 31.5, "food": 8.0, "sky": 55.25, "none": 3.0}
SIZES = {"sea": 60, "a, law!": 45, "food": 90, "sky": 31, "none": 10}
TOTAL = 5000
SCHEMA = json.loads(Path(output.__file__).with_name("weights.schema.json").read_text())


def records(name, kind, count):
    """Records of a kind; every answer names its source and number."""
    for i in range(count):
        answer = f"{name} answer {i}"
        if kind == "alpaca":
            extra = {"input": f"more {i}"} if i % 2 and name != "food" else {}
            yield {"instruction": f"do {i}", **extra, "output": answer, "id": i}
        elif kind == "messages":
            told = [("system", "brief"), ("user", f"q {i}"), ("assistant", f"first {i}")]
            told = told if i % 3 == 0 else told[:1]
            told += [("user", "and?"), ("assistant", answer)]
            yield {"messages": [{"role": r, "content": c} for r, c in told], "id": f"m{i}"}
        elif kind == "prompt_completion":
            yield {"prompt": f"q {i}", "completion": answer}
        else:
            yield {"text": answer}


KINDS = {
    "mixed": ("alpaca", "messages", "prompt_completion", "text", "text"),
    "text": ("text",) * 5,
    "alpaca": ("alpaca",) * 5,
    "prompt_completion": ("prompt_completion",) * 5,
    "messages": ("messages",) * 5,
}


def make_run(folder, kinds, *, weights=WEIGHTS):
    """A run's folder as a finished run leaves it, with files of these kinds."""
    (folder / "my data").mkdir(parents=True)
    sources = []
    for (name, weight), kind in zip(weights.items(), KINDS[kinds], strict=True):
        path = folder / "my data" / f"{name}.jsonl"
        made = records(name, kind, SIZES[name])
        path.write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append(
            {"name": name, "path": str(path), "sha256": digest, "format": kind, "weight": weight}
            | {"records": SIZES[name], "tokens_per_record": TOKENS[name]}
        )
    run = folder / "run"
    run.mkdir()
    body = {"schema": "bilevel.llm_reweight/1", "status": "STEPS", "sources": sources}
    (run / "weights.json").write_text(json.dumps(body))
    (run / "config.yaml").write_text(yaml.safe_dump({"problem": {"name": "llm_reweight"}}))
    return run


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp(request.param), request.param)


def expected(unit, tokens=TOKENS):
    """q by definition."""
    kept = {n: w for n, w in WEIGHTS.items() if w}
    by = {n: w / (tokens[n] if unit == "tokens" else 1) for n, w in kept.items()}
    return {n: value / sum(by.values()) for n, value in by.items()}


def token_shares(unit):
    q = expected(unit)
    return {n: q[n] * TOKENS[n] / sum(q[m] * TOKENS[m] for m in q) for n in q}


def export(run, tool, **options):
    """Run an export into a place of its own; returns the folder."""
    Export(to=(tool,), force=True, **options).write(run)
    return run / "export" / tool


def rows(path):
    """A file as the tools' JSON reader takes it: all rows with the columns of any."""
    found = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    keys = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key) for key in keys} for row in found]


def source_of(text):
    return re.fullmatch(r"(.+) answer \d+", text)[1]


def answer_of(row):
    """The last answer of a row of any form that this test expects."""
    for key in ("output", "completion", "text"):
        if key in row:
            return row[key]
    content = (row.get("messages") or row.get("conversations"))[-1]["content"]
    return content if isinstance(content, str) else content[0]["value"]


def only_source(path):
    (name,) = {source_of(answer_of(row)) for row in rows(path)}
    return name


def check(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    for name, share in wanted.items():
        assert found[name] == pytest.approx(share, abs=tolerance), name


def check_counts(counts, wanted):
    """Integer counts: within 1 / N of the shares, and exactly by largest remainders."""
    total = sum(counts.values())
    check({name: count / total for name, count in counts.items()}, wanted, 1 / total)
    whole = {name: int(share * total) for name, share in wanted.items()}
    left = sorted(wanted, key=lambda name: whole[name] - wanted[name] * total)
    for name in left[: total - sum(whole.values())]:
        whole[name] += 1
    assert counts == whole


UNITS = pytest.mark.parametrize("unit", ["examples", "tokens"])


def align(attributes, row):
    """LLaMA-Factory's converters: a row as (question, answer)."""
    columns = attributes.get("columns", {})
    if attributes.get("formatting", "alpaca") == "alpaca":
        asked = [row[columns[c]] for c in ("prompt", "query") if c in columns and row[columns[c]]]
        answer = row[columns["response"]] if "response" in columns else None
        return "\n".join(asked), answer
    tags, said = attributes["tags"], row[columns["messages"]]
    if said[0][tags["role_tag"]] == tags["system_tag"]:
        said = said[1:]
    roles = [message[tags["role_tag"]] for message in said]
    assert roles == [tags["user_tag"], tags["assistant_tag"]] * (len(said) // 2)
    return said[-2][tags["content_tag"]], said[-1][tags["content_tag"]]


def llamafactory(folder):
    config = yaml.safe_load((folder / "train.yaml").read_text("utf-8"))
    info = json.loads((Path(config["dataset_dir"]) / "dataset_info.json").read_text("utf-8"))
    names, found = config["dataset"].split(","), []
    for name in names:
        path = Path(config["dataset_dir"]) / info[name]["file_name"]
        pairs = [align(info[name], row) for row in rows(path)]
        answers = [answer or asked for asked, answer in pairs]
        assert config["stage"] == "pt" or all(answer for _, answer in pairs)
        (source,) = {source_of(answer) for answer in answers}
        found.append((source, info[name].get("num_samples")))
    return config, found


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


def test_records_of_one_kind_are_copied_letter_by_letter(tmp_path):
    run = make_run(tmp_path, "alpaca")
    source = tmp_path / "my data" / "sea.jsonl"
    odd = '{ "instruction":"\\u00e9",  "output": "sea answer 0" , "id": 1e2}'
    lines = [odd, "", *source.read_text().splitlines()[1:]]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    renewed(run, "sea", source)
    written = (export(run, "mixed", total=400) / "train.jsonl").read_text().splitlines()
    assert odd in written
    assert set(written) <= {line for f in (tmp_path / "my data").iterdir() for line in lines_of(f)}
    forced = export(run, "mixed", total=400, records="messages") / "train.jsonl"
    assert all(set(json.loads(line)) == {"messages"} for line in forced.read_text().splitlines())


def lines_of(path):
    return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]


def renewed(run, name, path):
    """Note another file for a source in weights.json."""
    body = json.loads((run / "weights.json").read_text())
    (source,) = (s for s in body["sources"] if s["name"] == name)
    source |= {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (run / "weights.json").write_text(json.dumps(body))


@pytest.mark.parametrize("kind", ["array", "text"])
def test_arrays_and_paragraphs_are_records_too(tmp_path, kind):
    run = make_run(tmp_path, "text")
    if kind == "array":
        path = tmp_path / "sky.jsonl"
        path.write_text(json.dumps(list(records("sky", "text", 31)), indent=1))
    else:
        path = tmp_path / "sky.txt"
        path.write_text("\n\n\n".join(r["text"] for r in records("sky", "text", 31)) + "\n")
    renewed(run, "sky", path)
    folder = export(run, "mixed", total=4000, unit="examples")
    found = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert {f"sky answer {i}" for i in range(31)} <= set(found)


def test_the_same_seed_gives_the_same_files(tmp_path):
    run = make_run(tmp_path, "mixed")
    names = ("mixed/train.jsonl", "trl/sea.jsonl")
    made = []
    for seed in (0, 0, 1):
        for tool in ("mixed", "trl"):
            export(run, tool, seed=seed)
        made.append([(run / "export" / name).read_bytes() for name in names])
    assert made[0] == made[1]
    assert all(a != b for a, b in zip(made[0], made[2], strict=True))


def command(*words):
    return main([str(word) for word in words])


def test_changed_and_missing_files_are_refused(tmp_path, capsys):
    run = make_run(tmp_path, "mixed")
    path = tmp_path / "my data" / "food.jsonl"
    path.write_text(path.read_text().replace("food answer 7", "food answer 8"))
    for tool in set(TOOLS) - {"megatron", "nanotron", "streaming", "doremi"}:
        assert command(run, "--to", tool) == 2
        assert "food.jsonl has changed since its weight was learned" in capsys.readouterr().err
    path.unlink()
    assert command(run, "--to", "mixed") == 2
    assert "food.jsonl cannot be read (No such file" in capsys.readouterr().err
    assert not [p for p in (run / "export").iterdir()]
    assert command(run, "--to", "doremi") == 0  # needs shares alone


def test_nothing_of_the_user_is_written_over(tmp_path, capsys):
    run = make_run(tmp_path, "mixed")
    assert command(run, "--to", "hf") == 0 == command(run, "--to", "hf")
    assert "hf (unchanged)" in capsys.readouterr().out
    mine = run / "export" / "hf" / "notes.txt"
    mine.write_text("mine")
    assert command(run, "--to", "hf") == 2
    assert "already holds other files (notes.txt)" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert command(run, "--to", "hf", "--force") == 0
    assert "now hf.before-1" in capsys.readouterr().out
    assert (run / "export" / "hf.before-1" / "notes.txt").read_text() == "mine"
    assert not mine.exists()
    assert not list((run / "export").glob(".*"))


def test_words_tell_unit_epochs_and_what_was_left_out(tmp_path, capsys):
    run = make_run(tmp_path, "mixed")
    assert command(run, "--to", "mixed", "--total=5000", "unit=examples") == 0
    said = capsys.readouterr().out
    assert "left out, since they have no weight: none" in said
    assert "averaged over the examples of a batch; 5,000 examples" in said
    assert re.search(r"sea +0\.5500 +0\.5500 +0\.\d+ +45\.83", said)  # 0.55 * 5000 / 60
    assert "warning: more than 4 epochs of sea, a, law!, food, sky" in said
    assert "without repetition there are 109 examples" in said  # 60 / 0.55
    shares = json.loads((run / "export" / "mixed" / "shares.json").read_text())
    assert shares["unit"] == "examples" and shares["largest_total_without_repetition"] == 109
    assert command(run, "--to", "open_instruct", "--total", "12", "--force") == 0
    assert "share of 12 examples is below one: sky" in capsys.readouterr().out
    assert "sky" not in (run / "export" / "open_instruct" / "args.txt").read_text()


def test_a_run_that_goes_on_can_be_exported_with_a_warning(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    body = json.loads((run / "weights.json").read_text()) | {"status": "RUNNING"}
    (run / "weights.json").write_text(json.dumps(body))
    assert command(run, "--to", "doremi") == 0
    assert "has not ended well (RUNNING)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--to", "lamafactory"), "no export for 'lamafactory'; did you mean llamafactory?"),
        ((), "to=TOOL is missing"),
        (("--to", "hf", "--totl", "3"), "unknown option --totl; did you mean --total?"),
        (("--to", "hf", "--total", "many"), "--total must be a whole number, got 'many'"),
        (("--to", "hf", "--total", "-5"), "total must be from 0 to"),
        (("--to", "hf", "--to", "trl"), "--to is given twice"),
        (("--to", "hf", "--total"), "--total has no value"),
        (("hf",), "expected --key value, got 'hf'"),
        (("--to", "megatron", "--paths", "see=/x"), "paths must be NAME=PATH with a source's name"),
    ],
)
def test_wrong_words_are_told(tmp_path, capsys, words, told):
    assert command(make_run(tmp_path, "text"), *words) == 2
    assert told in capsys.readouterr().err


def test_wrong_folders_are_told(tmp_path, capsys):
    assert command(tmp_path / "nowhere", "--to", "hf") == 2
    assert "is no folder" in capsys.readouterr().err
    assert command(tmp_path, "--to", "hf") == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("problem: {name: quadratic}")
    assert command(tmp_path, "--to", "hf") == 2
    assert "problem=quadratic has nothing to export" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("problem: {name: llm_reweight}")
    assert command(tmp_path, "--to", "hf") == 2
    assert "has no weights.json" in capsys.readouterr().err
    (tmp_path / "weights.json").write_text('{"schema": "bilevel.llm_reweight/2"}')
    assert command(tmp_path, "--to", "hf") == 2
    assert "has the schema 'bilevel.llm_reweight/2', expected" in capsys.readouterr().err


def test_weights_alone_are_enough(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    (run / "config.yaml").unlink()
    assert command(run, "--to", "trl,hf", "doremi") == 0
    assert {p.name for p in (run / "export").iterdir()} == {"trl", "hf", "doremi"}
    assert command(run, "--help") == 0
    said = capsys.readouterr().out
    assert "--total" in said and "--per_source" in said
    assert command() == 2 and command("--help") == 0


def test_more_records_than_were_used_are_refused(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    body = json.loads((run / "weights.json").read_text())
    body["sources"][0]["records"] = 59
    (run / "weights.json").write_text(json.dumps(body))
    assert command(run, "--to", "mixed") == 2
    assert "has 60 records, of which 59 were used" in capsys.readouterr().err


def test_a_run_exports_what_it_was_told_to(tmp_path, capsys):
    from bilevel.run import main as run_main

    make_run(tmp_path, "mixed")
    files = " ".join(shlex.quote(str(p)) for p in sorted((tmp_path / "my data").iterdir()))
    target = tmp_path / "target.jsonl"
    target.write_text("".join(json.dumps({"text": f"sea answer {i} x"}) + "\n" for i in range(8)))
    words = ["problem=llm_reweight", "steps=4", "width=16", "batch=5", "solver.warmup=1"]
    words += [
        "target_batch=2",
        "verdict=false",
        f"sources={files}",
        f"target={target}",
        f"out={tmp_path / 'out'}",
    ]
    assert run_main([*words, "problem.export=llamafactory,mix"]) == 2
    assert "no export for 'mix'; did you mean mixed?" in capsys.readouterr().err
    assert run_main([*words, "problem.export=llamafactory,mixed"]) == 0
    assert "llamafactory-cli train" in capsys.readouterr().out
    _, found = llamafactory(tmp_path / "out" / "export" / "llamafactory")
    assert [name for name, _ in found] == sorted(WEIGHTS)
    assert run_main([*words, "problem.export=hf"]) == 0  # another export is no other run
    assert (tmp_path / "out" / "export" / "hf" / "interleave.json").exists()
    longer = [word for word in words if word != "steps=4"]
    (tmp_path / "my data" / "food.jsonl").rename(tmp_path / "food.jsonl")
    moved = [word.replace("my data/food", "food") for word in longer]
    assert run_main([*moved, "steps=5", "problem.export=llamafactory"]) == 0
    said = capsys.readouterr().out
    assert "llamafactory (written, what was there is now llamafactory.before-1)" in said


def test_the_demonstration_can_be_exported(tmp_path, monkeypatch):
    """Its texts lie in no file; a small one stands for it."""
    texts = {name: [f"{name}\nanswer {i}" for i in range(9)] for name in ("docs", "code")}
    small = data.Data(
        sources={name: data.text_source(name, found) for name, found in texts.items()},
        target=data.text_source("target", ["a"]),
        test=data.text_source("test", ["b"]),
    )
    monkeypatch.setattr(originals, "_demonstration", lambda: small)
    sources = [
        {"name": s.name, "path": s.path, "sha256": s.sha256, "format": s.format, "weight": 0.5}
        | {"records": 9, "tokens_per_record": 9.5}
        for s in small.sources.values()
    ]
    body = {"schema": "bilevel.llm_reweight/1", "status": "STEPS", "sources": sources}
    (tmp_path / "weights.json").write_text(json.dumps(body))
    for tool in TOOLS:
        export(tmp_path, tool)
    folder = export(tmp_path, "mixed", total=40)
    meta = json.loads((folder / "train.meta.json").read_text())
    lines = (folder / "train.jsonl").read_text("utf-8").splitlines()
    for line, (source, index) in zip(lines, meta["rows"], strict=True):
        assert json.loads(line)["text"] == texts[meta["sources"][source]["name"]][index]
    body["sources"][0]["sha256"] = "0" * 64
    (tmp_path / "weights.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match="comes with Python, and this is another version"):
        export(tmp_path, "mixed", total=40)


positive = st.floats(1e-3, 1.0)
mixtures = st.lists(st.tuples(positive, st.integers(1, 10_000), st.floats(0.5, 2000)), min_size=1)


def shares_of(rows_, unit):
    weights, sizes, tokens = (tuple(column) for column in zip(*rows_, strict=True))
    return Shares(weights=weights, records=sizes, tokens=tokens, unit=unit)


@given(mixtures, st.integers(0, 10**7))
def test_counts_are_shares_to_the_nearest_record(rows_, total):
    for unit in ("examples", "tokens"):
        shares = shares_of(rows_, unit)
        counts = shares.counts(total)
        assert sum(counts) == total
        exact = [q * total for q in shares.examples]
        assert all(abs(c - e) < 1 + 1e-6 for c, e in zip(counts, exact, strict=True))
        within = shares.counts(shares.largest)
        assert all(c <= n for c, n in zip(within, shares.records, strict=True))
        more = shares.epochs(shares.largest + 1)
        assert max(more) > 1 - 1e-9


@given(mixtures, st.data())
def test_a_trainer_that_draws_so_minimizes_the_learned_loss(rows_, draws):
    """Averaged over tokens, sum q t l / sum q t; averaged over examples, sum q l: sum w l both."""
    losses = [draws.draw(st.floats(0.1, 10)) for _ in rows_]
    w = [weight / sum(r[0] for r in rows_) for weight, _, _ in rows_]
    wanted = sum(a * b for a, b in zip(w, losses, strict=True))
    q, t = shares_of(rows_, "tokens").examples, [row[2] for row in rows_]
    drawn = sum(a * b * c for a, b, c in zip(q, t, losses, strict=True))
    assert drawn / sum(a * b for a, b in zip(q, t, strict=True)) == pytest.approx(wanted)
    q = shares_of(rows_, "examples").examples
    assert sum(a * b for a, b in zip(q, losses, strict=True)) == pytest.approx(wanted)
    both = [shares_of(rows_, unit) for unit in ("examples", "tokens")]
    sizes = [row[1] / sum(r[1] for r in rows_) for row in rows_]
    for shares in both:
        by_size = [s * m for s, m in zip(sizes, shares.multipliers(), strict=True)]
        assert by_size == pytest.approx(shares.examples)
    assert both[1].trained_tokens == pytest.approx(w)


@given(st.integers(1, 10_000), st.integers(0, 50_000))
def test_a_fraction_is_read_back_as_its_count(size, count):
    fraction = exact_fraction(count, size)
    assert int(fraction * size) == count
    assert abs(fraction - count / size) < 1e-9


@given(st.integers(1, 10**8), st.integers(1, 10**9))
def test_a_factor_is_written_with_a_point_and_without_exponent(size, count):
    fraction = exact_fraction(count, size)
    text = finetuners._with_point(fraction)
    assert "." in text and "e" not in text and float(text) == fraction


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


def test_every_format_that_is_read_can_be_written(tmp_path):
    """Renamed columns, ShareGPT with calls, gzip, preference sets and bad records left out."""
    call = json.dumps({"name": "look", "arguments": {"at": "sky"}})
    chat = [("human", "what?"), ("function_call", call), ("observation", "blue")]
    turns = [{"from": who, "value": said} for who, said in [*chat, ("gpt", "chat answer 0")]]
    tools = json.dumps([{"name": "look", "parameters": {}}])
    kept = [{"conversations": turns, "tools": tools}] * 2
    lines = {
        "chat.jsonl": [json.dumps(r) for r in kept],
        "table.csv": ["q,a", *(f"ask {i},table answer {i}" for i in range(4))],
        "best.jsonl": [
            json.dumps({"prompt": "p", "chosen": f"best answer {i}", "rejected": "no"})
            for i in range(3)
        ],
        "bad.jsonl": ['{"text": "bad answer 0"}', "{", '{"text": 5}', '{"text": "bad answer 3"}'],
        "target.jsonl": [json.dumps({"text": f"another {i}"}) for i in range(8)],
    }
    for name, found in lines.items():
        (tmp_path / name).write_text("\n".join(found) + "\n")
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "packed answer 0"}\n{"text": "packed answer 1"}\n'))
    names = ["chat", "table", "best", "bad", "packed"]
    paths = [*(tmp_path / f"{n}.jsonl" for n in names[:4]), packed]
    paths[1] = tmp_path / "table.csv"
    problem = LLMReweight(
        sources=tuple(f"{n}={p}" for n, p in zip(names, paths, strict=True)),
        target=str(tmp_path / "target.jsonl"),
        columns=("table.prompt=q", "table.completion=a"),
        use_chosen=True,
        on_bad_record="skip",
        verdict=False,
    )
    row = {"step": 1, "upper": 1.0, "lower": 1.0, "weights": dict.fromkeys(names, 0.2)}
    zero = torch.zeros(())
    result = bilevel.Result(
        **{"x": zero, "y": None, "message": "", "nit": 1, "upper": 1.0, "lower": 1.0},
        status=bilevel.Status.STEPS,
        history=[row],
    )
    run = tmp_path / "run"
    run.mkdir()
    output.interim(problem, result, run)
    jsonschema.validate(json.loads((run / "weights.json").read_text()), SCHEMA)
    for tool in TOOLS:
        export(run, tool, unit="examples")
    folder = export(run, "mixed", unit="examples", total=40)
    meta = json.loads((folder / "train.meta.json").read_text())
    found = rows(folder / "train.jsonl")
    for row, (source, index) in zip(found, meta["rows"], strict=True):
        name = names[source]
        assert answer_of(row) == f"{name} answer {0 if name == 'chat' else index}"
    assert {index for source, index in meta["rows"] if source == 3} == {0, 3}
    called = next(row["messages"] for row in found if len(row["messages"]) == 4)
    assert [m["role"] for m in called] == ["user", "assistant", "tool", "assistant"]
    assert called[1]["tool_calls"][0]["function"] == json.loads(call)
    info = json.loads((run / "export" / "llamafactory" / "dataset_info.json").read_text())
    assert info["chat"]["formatting"] == "openai" and info["table"]["formatting"] == "sharegpt"
    typed = rows(run / "export" / "llamafactory_v1" / "chat.jsonl")[0]["messages"]
    assert typed[1]["content"] == [{"type": "tool_call", "value": call}]


def test_records_in_memory_have_no_file_to_export(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    body = json.loads((run / "weights.json").read_text())
    body["sources"][0]["path"] = "records of sea"
    (run / "weights.json").write_text(json.dumps(body))
    assert command(run, "--to", "mixed") == 2
    assert "source sea was given as records in memory" in capsys.readouterr().err


def test_weights_of_records_are_not_lost_silently(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    assert command(run, "--to", "mixed") == 0
    assert "weight for each record" not in capsys.readouterr().out
    (run / "example_weights.jsonl").write_text("{}\n")
    assert command(run, "--to", "hf") == 0
    assert "learned a weight for each record" in capsys.readouterr().out


def test_the_runs_own_bound_on_epochs_is_held_against_the_export(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    total = str(2 * sum(SIZES.values()))
    assert command(run, "--to", "mixed", "--total", total, "--unit", "examples") == 0
    epochs = [
        s["epochs"] for s in json.loads((run / "export/mixed/shares.json").read_text())["sources"]
    ]
    bound = sorted(epochs)[-1] / 1.5
    assert 1 < bound < 4
    assert f"more than {bound:g} epochs" not in capsys.readouterr().out
    body = {"problem": {"name": "llm_reweight", "max_epochs": bound}}
    (run / "config.yaml").write_text(yaml.safe_dump(body))
    assert command(run, "--to", "mixed", "--total", total, "--unit", "examples") == 0
    assert f"more than {bound:g} epochs" in capsys.readouterr().out


def test_a_tool_that_cannot_be_written_hides_no_other(tmp_path, capsys):
    run = make_run(tmp_path, "text")
    (run / "export" / "trl").mkdir(parents=True)
    (run / "export" / "trl" / "mine.txt").write_text("precious")
    assert command(run, "--to", "hf", "trl", "mixed") == 2
    printed = capsys.readouterr()
    assert "trl: " in printed.err and "mine.txt" in printed.err
    assert "written nevertheless: hf, mixed." in printed.err
    assert "hf: " in printed.out and (run / "export" / "mixed" / "train.jsonl").exists()
    assert (run / "export" / "trl" / "mine.txt").read_text() == "precious"


def test_names_that_differ_by_case_get_files_of_their_own():
    found = job._keys(["Code", "code", "CODE-2", "c de"])
    assert len({name.casefold() for name in found}) == 4 and found[:2] == ["Code", "code-2"]


def test_tools_of_conversations_stay_columns(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    line = json.dumps({"messages": turns, "tools": json.dumps([{"name": "look"}])}) + "\n"
    run = make_run(tmp_path, "text")
    body = json.loads((run / "weights.json").read_text())
    for source in body["sources"]:
        path = tmp_path / f"tools-{source['name']}.jsonl"
        path.write_text(line * source["records"])
        source |= {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        source["format"] = "messages"
    (run / "weights.json").write_text(json.dumps(body))
    assert command(run, "--to", "trl,hf") == 0
    mix = yaml.safe_load((run / "export" / "trl" / "mix.yaml").read_text())
    assert all(entry["columns"] == ["messages", "tools"] for entry in mix["datasets"])
    columns = json.loads((run / "export" / "hf" / "interleave.json").read_text())["columns"]
    assert columns == ["messages", "tools"]
