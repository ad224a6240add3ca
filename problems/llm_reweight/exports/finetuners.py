"""Files for trainers that draw from several files: LLaMA-Factory, TRL, open-instruct, ms-swift."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from typing import Any

import yaml

from bilevel.problems.llm_reweight.exports.job import Job, as_messages, as_text
from bilevel.problems.llm_reweight.exports.shares import REPEATED, exact_fraction
from bilevel.problems.llm_reweight.exports.source import Source
from bilevel.problems.llm_reweight.exports.tool import Written, counted

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}


def llamafactory(job: Job) -> Written:
    """dataset_info.json and train.yaml: probabilities, or counts where a total is given."""
    kept, notes = counted(job) if job.wanted else ([(i, 0) for i in range(len(job.sources))], [])
    info = {}
    for i, count in kept:
        source = job.sources[i]
        info[source.key] = _llamafactory_entry(job, source)
        info[source.key] |= {"num_samples": count} if job.wanted else {}
    job.write("dataset_info.json", json.dumps(info, indent=2, ensure_ascii=False))
    lines = [
        "# Add your model, template and output_dir, or give them on the command line.",
        "# For validation use val_size: an eval_dataset needs as many entries as dataset.",
        f"stage: {'pt' if job.form == 'text' else 'sft'}",
        f"dataset_dir: {json.dumps(str(job.target))}",
        f"dataset: {','.join(info)}",
    ]
    if job.wanted:
        lines.append("mix_strategy: concat")
    else:
        probabilities = ",".join(map(repr, job.shares.examples))
        lines += ["mix_strategy: interleave_over", f'interleave_probs: "{probabilities}"']
    job.write("train.yaml", "\n".join([*lines, "val_size: 0.01", ""]))
    if not job.wanted and max(job.shares.epochs(job.whole)) > REPEATED:
        notes.append("a pass ends when every source is used up; --total writes counts instead")
    use = f"llamafactory-cli train {job.quoted('train.yaml')} model_name_or_path=..."
    return Written(total=job.wanted or job.whole, use=use, notes=notes)


def llamafactory_v1(job: Job) -> Written:
    """data.yaml with a factor of repetition for each source, and records in the tool's own form.

    The tool makes an example of every answer of a conversation, so n and t are those of answers.
    """
    answers = [source.facts.answers for source in job.sources]
    tokens = [s.tokens * s.records / a for s, a in zip(job.sources, answers, strict=True)]
    shares = replace(job.shares, records=tuple(answers), tokens=tuple(tokens))
    kept, notes = counted(job, shares)
    entries = {}
    for i, count in kept:
        source = job.sources[i]
        path = job.convert(f"{source.key}.jsonl", source, _typed)
        weight = exact_fraction(count, source.facts.answers)
        entries[source.key] = {"path": path, "source": "local", "weight": weight}
    job.write("data.yaml", yaml.safe_dump(entries, sort_keys=False))
    use = f"train_dataset: {job.target / 'data.yaml'}"
    return Written(total=job.total, use=use, notes=notes, shares=shares)


def trl(job: Job) -> Written:
    """mix.yaml with the fraction of each source; its files are shuffled, for it takes the first."""
    entries = []
    text, pairs = job.form == "text", job.alike and job.records != "messages"
    for source, share in zip(job.sources, job.shares.examples, strict=True):
        asked = pairs and source.pair == ("prompt", "completion")
        make = as_text if text else (_prompt_completion if asked else as_messages)
        columns = ["text"] if text else (["prompt", "completion"] if asked else ["messages"])
        if columns == ["messages"] and "tools" in source.facts.keys:
            columns = ["messages", "tools"]
        order = job.generator(source.name).sample(range(source.records), source.records)
        path = job.convert(f"{source.key}.jsonl", source, make, order)
        entry = {"path": "json", "data_files": path, "split": "train", "columns": columns}
        entries.append(entry | {"fraction": share})
    job.write("mix.yaml", yaml.safe_dump({"datasets": entries}, sort_keys=False))
    notes = []
    if not text and entries[0]["columns"][0] == "messages":
        notes.append("set assistant_only_loss: true, so that only answers are trained on, as here")
    drawn = list(zip(job.sources, job.shares.examples, strict=True))
    exact = min(source.records / share for source, share in drawn)
    gone = [source.name for source, share in drawn if not round(share * exact)]
    if gone:
        notes.append(
            f"their share of the {job.shares.largest:,} examples that trl takes rounds to no "
            f"record: {', '.join(gone)}"
        )
    if job.wanted:
        notes.append(f"--total has no effect: trl takes as many as it can, {job.shares.largest:,}")
    use = f"trl sft --config {job.quoted('mix.yaml')} --model_name_or_path ..."
    return Written(total=job.shares.largest, use=use, notes=notes)


def open_instruct(job: Job) -> Written:
    """args.txt with a file and a factor for each source; without a point it would be a count."""
    kept, notes = counted(job)
    words = ["--dataset_mixer_list"]
    for i, count in kept:
        source = job.sources[i]
        words.append(job.convert(f"{source.key}.jsonl", source, as_messages))
        words.append(_with_point(exact_fraction(count, source.records)))
    words += ["--dataset_mixer_list_splits", "train"]
    job.write("args.txt", shlex.join(words) + "\n")
    use = f"xargs -a {job.quoted('args.txt')} python open_instruct/finetune.py"
    return Written(total=job.total, use=f"{use} ...", notes=notes)


def ms_swift(job: Job) -> Written:
    """args.txt with file#count for each source."""
    kept, notes = counted(job)
    words = ["--dataset"]
    for i, count in kept:
        source = job.sources[i]
        fits = source.format in ("alpaca", "prompt_completion", "messages") and source.is_json
        if fits and source.facts.plain and "::" not in source.path:
            path = source.path
        else:
            path = job.convert(f"{source.key}.jsonl", source, as_messages)
        words.append(f"{path}#{count}")
    job.write("args.txt", shlex.join(words) + "\n")
    use = f"xargs -a {job.quoted('args.txt')} swift sft --model ..."
    return Written(total=job.total, use=use, notes=notes)


