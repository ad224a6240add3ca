"""The export command: what it says, refuses and leaves alone."""

import json
import re
import shlex

import pytest
import yaml
from exports_case import SIZES, WEIGHTS, command, llamafactory, make_run

from bilevel.problems.llm_reweight.exports import TOOLS


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


@pytest.mark.parametrize(
    ("option", "value", "taker", "users"),
    [
        ("per_source", "true", "axolotl", "it is for axolotl"),
        ("paths", "sea=/x", "nanotron", "it is for megatron, nanotron and streaming"),
    ],
)
def test_an_option_without_effect_is_told(tmp_path, capsys, option, value, taker, users):
    """Refused where no tool that is named takes it, noted for each where one does."""
    run = make_run(tmp_path, "text")
    assert command(run, "--to", "hf,trl", f"--{option}", value) == 2
    said = capsys.readouterr().err
    assert f"--{option} has no effect on hf, trl: {users}; leave it out." in said
    assert not (run / "export").exists()
    assert command(run, "--to", f"hf,{taker}", f"--{option}", value) == 0
    hf, other = capsys.readouterr().out.split(f"\n{taker}: ")
    assert f"note: --{option} has no effect: {users}" in hf and "has no effect" not in other


def test_trl_names_sources_that_round_to_no_record(tmp_path, capsys):
    """TRL takes round(share N) records: 0.55 of one is one, 0.37 is none."""
    for place, share, told in (("a", 0.006, False), ("b", 0.004, True)):
        weights = {"sea": 0.5, "a, law!": 0.5 - share, "food": share, "sky": 0.0, "none": 0.0}
        run = make_run(tmp_path / place, "text", weights=weights)
        total = min(60 / 0.5, 45 / (0.5 - share))
        assert (round(total * share) == 0) is told
        assert command(run, "--to", "trl", "--unit", "examples") == 0
        said = capsys.readouterr().out
        assert ("rounds to no record: food" in said) is told
