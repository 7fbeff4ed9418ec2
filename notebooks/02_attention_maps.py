# %% [markdown]
# # What attends to what
#
# A FAM is written and read by attention, so attention maps show what it stores and when it is used. This
# notebook trains a tiny model on PassKey (about a minute), reads a document with it, and shows the
# attention of every layer and head. To analyse your own model, set `MODEL_DIR` to its directory and skip
# the training. `famx attention-maps` makes all these figures for any checkpoint and text file.

# %%
import html
import os
import pathlib
import tempfile
import textwrap

import jax
import numpy as np
from IPython.display import HTML, display

from famx.analysis import figures, read_maps, tracing
from famx.analysis.attention_page import attention_page
from famx.base import gin_utils
from famx.data import PasskeyTask
from famx.data.metrics import exact_match
from famx.model_dir.loading import load_model
from famx.training import loop

# %matplotlib inline

FAST = os.environ.get("FAMX_NOTEBOOK_FAST") == "1"  # a few steps, for tests; outputs are meaningless
SETTINGS = {"TRAIN_STEPS": 40, "DECAY_STEPS": 10} if FAST else {}
SETTINGS |= {"REPORT_BLOCKS": (8,), "Every.log": 100, "PasskeyEvaluation.examples": 16}
MODEL_DIR = pathlib.Path(tempfile.mkdtemp()) / "model"
SHOW_PAGE = False  # True embeds the page at the end, which makes the notebook larger

# %%
settings = {"MODEL_DIR": MODEL_DIR, **SETTINGS}
_ = gin_utils.call_with(loop.train, ["gin_configs/examples/passkey_short.gin"], settings)

# %% [markdown]
# ## The document
#
# Eight blocks of 32 tokens: a key in block 0, another one in block 4 that replaces it, and the question
# in the last block. The maps of all blocks are kept here. For a long text, select the blocks to keep;
# the summary always covers all blocks.

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
text = task.vocab.decode(row["tokens"][:-1].tolist())  # without the last digit, which is the answer
print(textwrap.fill(text, 110))

# %%
maps = read_maps(trained, text)
second, last = row["positions"][1] // task.block_size, maps.blocks[-1]
holds = int(np.argmin(maps.summary.written[1:].mean(axis=(0, 2))))  # a layer
print(f"kept: blocks {maps.blocks}, layers {maps.layers}, heads {maps.heads}")
print(f"the second key is in block {second}")
print(f"layer {holds} has the memory that attends least to the text after block 0")

# %% [markdown]
# ## A block and its memory
#
# The map is arranged as in the paper's Fig. 11, with the memory before each block. Rows are queries and
# columns are keys. The memory's rows (`F0` to `F7`, orange margin) attend to the memory and to the
# whole block: this is writing. The tokens' rows attend to the memory and to earlier tokens of the
# block: this is reading. Colours follow the square root of the attention.

# %%
figures.map_figure(maps.as_picture(layer=holds, blocks=0))

# %% [markdown]
# The block with the second key, head by head, in both layers:

# %%
display(
    figures.heads_figure(maps, layer=0, block=second), figures.heads_figure(maps, layer=1, block=second)
)

# %% [markdown]
# ## Which tokens read the memory?
#
# The share of a token's attention on the memory, in the last block, averaged over heads. In this run the
# tokens of layer 1 attend to its memory almost alone; those of layer 0 to its memory and to the block.

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
figures.map_figure(maps.as_picture(layer=holds, blocks=last))

# %% [markdown]
# The same for the whole document and both layers; dots are heads. The right panel shows the memory's
# attention while it compresses a block: what is not on the memory is on the block.

# %%
figures.mass_figure(maps.summary)

# %% [markdown]
# ## What was written, and when
#
# For every memory token and block: the attention of the block's tokens on it, the share of its own
# attention on the block, and the mean position of that attention. The first block creates the memory.
# Afterwards, with the gated update, a memory token that attends more to the memory than to the block is
# not written at all: it changes only where its share in the middle panel is above one half.

# %%
figures.travel_figure(maps.summary, layer=holds)

# %%
told = sorted({0, second, last})  # blocks with a key or the question
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
# In this run layer 1 has learnt when to write: in the blocks with a key, with two tokens in the block
# with the question, and not in the filler between them. The memory of layer 0 is rewritten by nearly
# every block.
#
# The next figure shows what the memory of layer 1 stores: the tokens of the block with the second key to
# which each memory token attends most. These tokens have been through layer 0 already.

# %%
figures.sources_figure(maps, layer=holds, block=second)

# %% [markdown]
# ## How focused is the attention?
#
# The entropy of the attention per block; bands are the range over heads. An entropy of 0 means
# attention on a single key; the logarithm of the number of keys means equal attention on all of them.
# In layer 0 both tokens and memory are more focused in the blocks with a key than in filler.

# %%
keys = maps.memory_columns + task.block_size
print(f"log of {keys} keys: {np.log(keys):.2f}")
figures.entropy_figure(maps.summary)

# %% [markdown]
# ## Where does the answer come from?
#
# A trace follows a token back through the memory: through the layers of its block, from what these put on
# the memory to the update that wrote it, and so on to block 0 (definition: docs/attention_maps.md). Below
# are the tokens of largest weight outside of the last block, for the token that is read before the last
# digit of the answer. In this run the blocks with the two keys share the weight that is not in the last
# block. The model answers with the second key, but to a trace an update never replaces more than one half
# of a memory token: its residual is the other half. Attention is not causation: weights say what was
# looked at, not what changed the answer.

# %%
trace = tracing.trace(maps, last, end - 1)
by_block = {block: trace.weights[block].sum() for block in sorted(trace.weights)}
print("weight of each block:", *(f"{block}: {weight:.3f}" for block, weight in by_block.items()))
places = [place for place in trace.strongest(maps, 64) if place[0] != last]
for block, slot, word, weight in places[:8]:
    print(f"block {block}, slot {slot:2}: {word:6} {weight:.4f}")

# %% [markdown]
# ## Explore the page
#
# The page has the text, shaded by the attention or the trace of the token that you click, thumbnails of
# all layers and heads, and for every token what the model expects next. Click a memory token to see what
# wrote it. It is a single file that needs no network. Set `SHOW_PAGE` to embed it here, or open the file
# in a browser (on Colab, download it from the file panel first).

# %%
page = attention_page(maps, "PassKey, read by a tiny FAM")
(MODEL_DIR.parent / "attention.html").write_text(page)
print(f"attention.html: {len(page) / 1e6:.1f} MB")
if SHOW_PAGE:
    display(HTML(f'<iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe>'))
