# %% [markdown]
# # Images: what is remembered of the first one?
#
# A model need not read text. This one reads an album of handwritten digits, image after image, and names
# the digit of the first image at the end, when all that is left of that image is the memory. The
# notebook trains it (a few minutes on two CPU cores) and then looks at what its memory holds: which
# parts of the image the memory attends to, and what later images change in it.
#
# The images, of 8 x 8 pixels, come with scikit-learn: `pip install scikit-learn`, or famx with the extra
# `digits`.

# %%
import os
import pathlib
import tempfile

import numpy as np
from matplotlib.figure import Figure

from famx.analysis import AttentionReader, tracing
from famx.analysis.figures import line_colors, overlay_figure
from famx.analysis.pictures import memory_on_grid
from famx.base import gin_utils
from famx.base.palette import MEMORY, ZEROED
from famx.data.sequences import AlbumTask
from famx.decoding import Streamer
from famx.evaluation import TaskEvaluation
from famx.evaluation.figures import lengths_figure
from famx.model_dir.loading import load_model
from famx.training import loop

# %matplotlib inline

FAST = os.environ.get("FAMX_NOTEBOOK_FAST") == "1"  # a few steps, for tests; outputs are meaningless
MODEL_DIR = pathlib.Path(tempfile.mkdtemp()) / "model"  # use another folder to keep the model

# %% [markdown]
# ## An album
#
# An image is cut into 4 x 4 patches of 2 x 2 pixels. The model reads one patch at a time, as seven
# numbers: four pixels, the row and the column of the patch, and whether this is the question. A block is
# 16 patches, one image. The last block is empty but for the question in its last position.
#
# This album, like all below, is one for evaluation: its images do not occur in training.

# %%
PATCH, GRID = 2, (4, 4)
BLOCK = GRID[0] * GRID[1]
task = AlbumTask(patch=PATCH, split="eval", seed=1)
album = task.example(0, length=9 * BLOCK)
patches = album["features"]["patches"]
print("numbers read:", patches.shape, " answer:", *album["references"])
print("first patch of the album:", patches[0].round(2), " question:", patches[-1].round(2))


def image_of(block):
    """The image of a block of patches `[16, 7]`, as ink from 0 to 1, `[8, 8]`."""
    pixels = (block[:, : PATCH**2] + 1) / 2
    return pixels.reshape(*GRID, PATCH, PATCH).swapaxes(1, 2).reshape(8, 8)


figure = Figure(figsize=(12, 1.9), layout="constrained")
for number, axes in enumerate(figure.subplots(1, 9)):
    if number < 8:
        shown = image_of(patches[number * BLOCK : (number + 1) * BLOCK])
        axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
        axes.set_xticks(np.arange(1.5, 7, 2), [])  # where it is cut
        axes.set_yticks(np.arange(1.5, 7, 2), [])
        axes.tick_params(length=0)
        axes.grid(color=MEMORY, linewidth=0.5)
    else:
        axes.set_axis_off()
        axes.set_box_aspect(1)
        axes.text(0.5, 0.5, "which digit\nwas the first?", ha="center", va="center", fontsize=9)
    axes.set_title(f"block {number}", fontsize=9)
figure

# %% [markdown]
# ## Train
#
# `gin_configs/examples/album_tiny.gin` with smaller patches, so that there is more to see in an image; it
# has a model of 85 thousand parameters, whose memory is eight vectors in each of two layers. There is no
# window (`M` = 0): a block sees itself and the memory, nothing else. The curriculum begins with 4 images,
# and longer albums follow when nine of ten answers are right. In a terminal, `famx train album_tiny
# --gin.MODEL_DIR=...` trains the model of the larger patches.

# %%
settings = {
    "MODEL_DIR": MODEL_DIR,
    "TRAIN_STEPS": 800,
    "TASK_OPTIONS": {"patch": PATCH},
    "modules.DecoderConfig.block_size": BLOCK,
    "frontends.Vectors.width": PATCH**2 + 3,
    "optimizers.adamw.weight_decay": 0.1,  # against learning the training images by heart
    "TASK_FEATURE_LENGTHS": {"targets": 5 * BLOCK},
    "curriculum.Curriculum.blocks": (5, 8, 16, 32),
    "evaluation.TaskEvaluation.length": 5 * BLOCK,
    "evaluation.TaskEvaluation.more_lengths": (),
    "run.Every.log": 100,
}
if FAST:
    settings |= {"TRAIN_STEPS": 20, "schedules.warmup_stable_decay.decay_steps": 5}
    settings |= {"schedules.warmup_stable_decay.warmup_steps": 5, "run.Every.log": 10}
_ = gin_utils.call_with(loop.train, ["gin_configs/examples/album_tiny.gin"], settings)