def _llamafactory_entry(job: Job, source: Source) -> dict[str, Any]:
    """How a source is described in dataset_info.json; its file is copied where it does not fit."""
    name = f"{source.key}.jsonl"
    original = source.path if source.is_json else ""
    keys = source.facts.keys
    if source.is_text and job.form == "text":
        path = original or job.convert(name, source, as_text)
        return {"file_name": path, "columns": {"prompt": "text"}}
    if source.is_text:
        path = job.convert(name, source, _answer)
        return {"file_name": path, "columns": {"prompt": "instruction", "response": "output"}}
    pair = source.pair
    if original and source.format == "alpaca" and source.facts.plain:
        columns = {"prompt": "instruction", "response": "output"}
        columns |= {"query": "input"} if "input" in keys else {}
        columns |= {name: name for name in ("system", "history") if name in keys}
        return {"file_name": original, "formatting": "alpaca", "columns": columns}
    if original and pair and source.facts.plain:
        columns = {"prompt": pair[0], "response": pair[1]}
        columns |= {"system": "system"} if "system" in keys else {}
        return {"file_name": original, "formatting": "alpaca", "columns": columns}
    fits = original and source.format == "messages" and source.facts.plain
    path = original if fits else job.convert(name, source, as_messages)
    columns = {"messages": "messages"} | ({"tools": "tools"} if "tools" in keys else {})
    form = "openai" if source.facts.calls else "sharegpt"  # the latter knows no tool_calls
    return {"file_name": path, "formatting": form, "columns": columns, "tags": TAGS}


def _answer(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    return {"instruction": "", "output": record["text"]}


def _typed(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    """Messages of typed parts, each with the weight of its loss, and the tools as text."""
    tools = record.get("tools")
    found = {"tools": tools if isinstance(tools, str) else json.dumps(tools)} if tools else {}
    return found | {
        "messages": [
            {
                "role": message["role"],
                "content": _parts(message),
                "loss_weight": float(message["role"] == "assistant"),
            }
            for message in source.messages(record)
        ]
    }


def _parts(message: dict[str, Any]) -> list[dict[str, str]]:
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
    text = [message["content"]] if message["content"] or not calls else []
    kinds = ("text",) * len(text) + ("tool_call",) * len(calls)
    return [{"type": k, "value": v} for k, v in zip(kinds, [*text, *calls], strict=True)]


def _prompt_completion(source: Source, record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("prompt", "completion")}


def _with_point(value: float) -> str:
    """A number without exponent, with a point, that is read back as it was."""
    text = repr(value)
    if "e" in text:
        text = f"{value:.40f}".rstrip("0")
    return text if "." in text else f"{text}.0"
