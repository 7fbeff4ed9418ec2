# %%
# On Google Colab alone: installs famx from where it lies there (notebooks/README.md says how).
import subprocess
import sys

FAMX = "/content/famx"
if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{FAMX}[notebooks]"], check=True)


# %% [markdown]
# # What attends to what
#
# A FAM writes by attention and is read by attention, so its maps show what it keeps and when it is
# used. This notebook trains a tiny model on PassKey (about a minute), reads a document with it and
# looks at every layer and head. For a model of your own, put its directory in place of `MODEL_DIR`
# and skip the training; `python -m famx.attention_maps` makes all these figures of any checkpoint
# and text file.

# %%
import html
import os
import pathlib
import tempfile
import textwrap

import jax
import numpy as np
from IPython.display import HTML, display

from famx.analysis import figures, read_maps
from famx.analysis.interactive import attention_page
from famx.base import gin_utils
from famx.data import PasskeyTask
from famx.data.metrics import exact_match
from famx.model_dir.loading import load_model
from famx.training import loop

# %matplotlib inline

FAST = os.environ.get("FAMX_NOTEBOOK_FAST") == "1"  # a few steps, for tests: the outputs mean nothing
SETTINGS = {"TRAIN_STEPS": 40, "DECAY_STEPS": 10} if FAST else {}
SETTINGS |= {"REPORT_BLOCKS": (8,), "train.log_period": 100, "PasskeyEvaluation.examples": 16}
MODEL_DIR = pathlib.Path(tempfile.mkdtemp()) / "model"
SHOW_PAGE = False  # True embeds the interactive page at the end, which makes the notebook 5 MB larger

# %%
settings = {"MODEL_DIR": MODEL_DIR, **SETTINGS}
_ = gin_utils.call_with(loop.train, ["gin_configs/examples/passkey_short.gin"], settings)

# %% [markdown]
# ## The document
#
# Eight blocks of 32 tokens: a key in block 0, another in block 4 which replaces it, and the
# question in the last block. The maps of all blocks are kept here; of a long text one names the
# blocks to keep, and the summary is of all of them.

# %%
trained = load_model(str(MODEL_DIR))
task = PasskeyTask(
    digits=3, header=False, filler="random_words", block_size=32, second_key=1.0, second_key_depth=0.5,
    split="eval",
)  # fmt: skip
batch = task.batch(range(16), length=256)
logits, _ = jax.jit(trained.model.module.apply)({"params": trained.params}, batch["decoder_input_tokens"])
right = exact_match(np.argmax(logits[:, -task.digits :], axis=-1), batch["answer"])
chosen = int(np.argmax(right))
print(
    f"{right.sum():.0f} of {len(right)} documents are answered rightly; number {chosen} is one of them:\n"
)
row = task.example(chosen, length=256)
text = task.vocab.decode(row["tokens"][:-1].tolist())  # the last digit is answered, not read
print(textwrap.fill(text, 110))

# %%
maps = read_maps(trained, text)
second, last = row["positions"][1] // task.block_size, maps.blocks[-1]
print(f"kept: blocks {maps.blocks}, layers {maps.layers}, heads {maps.heads}")
print(f"the second key is in block {second}")

# %% [markdown]
# ## A block and its memory
#
# The picture that the paper draws (its Fig. 11): the memory stands before each block. Rows are
# queries, columns keys. The memory's own rows (`F0` to `F7`, orange at the margin) attend to the
# memory and to the whole block: that is writing. The tokens' rows attend to the memory before the
# block and to what came before them in it: that is reading. Colours grow with the square root of
# the attention.

# %%
figures.map_figure(maps.as_picture(layer=0, blocks=0))

# %% [markdown]
# The block with the second key, head by head, in both layers:

# %%
display(
    figures.heads_figure(maps, layer=0, block=second), figures.heads_figure(maps, layer=1, block=second)
)

# %% [markdown]
# ## Who reads the memory?
#
# Of the attention of a token, the share that goes to the memory, in the last block, mean over heads.
# Layer 0 reads the memory; layer 1 looks at the block itself, into whose tokens layer 0 has put what
# it read.

# %%
place = {block: i for i, block in enumerate(maps.blocks)}
on_memory = maps.tokens[place[last], :, :, :, : maps.memory_columns].sum(-1).mean(1)  # [layers, S]
words = [maps.text(token) for token in maps.ids[place[last]]]
first, end = maps.slots[place[last]]
asked = words.index("What")
for layer, shares in enumerate(on_memory):
    print(
        f"layer {layer}: filler {shares[first:asked].mean():.2f}, question and answer"
        f" {shares[asked:end].mean():.2f}; most by"
        f" {', '.join(f'{words[i].strip()} ({shares[i]:.2f})' for i in np.argsort(-shares[:end])[:3])}"
    )

# %%
figures.map_figure(maps.as_picture(layer=0, blocks=last))

# %% [markdown]
# Over the whole document and both layers; the dots are the heads. The right panel is the memory's
# own attention while it compresses a block: what is not on the memory is on the block.

# %%
figures.mass_figure(maps.summary)

# %% [markdown]
# ## What was written, and when
#
# Over the blocks, for every memory token: how much the tokens of the block read of it, how much of
# its own attention went to the block, and where in the block. The first block makes the memory. After
# that, with the gated update, a memory token that attends more to the memory than to the block is not
# written at all: it changes only where its share in the middle panel is above one half.

# %%
figures.travel_figure(maps.summary, layer=0)

# %%
told = sorted({0, second, last})  # the blocks with a key, or with the question
filler = [block for block in maps.blocks if block not in told]
for layer in range(trained.model.config.num_layers):
    written = maps.summary.written[:, layer] > 0.5  # [blocks, N]
    written[0] = True
    for block, tokens in enumerate(written):
        names = [f"F{i}" for i in np.flatnonzero(tokens)] or ["nothing"]
        print(f"layer {layer}, block {block}{'*' if block in told else ' '}:", *names)
    means = (written[blocks].sum(axis=1).mean() for blocks in (told, filler))
    print("written in blocks with a key or the question (*): {:.1f}, in others: {:.1f}\n".format(*means))

# %% [markdown]
# Layer 0 has learnt when to write: where a key or the question is, and little of the filler between.
# The memory of layer 1 is rewritten by every block, and is hardly read.
#
# And what the memory of layer 0 is made of: the tokens of the block with the second key to which each
# memory token attends most. First of all these are digits of that key, in one of its two mentions.

# %%
figures.sources_figure(maps, layer=0, block=second)

# %% [markdown]
# ## How sharp is it?
#
# The entropy of the attention, per block; the bands are the range of the heads. 0 is a single key,
# the logarithm of the number of keys is all of them alike. Layer 1, its tokens as its memory, is sharper
# in the blocks with a key or the question than over filler.

# %%
keys = maps.memory_columns + task.block_size
print(f"log of {keys} keys: {np.log(keys):.2f}")
figures.entropy_figure(maps.summary)

# %% [markdown]
# ## Look for yourself
#
# The page holds every block, layer and head: point at a cell and the text below is shaded by what
# that query attends to. It is one file that needs no network. With `SHOW_PAGE` it stands here; else
# open it in a browser (on Colab, download it from the panel of files).

# %%
page = attention_page(maps, "PassKey, read by a tiny FAM")
(MODEL_DIR.parent / "attention.html").write_text(page)
print(f"attention.html: {len(page) / 1e6:.1f} MB")
if SHOW_PAGE:
    display(HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe>'))
