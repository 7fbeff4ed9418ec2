# %% [markdown]
# # Give a pretrained model a memory, with LoRA
#
# FAM adds no weights except the `N` prompt embeddings, so a memory can be added to a decoder that was
# trained without one. This is how the paper uses pretrained models. Low-rank adapters (LoRA) for the
# attention and feed-forward kernels then learn to write and read the memory, while the original weights
# remain unchanged.
#
# The base is a small model with a sliding window, pretrained in this notebook in half a minute, so that
# nothing has to be downloaded. `docs/pretrained.md` does the same with SmolLM2, Llama, Gemma and others.

# %%
import os
import pathlib
import tempfile

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from famx import lora
from famx.base import gin_utils
from famx.data import PasskeyTask
from famx.evaluation import figures
from famx.model_dir.identity import weights_fingerprint
from famx.model_dir.loading import load_model
from famx.training import loop

# %matplotlib inline

FAST = os.environ.get("FAMX_NOTEBOOK_FAST") == "1"  # a few steps, for tests; outputs are meaningless
STEPS, DECAY = (40, 10) if FAST else (400, 200)
SETTINGS = {"TRAIN_STEPS": STEPS, "DECAY_STEPS": DECAY, "Every.log": 50}
SETTINGS |= {"REPORT_BLOCKS": (4,), "PasskeyEvaluation.examples": 8} if FAST else {}
RUNS = pathlib.Path(tempfile.mkdtemp())  # use another folder to keep the models
RECIPE = "gin_configs/examples/passkey_short.gin"

# %% [markdown]
# ## The base: a window and no memory
#
# The task is PassKey: a key of three digits in the first block of 32 tokens, filler, and the question. A
# token sees its own block and the previous one (`M` = 1), so two layers together reach two blocks back.

# %%
base = {**SETTINGS, "MODEL_DIR": RUNS / "base", "MEMORY": "@modules.Memory()", "MEMORY_SEGMENTS": 1}
_ = gin_utils.call_with(loop.train, [RECIPE], base)

# %% [markdown]
# ## Finetune: a memory of 8 and adapters of rank 16
#
# `gin_configs/runs/finetune.gin` has the settings of finetuning: the checkpoint to start from
# (`INITIAL_CHECKPOINT_PATH`) and what to train (`TRAINABLE`, by default `"lora"`: the adapters and the
# memory's prompt). Data and schedule are the same as for the base. The window is removed (`M` = 0), so
# that everything the model knows of past blocks comes from the memory.

# %%
tuned = {
    **SETTINGS,
    "MODEL_DIR": RUNS / "tuned",
    "INITIAL_CHECKPOINT_PATH": RUNS / "base",
    "Lora.rank": 16,
}
_ = gin_utils.call_with(loop.train, ["gin_configs/runs/finetune.gin", RECIPE], tuned)

# %% [markdown]
# The first line of the log reports the number of trained parameters. They are saved as a small directory
# in PEFT's layout.

# %%
adapter = RUNS / "tuned" / "adapter"
for file in sorted(adapter.iterdir()):
    print(f"{file.name}: {file.stat().st_size:,} bytes")

# %% [markdown]
# ## Before and after
#
# The base knows a second key that is two blocks back (`overwrite` at 4 blocks) and nothing beyond its
# window. The finetuned model has no window but knows both keys over many more blocks than in its longest
# training documents (see the last line of the log with `unlocked`; the dashed line is the end of the
# curriculum). It is slightly less reliable with long repeated filler and with second keys.

# %%
figures.passkey_figure({"base (window)": RUNS / "base", "with LoRA and FAM": RUNS / "tuned"})

# %%
for name in ("base", "tuned"):
    for probe, row in figures.passkey_results(RUNS / name)["exact_match"].items():
        print(f"{name:6}{probe:14}" + "  ".join(f"{b} blocks: {value:.2f}" for b, value in row.items()))

# %% [markdown]
# ## Merge
#
# Adapters can be kept separate from the kernels and applied by `lora.intercept`, or merged into the
# kernels, which gives a plain decoder. Both give the same logits up to rounding. `load_model` merges
# adapters automatically, also when it is given a base and an adapter.

# %%
before, after = load_model(str(RUNS / "base")), load_model(str(RUNS / "tuned"))
module = after.model.module
adapters, settings = lora.load_adapter(
    str(adapter), nn.unbox(after.model.abstract_params()), weights_fingerprint(before.params)
)
beside = lora.combine(before.params, adapters)
tokens = PasskeyTask(digits=3, header=False).batch([0, 1], 256)["decoder_input_tokens"]


@jax.jit
def apart(params, tokens):
    with lora.intercept(settings):
        return module.apply({"params": params}, tokens)[0]


plain = jax.jit(lambda params, tokens: module.apply({"params": params}, tokens)[0])
by_hand = lora.merged(beside, settings)
loaded = load_model(str(RUNS / "base"), adapter=str(adapter))
merged_logits = plain(after.params, tokens)
others = {
    "adapters beside the kernels": apart(beside, tokens),
    "merged by hand": plain(by_hand, tokens),
    "loaded as base and adapter": plain(loaded.params, tokens),
}
print(f"logits of the finetuned checkpoint: up to {np.abs(merged_logits).max():.1f}")
for name, logits in others.items():
    print(f"{name}: differ from them by {np.abs(logits - merged_logits).max():.1e} at most")

# %% [markdown]
# ## What the adapters changed
#
# Left: the size of each kernel's change relative to the kernel. Right: the singular values of the change
# of one kernel; only 16 of them, the rank of the adapters, exceed rounding errors.

# %%
old, new = (flatten_dict(trained.params, sep="/") for trained in (before, after))
changed = [path for path in old if path.endswith("/kernel") and not np.array_equal(old[path], new[path])]
figure = Figure(figsize=(10, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
names = [path.removeprefix("layers/").removesuffix("/kernel") for path in changed]
for layer, offset in ((0, -0.2), (1, 0.2)):
    pairs = [(np.asarray(old[path][layer]), np.asarray(new[path][layer])) for path in changed]
    sizes = [np.linalg.norm(y - x) / np.linalg.norm(x) for x, y in pairs]
    left.bar(np.arange(len(changed)) + offset, sizes, width=0.4, label=f"layer {layer}")
left.set_xticks(range(len(changed)), names, rotation=30)
left.set_ylabel("size of the change / size of the kernel")
left.legend()
path = changed[-1]
change = np.asarray(new[path] - old[path])[0]
values = np.linalg.svd(change.reshape(change.shape[0], -1), compute_uv=False)
right.semilogy(range(1, len(values) + 1), np.maximum(values, 1e-9), marker="o", markersize=3)
right.axvline(16.5, color="gray", linestyle="--", label="rank 16")
right.set_xlabel("singular value")
right.set_ylabel(f"of the change of {path.removesuffix('/kernel')}, layer 0")
right.legend()
same = [path for path in old if path not in changed and np.array_equal(old[path], new[path])]
print(f"changed: {', '.join(names)}\nbit for bit as before: {', '.join(same)}")
figure