# %% [markdown]
# ## How long is the first image remembered?
#
# The share of albums whose first digit is named rightly, by the number of images, and the same model
# with its memory set to zero before every block: then it sees nothing but the question. Ten digits are
# about equally frequent, so that a guess is right in one of ten albums. The albums of each length begin
# with the same images, so that a line which falls would show that they are forgotten.
#
# In this run the accuracy is the same from 4 to 63 images, twice as many as any album of training had, to
# within one or two albums. As many answers are wrong after 4 images as after 63: length is not what
# makes them wrong. With the memory zeroed, the model is right no more often than by guessing.

# %%
trained = load_model(str(MODEL_DIR))
EXAMPLES, BLOCKS = (8, (5,)) if FAST else (256, (5, 8, 16, 32, 64))
with_memory, zeroed = {}, {}
for blocks in BLOCKS:
    evaluation = TaskEvaluation(
        task, length=blocks * BLOCK, examples=EXAMPLES, batch_size=64, health_tokens=10**6
    )
    scores = evaluation(trained.model, trained.params, trained.step)
    with_memory[blocks - 1] = scores["accuracy"]
    zeroed[blocks - 1] = scores["memory/zeroed/accuracy"]
    print(
        f"{blocks - 1:3} images: {with_memory[blocks - 1]:.3f}, memory zeroed {zeroed[blocks - 1]:.3f}"
        f" ({EXAMPLES} albums)"
    )

firsts = [task.batch(range(EXAMPLES), b * BLOCK)["decoder_input_patches"][:, :BLOCK] for b in BLOCKS]
print("the first images of all lengths are the same:", all((x == firsts[0]).all() for x in firsts))

# %%
colors = {"with its memory": MEMORY, "memory zeroed": ZEROED}
lines = dict(zip(colors, (with_memory, zeroed)))
figure = lengths_figure({"The digit of the first image": lines}, BLOCK, 31, colors)
axes = figure.axes[0]
axes.axhline(0.1, color="black", linestyle=":", linewidth=1)
axes.annotate("chance", (BLOCKS[0] - 1, 0.13), fontsize=8)
axes.set_xlabel("images in the album")
axes.set_ylabel("share of albums")
figure

# %% [markdown]
# ## What does the memory attend to in the first image?
#
# After every block the memory's vectors attend to the block and to the memory as it was. The attention on
# the patches of the first image, averaged over the eight vectors, is laid over the image below: orange
# where the memory looks, on one scale for all panels. What is missing to 1 is on the memory itself.
#
# In layer 1 a patch is more than its four pixels: layer 0 has already mixed it with the patches before
# it. Weights there say at which position something was read, not that it came from these pixels alone.

# %%
reader = AttentionReader(trained.model.module)


def answer(maps):
    """The word that is predicted at the last position."""
    return trained.model.vocabulary.decode([int(maps.records.predicted[-1][-1])])


for number in range(EXAMPLES):
    album = task.example(number, length=9 * BLOCK)
    maps = reader.read(trained.params, [album["features"]])
    if [answer(maps)] == album["references"] or FAST:
        break
patches = album["features"]["patches"]
first = image_of(patches[:BLOCK])
print(f"album {number}: the first digit is {album['references'][0]}, the model says {answer(maps)}")

# %%
weights, titles = [], []
for layer in maps.layers:
    for head in (None, *maps.heads):
        weights.append(memory_on_grid(maps, layer, 0, GRID, head=head).mean(axis=0))
        titles.append(f"layer {layer}, " + ("mean" if head is None else f"head {head}"))
overlay_figure(first, np.stack(weights), titles, across=5)

# %% [markdown]
# The same for each of the eight memory vectors of layer 1, averaged over the heads. They divide the image
# among themselves only in part: several look most at the same patch.

# %%
layer = maps.layers[-1]
each = memory_on_grid(maps, layer, 0, GRID)
most = [np.unravel_index(np.argmax(of_vector), GRID) for of_vector in each]
print(
    "row and column of the patch that each looks at most:",
    *(f"F{i} {r},{c}" for i, (r, c) in enumerate(most)),
)
print(f"{len(set(most))} different patches for {len(most)} vectors")
overlay_figure(first, each, [f"layer {layer}, F{i}" for i in range(len(each))], across=4)

# %% [markdown]
# One image may be chance. Over the first images of many albums: how much ink is under the memory's
# attention, compared with a patch of the image at random?
#
# In this run the memory of layer 0 looks at ink in every image, that of layer 1 only a little more than
# at random: as in the pictures above, it also looks at blank patches at the edge of the image, which by
# then know of patches before them.

# %%
ink = {layer: [] for layer in maps.layers}
anywhere = []
for number in range(4 if FAST else 64):
    block = task.example(number, length=5 * BLOCK)["features"]["patches"][:BLOCK]
    of_block = reader.read(trained.params, [{"patches": block}])
    of_patches = (block[:, : PATCH**2].mean(axis=1).reshape(GRID) + 1) / 2
    anywhere.append(of_patches.mean())
    for layer in ink:
        seen = memory_on_grid(of_block, layer, 0, GRID).mean(axis=0)
        ink[layer].append((seen * of_patches).sum() / seen.sum())
