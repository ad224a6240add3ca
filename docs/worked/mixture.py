# %% [markdown]
# # How much of which file
#
# Three files of records and a target that resembles one of them and half of another, from Python:
# learn the shares, look at them, and train with them.

# %%
import json
import random
import tempfile
from pathlib import Path

import bilevel
from bilevel.problems.llm_reweight import LLMReweight

folder = Path(tempfile.mkdtemp())
words = {
    "sea": "wave tide salt ship sail harbor storm anchor deck gull",
    "law": "court judge claim appeal statute clause brief counsel ruling bench",
    "food": "bread oil flour oven basil onion pepper broth spoon plate",
}
draw = random.Random(0)


def write(name, topics, records):
    rows = [
        {"text": " ".join(draw.choices(words[draw.choice(topics)].split(), k=20))}
        for _ in range(records)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


sources = tuple(write(f"{topic}.jsonl", [topic], 80) for topic in words)
target = write("mine.jsonl", ["sea", "sea", "law"], 60)

# %% [markdown]
# A problem is checked before it is run: the files are read, and every fault in them is told at
# once.

# %%
problem = LLMReweight(
    sources=sources, target=target, max_length=24, batch=6, width=32, verdict_steps=40
)
print("\n".join(problem.prepare()))
result = bilevel.solve(problem, "scalebio_votes", steps=60)

# %% [markdown]
# The last weights of the path are noisy; `finish` averages its last quarter, writes the files of
# a run, and trains fresh models with the learned shares and with equal ones.

# %%
out = folder / "run"
out.mkdir()
print("\n".join(problem.finish(result, out)))
print(sorted(path.name for path in out.iterdir()))
