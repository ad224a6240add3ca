"""Conversations as text: templates of ours and of tokenizers, and what of them is trained on."""

import json

import pytest

from bilevel import InputError
from bilevel.problems.llm_reweight import from_records
from bilevel.problems.llm_reweight.formats import Reading
from bilevel.problems.llm_reweight.model import tiny_tokenizer
from bilevel.problems.llm_reweight.records import read_records
from bilevel.problems.llm_reweight.templates import Own, Style, choose, named, write
from bilevel.problems.llm_reweight.tokens import tokenize

# The published ones, with line ends left out where Jinja takes them out.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant "
    "roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen 3: thoughts are written for the last answer only
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
TOOLS = (
    "{% if tools %}{{ 'TOOLS ' + (tools | tojson) + '\n' }}{% endif %}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}{% for call in message.tool_calls or [] %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PAIRS = [("user", "hi there"), ("assistant", "yo"), ("user", "more"), ("assistant", "the end")]
SYSTEM = [("system", "be brief"), *PAIRS]


def messages(pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def chat(pairs, **more):
    return read_records("a", [{"messages": messages(pairs)} | more]).examples[0].chat


@pytest.fixture(scope="module")
def plain():
    return tiny_tokenizer(["hi there yo more the end be brief user assistant system im_start"] * 4)


@pytest.fixture
def tokenizer(plain):
    def give(template):
        plain.chat_template = template
        return plain

    plain.bos_token = "<|begin_of_text|>"
    yield give
    plain.chat_template = None


def joined(segments):
    return "".join(text for text, _ in segments)


@pytest.mark.parametrize("pairs", [PAIRS, SYSTEM, SYSTEM[:3], [*SYSTEM, ("user", "what?")]])
@pytest.mark.parametrize(("name", "template"), [("chatml", CHATML), ("llama3", LLAMA3)])
def test_ours_write_what_the_published_templates_write(pairs, name, template, tokenizer):
    """The text is what transformers renders, and both ways find the same trained pieces."""
    own = tokenizer(template)
    segments, closed = named(name, end="</s>").write(chat(pairs))
    assert joined(segments) == own.apply_chat_template(messages(pairs), tokenize=False)
    assert (segments, closed) == Own(tokenizer=own).write(chat(pairs))
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
    answers = [text for role, text in pairs if role == "assistant"]
    assert [text for text, trained in segments if trained] == [text + end for text in answers]


@pytest.mark.parametrize("pairs", [PAIRS, SYSTEM])
def test_the_trained_tokens_are_those_of_a_generation_block(pairs, tokenizer):
    """transformers' own mask, for a template that has the block, counts the same tokens."""
    own = tokenizer(MARKED)
    given = {"return_dict": True, "return_assistant_tokens_mask": True}
    theirs = own.apply_chat_template(messages(pairs), **given)
    source = read_records("a", [{"messages": messages(pairs)}])
    rows = tokenize(source, own, max_length=500)
    assert own.decode(rows.ids[0]) == own.decode(theirs["input_ids"])
    ours = [i for i, mark in zip(rows.ids[0], rows.trained[0], strict=True) if mark]
    masked = zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
    assert own.decode(ours) == own.decode([i for i, mark in masked if mark])


def test_alpaca_and_plain_put_the_end_behind_every_answer():
    alpaca, closed = named("alpaca", end="</s>").write(chat(PAIRS))
    says = "Below is an instruction that describes a task. Write a response that appropriately "
    assert closed
    assert alpaca == (
        (
            says + "completes the request.\n\n### Instruction:\nhi there\n\n### Response:\n",
            False,
        ),
        ("yo</s>", True),
        ("\n\n### Instruction:\nmore\n\n### Response:\n", False),
        ("the end</s>", True),
        ("\n\n", False),
    )
    assert named("plain", end="</s>").write(chat(SYSTEM))[0] == (
        ("be brief\nhi there\n", False),
        ("yo</s>", True),
        ("\nmore\n", False),
        ("the end</s>", True),
        ("\n", False),
    )


def test_an_end_that_the_template_writes_is_not_written_again(tokenizer):
    own = tokenizer(MISTRAL)
    rows = tokenize(read_records("a", [{"messages": messages(PAIRS)}]), own, max_length=500)
    assert own.decode(rows.ids[0]).count("<end>") == 2
    assert own.decode(rows.ids[0]).endswith("the end<end>")
    assert rows.trained[0][-1]
    bare = tokenizer(MISTRAL.replace(" + eos_token", ""))
    rows = tokenize(read_records("a", [{"messages": messages(PAIRS)}]), bare, max_length=500)
    assert own.decode(rows.ids[0]).endswith("the end<end>")
    assert own.decode(rows.ids[0]).count("<end>") == 1


@pytest.mark.parametrize(
    ("template", "pairs", "words"),
    [
        (MISTRAL, SYSTEM, "roles must alternate"),
        (MISTRAL, PAIRS[1:], "roles must alternate"),
        (THINKING, PAIRS, "writes messages[1] otherwise when more follows"),
        ("{{ messages.nope.nope }}", PAIRS, "refuses"),
        ("{% if %}", PAIRS, "refuses"),
    ],
)
def test_a_conversation_that_a_template_cannot_write_is_told(template, pairs, words, tokenizer):
    own = tokenizer(template)
    source = read_records("law", [{"messages": messages(pairs)}])
    with pytest.raises(InputError) as caught:
        tokenize(source, own, max_length=500)
    fault = str(caught.value)
    assert fault.startswith("records of law: record 0 (counting from 0): found ")
    assert words in fault and ", expected " in fault and "problem.template=chatml" in fault
    with pytest.raises(InputError):  # nothing is left
        tokenize(source, own, max_length=500, skip=True)
    good = {"messages": messages(PAIRS[:2])}
    if template in (MISTRAL, THINKING):
        source = read_records("law", [{"messages": messages(pairs)}, good])
        rows = tokenize(source, own, max_length=500, skip=True)
        assert (rows.records, rows.skipped) == ((1,), 1)


def test_the_last_turn_alone_needs_no_other_prefix(tokenizer):
    own = tokenizer(THINKING)
    example = read_records("a", [{"messages": messages(PAIRS)}]).examples[0]
    segments, _ = write(example, Style(last_turn_only=True), Own(tokenizer=own))
    trained = [text for text, mark in segments if mark]
    assert trained == ["<think>\n\n</think>\n\nthe end<|im_end|>"]
    assert joined(segments) == own.apply_chat_template(messages(PAIRS), tokenize=False)


def test_what_is_trained_on_can_be_chosen():
    record = {"instruction": "i", "output": "o", "history": [["a", "b"]]}
    source = read_records("a", [record])
    for style, trained in [
        (Style(), ["b", "o"]),
        (Style(last_turn_only=True), ["o"]),
        (Style(train_on_prompt=True), [source.examples[0].text()]),
    ]:
        segments, _ = write(source.examples[0], style, None)
        assert [text for text, mark in segments if mark] == trained
        assert joined(segments) == source.examples[0].text()


def test_a_named_template_writes_prompts_and_answers_too():
    records = [
        {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
        {"instruction": "i", "output": "o"},
    ]
    source = read_records("a", records, Reading(as_chat=True))
    turns = [(turn.role, turn.text, turn.trained) for turn in source.examples[0].chat.turns]
    history = [("system", "s", False), ("user", "a", False), ("assistant", "b", True)]
    assert turns == [*history, ("user", "i\nx", False), ("assistant", "o", True)]
    pair = read_records("a", [{"question": "p", "answer": "c"}], Reading(as_chat=True)).examples[0]
    segments, _ = write(pair, Style(), named("chatml", end=""))
    assert joined(segments) == "<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"


def test_a_template_does_not_depend_on_the_day(tokenizer):
    segments, _ = Own(tokenizer=tokenizer(DATED)).write(chat(PAIRS))
    assert joined(segments).startswith("26 Jul 2024<|im_start|>user")


CALL = {"name": "look", "arguments": {"where": "here"}}
TOOL = {"name": "look", "parameters": {}}
SAID = [
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": CALL, "id": "1"}]},
    {"role": "tool", "content": "there", "tool_call_id": "1"},
    {"role": "assistant", "content": "There."},
]
WITH_TEXT = [
    SAID[0],
    SAID[1] | {"tool_calls": [{"function": CALL | {"arguments": '{"where": "here"}'}}]},
]
SHAREGPT = [
    {"from": "human", "value": "where?"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "there"},
    {"from": "gpt", "value": "There."},
]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": SAID, "tools": [{"type": "function", "function": TOOL}]},
        {"messages": [*WITH_TEXT, *SAID[2:]], "tools": json.dumps([TOOL])},
        {"conversations": SHAREGPT, "tools": json.dumps([TOOL])},
    ],
)
def test_tool_calls_go_through_the_template(record, tokenizer):
    example = read_records("a", [record]).examples[0]
    segments, _ = Own(tokenizer=tokenizer(TOOLS)).write(example.chat)
    assert [text for text, trained in segments if trained] == [
        '<call>look {"where": "here"}</call><|im_end|>',
        "There.<|im_end|>",
    ]
    tools = json.dumps([{"type": "function", "function": TOOL}])
    assert joined(segments).startswith(f"TOOLS {tools}\nuser: where?<|im_end|>\n")
    segments, _ = named("chatml", end="").write(example.chat)
    call = '<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call><|im_end|>'
    assert [text for text, trained in segments if trained] == [call, "There.<|im_end|>"]
    assert json.dumps({"type": "function", "function": TOOL}) in segments[0][0]


def test_a_tokenizer_without_a_template_lists_ours(tokenizer):
    source = read_records("a", [{"messages": messages(PAIRS)}])
    with pytest.raises(InputError, match="template=chatml, llama3, alpaca or plain"):
        tokenize(source, tokenizer(None), max_length=500)
    rows = tokenize(source, tokenizer(None), max_length=500, style=Style(template="chatml"))
    assert len(rows) == 1
    assert len(tokenize(read_records("a", [{"text": "a b"}]), tokenizer(None), max_length=9)) == 1
    assert isinstance(choose("auto", tokenizer(CHATML)), Own)


def test_an_unknown_template_lists_the_known(capsys):
    from bilevel.run import main

    assert main(["problem=llm_reweight", "problem.template=vicuna"]) == 2
    assert "one of auto, tokenizer, chatml, llama3, alpaca, plain" in capsys.readouterr().err


def options(**more):
    return {"verdict": False, "width": 16, "layers": 1, "max_length": 200, "batch": 4} | more


def test_a_problem_of_records_in_memory_writes_them_as_told():
    words = ["wave", "tide", "court", "judge", "salt", "ship", "claim", "bench"]
    pairs = [{"prompt": f"{a} {b}?", "completion": f"{b} {a}."} for a in words for b in words]
    given = {"a": pairs[:32], "b": pairs[32:]}
    target = [{"messages": messages([("user", w), ("assistant", w)])} for w in words]
    task = from_records(given, target, **options())
    lines = task.prepare()
    assert "source a: prompt_completion, 32 records" in lines[1]
    assert task.tokenizer.decode(task.rows[0].ids[1]) == "wave tide?tide wave.<end>"
    end = "<|im_start|>assistant\nwave<|im_end|>\n"
    assert task.tokenizer.decode(task.targets[0].rows.ids[0]).endswith(end)
    task = from_records(given, target, **options(template="plain", train_on_prompt=True))
    assert "source a: prompt_completion written with plain, 32 records" in task.prepare()[1]
    assert task.tokenizer.decode(task.rows[0].ids[1]) == "wave tide?\ntide wave.<end>\n"
    assert sum(task.rows[0].trained[1]) == len(task.rows[0].ids[1]) - 1
    assert task.check() == []
    assert task.fingerprint().keys() >= {"template", "target_batch"}