print(f"ink of a patch (0: white, 1: black), {len(anywhere)} images: {np.mean(anywhere):.2f} at random")
for layer, values in ink.items():
    more = np.mean(np.array(values) > anywhere)
    print(
        f"layer {layer}: {np.mean(values):.2f} where the memory looks; more than at random in"
        f" {more:.0%} of the images"
    )

# %% [markdown]
# ## What do later images change?
#
# The share of the memory's attention on each block, and with it what is written. With the gated update
# of this model a memory vector takes something from a block only if more than half of its attention is
# on the block; the first block always writes. In this run and this album layer 1 writes only the first
# image, and layer 0 some of its vectors at later ones, in about one of six updates.

# %%
written = maps.summary.written  # [blocks, layers, memory vectors]
shares = maps.records.shares
for layer in maps.layers:
    on_block = " ".join(f"{value:.2f}" for value in written[:, layer].mean(axis=-1))
    print(f"layer {layer}: attention on blocks 0 to {len(written) - 1}: {on_block}")
    changed = (shares[1:, layer] > 0).sum()
    print(f"         updates after block 0: {changed} of {shares[1:, layer].size}")

# %% [markdown]
# Is that so in other albums? Each album is read next to two changed copies: in one, only the first
# image is another; in the other, only the first image is the same. The distance between the memories
# after each block is the root mean square of their difference, relative to that of the memory.
#
# In this run another first image makes a difference that stays as large as it was at once, about as large
# as the memory itself. All later images together change the memory by about a tenth of that, and hardly
# an answer.

# %%
albums = 8 if FAST else 64
batch = task.batch(range(albums), length=9 * BLOCK)
original = batch["decoder_input_patches"]
moved = np.roll(original, 1, axis=0)  # images of another album
copies = {
    "only the first image differs": np.concatenate([moved[:, :BLOCK], original[:, BLOCK:]], axis=1),
    "all but the first image differ": np.concatenate([original[:, :BLOCK], moved[:, BLOCK:]], axis=1),
}
streamer = Streamer(trained.model.module)


def read(inputs):
    """The memory after each block, `[blocks, layers, albums, N, D]`, and the answers."""
    state, memories = streamer.initial_state(trained.params, albums), []
    for start in range(0, inputs.shape[1], BLOCK):
        piece = {"patches": inputs[:, start : start + BLOCK]}
        logits, state = streamer.read(trained.params, state, piece, aligned=True)
        memories.append(np.array(state.memory))
    return np.stack(memories), np.argmax(np.asarray(logits), axis=-1)


rms = lambda x: np.sqrt((x**2).mean(axis=(2, 3, 4)))
memories, answers = read(original)
distances = {}
for name, inputs in copies.items():
    others, other_answers = read(inputs)
    distances[name] = rms(others - memories) / rms(memories)  # [blocks, layers]
    print(f"{name}: the answer changes in {np.mean(other_answers != answers):.0%} of {albums} albums")
    for layer in maps.layers:
        shown = " ".join(f"{value:.3f}" for value in distances[name][:8, layer])
        print(f"  layer {layer}, distance after blocks 0 to 7: {shown}")

# %%
figure = Figure(figsize=(7, 3.4), layout="constrained")
axes = figure.subplots()
for (name, values), style in zip(distances.items(), ("-", "--")):
    for layer, color in zip(maps.layers, line_colors(len(maps.layers))):
        axes.plot(values[:8, layer], style, color=color, marker="o", label=f"{name}, layer {layer}")
axes.set_xlabel("after block")
axes.set_ylabel("distance of the memories")
axes.set_ylim(bottom=-0.03)
axes.grid(alpha=0.3)
figure.legend(loc="outside lower center", ncols=2, fontsize="small")
figure

# %% [markdown]
# ## From the answer back to the first image
#
# A trace follows the last position back through the layers, the memory and its updates to block 0
# (notebook 02 and docs/attention_maps.md explain it). Attention is not causation: the weights say what
# was looked at. That the first image decides the answer is what the changed copies above show. In this
# run nearly all weight is on the first image and on the block of the question itself, next to none on the
# seven images between.

# %%
question = maps.blocks[-1]
trace = tracing.trace(maps, question, BLOCK - 1)
by_block = {block: float(trace.weights[block].sum()) for block in sorted(trace.weights)}
print("weight of each block:", *(f"{block}: {weight:.3f}" for block, weight in by_block.items()))
print(f"weight left on the memory that the model starts with: {trace.start.sum():.3f}")
overlay_figure(first, trace.weights[0].reshape(1, *GRID), ["trace of the answer"], across=1)
