# %% [markdown]
# # Read once, ask later: memory files
#
# A FAM summarises what it has read in a state of constant size. A memory file (`.famem`) stores this
# state: read a book, write the file, and any process with the same model can continue from there, days
# later and without the book.
#
# The "book" here is synthetic: a key in its first sentence, followed by thousands of words, because the
# model trained here in a minute knows only PassKey. `famx memory` and `famx chat` do
# the same with any text and any model, as the README shows.

# %%
import dataclasses
import os
import pathlib
import tempfile

import jax
import numpy as np
from matplotlib.figure import Figure

from famx.base import gin_utils
from famx.base.errors import ConfigError
from famx.data import PasskeyTask
from famx.decoding import Sampling
from famx.inference.conversation import Conversation
from famx.inference.memorize import describe
from famx.model_dir.loading import load_model
from famx.training import loop

# %matplotlib inline

FAST = os.environ.get("FAMX_NOTEBOOK_FAST") == "1"  # a few steps, for tests; outputs are meaningless
SETTINGS = {"TRAIN_STEPS": 40, "DECAY_STEPS": 10} if FAST else {}
SETTINGS |= {"REPORT_BLOCKS": (8,), "Every.log": 100, "PasskeyEvaluation.examples": 16}
BLOCKS, BOOKS = (16, 2) if FAST else (512, 8)  # length of a book in blocks, number of books
os.chdir(tempfile.mkdtemp())  # all files are written here
MODEL_DIR = pathlib.Path.cwd() / "model"

# %%
settings = {"MODEL_DIR": MODEL_DIR, **SETTINGS}
_ = gin_utils.call_with(loop.train, ["gin_configs/examples/passkey_short.gin"], settings)

# %% [markdown]
# ## Read the book
#
# The longest training document had 32 blocks; this book has 512.

# %%
task = PasskeyTask(digits=3, header=False, filler="random_words", block_size=32, split="eval")
QUESTION = "What is the pass key? The pass key is"


def book(index):
    """A text without the question at its end, and the key in its first sentence."""
    form = task.prompt(index, BLOCKS * task.block_size)
    return form["inputs"].removesuffix(QUESTION).strip(), form["references"][0]


def ask(conversation):
    return conversation.exchange(QUESTION, show=lambda part: None).strip()


text, key = book(0)
pathlib.Path("book.txt").write_text(text)
print(f"{len(text.split()):,} words; it begins: {text[:100]} ...")

trained = load_model(str(MODEL_DIR))
options = dict(sampling=Sampling(max_new_tokens=task.digits, temperature=0.0), fresh=True)
reader = Conversation(trained, **options)
reader.read_file("book.txt")
reader.save("book.famem")
print(
    f"{reader.tokens:,} tokens read, {reader.updates:,} updates of the memory,"
    f" {reader.num_bytes:,} bytes of state"
)

# %% [markdown]
# ## Contents of the file

# %%
print("\n".join(describe("book.famem").splitlines()[:9]), "\n  ... and the settings of the model\n")
print(f"{pathlib.Path('book.famem').stat().st_size:,} bytes on disk; the book has {len(text):,}")

# %% [markdown]
# ## Reload and ask
#
# A new conversation, as in another process: it has the model and the file but not the book. With `fresh`,
# every question is answered from the loaded state.

# %%
again = Conversation(trained, **options)
again.load("book.famem")
print(f"the key in the first sentence: {key}")
print(f"answered from the file:        {ask(again)}")
print(f"answered by who read it:       {ask(reader)}")

# %% [markdown]
# ## Continue reading
#
# Reading can continue from a memory file. Another chapter contains a new key, which must replace the old
# one. (The chapter is preceded by as many words as the question and its answer would take, because in
# training questions were always at the end of a block, and the model answers them only there.)

# %%
chapter, new_key = book(1)
gap = len(task.vocab.encode(QUESTION)) + task.digits
pathlib.Path("chapter.txt").write_text(" ".join([*chapter.split()[-gap:], chapter]))
again.read_file("chapter.txt")
again.save("two.famem")
print(
    f"{again.tokens:,} tokens read, {again.num_bytes:,} bytes of state, from {', '.join(again.sources)}"
)
print(f"the new key: {new_key}; answered: {ask(again)}")

# %% [markdown]
# ## How often is it right?
#
# One book proves little, so here are several, each read from its start:

# %%
right = []
for index in range(BOOKS):
    text, key = book(index)
    pathlib.Path("other.txt").write_text(text)
    reader.reset()
    reader.read_file("other.txt")
    answer = ask(reader)
    right.append(answer == key)
    print(f"book {index}: key {key}, answered {answer}")
print(f"{sum(right)} of {len(right)} right, {reader.tokens:,} tokens each")

# %% [markdown]
# ## The state does not grow
#
# Bytes of state over the number of tokens read, compared with the keys and values that the same decoder
# would have to store to attend to all tokens.

# %%
config = trained.model.config
reader.reset()
tokens, sizes = [], []
pathlib.Path("piece.txt").write_text(" ".join(text.split()[: BLOCKS * 4]))
for _ in range(6):
    reader.read_file("piece.txt")
    tokens.append(reader.tokens)
    sizes.append(reader.num_bytes)
cache = [2 * config.num_layers * config.num_kv_heads * config.head_dim * 4 * n for n in tokens]
figure = Figure(figsize=(6, 3.6), layout="constrained")
axes = figure.subplots()
axes.plot(tokens, np.array(sizes) / 1e3, marker="o", label="state of the FAM")
axes.plot(tokens, np.array(cache) / 1e3, marker="s", label="keys and values of all tokens")
axes.set_yscale("log")
axes.set_xlabel("tokens read")
axes.set_ylabel("kB")
axes.legend()
axes.grid(alpha=0.3)
print(f"state: {min(sizes):,} to {max(sizes):,} bytes")
figure

# %% [markdown]
# ## A memory belongs to its model
#
# A model with other weights refuses the file with an explanation:

# %%
other = dataclasses.replace(trained, params=jax.tree.map(lambda x: 1.01 * x, trained.params))
try:
    Conversation(other, **options).load("book.famem")
except ConfigError as error:
    print(error)
