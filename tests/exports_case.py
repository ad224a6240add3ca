"""A finished run to export, and the rules by which tests read what was written."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from bilevel.export import main
from bilevel.problems.llm_reweight.exports import Export

WEIGHTS = {"sea": 0.55, "a, law!": 0.2, "food": 0.2, "sky": 0.05, "none": 0.0}
TOKENS = {"sea": 20.0, "a, law!": 31.5, "food": 8.0, "sky": 55.25, "none": 3.0}
SIZES = {"sea": 60, "a, law!": 45, "food": 90, "sky": 31, "none": 10}
TOTAL = 5000


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


def lines_of(path):
    return [line.strip() for line in path.read_text("utf-8-sig").splitlines()]


def renewed(run, name, path):
    """Note another file for a source in weights.json."""
    body = json.loads((run / "weights.json").read_text())
    (source,) = (s for s in body["sources"] if s["name"] == name)
    source |= {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (run / "weights.json").write_text(json.dumps(body))


def command(*words):
    return main([str(word) for word in words])
