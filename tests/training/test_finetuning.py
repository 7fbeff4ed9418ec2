"""Runs that begin from a checkpoint: what learns, what stays bit for bit, and what is refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import safetensors
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_loop import history, run, saved
from tiny import (
    BLOCK,
    assert_close,
    assert_identical,
    make_model,
    make_params,
    make_run,
    make_tokens,
    passkey,
)
from trained import write_model_dir

from famx.base.errors import ConfigError
from famx.decoding import Streamer
from famx.inference import infer
from famx.inference.conversation import load_with_vocabulary
from famx.lora import Lora, combine
from famx.lora.adapters import ADAPTERS, SCALE
from famx.memories import Fam
from famx.model_dir.loading import load_model
from famx.model_dir.memory_file import load_memory, save_memory
from famx.models import DecoderModel
from famx.models.memory_start import MemoryStart
from famx.modules import Memory
from famx.training import saving
from famx.training.run import Every
from famx.training.state_passing import named
from famx.training.step import make_initializer, make_train_step
from famx.training.trainable import Trainable, in_part

STEPS = 4
TOKENS = make_tokens(2, 3 * BLOCK + 1)
# Between programs, and between weights that were merged by different ones; logits reach 8.
ROUNDING = rounding.bound(rounding.of_decoder(make_model().config, TOKENS.shape[1]))
NEAR = 8 * ROUNDING


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    model = make_model()
    directory = tmp_path_factory.mktemp("base")
    return write_model_dir(directory, model, make_params(model.module), passkey().vocab)


def finetune(model_dir, base, lora=Lora(rank=3), steps=STEPS, model=None, **changes):
    settings = dict(
        steps=steps, model=dataclasses.replace(model or make_model(), lora=lora),
        initial_checkpoint_path=base, every=Every(log=1, checkpoint=2),
    )  # fmt: skip
    trainable = Trainable(changes.pop("trainable", "lora"), changes.pop("frozen_dtype", None))
    memory, mode = changes.pop("initial_memory_file", None), changes.pop("mode", "none")
    settings |= dict(trainable=trainable, state_passing=named(mode, memory))
    return run(model_dir, **{**settings, **changes})


def flat(tree):
    return flatten_dict(tree, sep="/")


def logits(trained):
    return trained.model.module.apply({"params": trained.params}, TOKENS)[0]


def test_every_process_reads_the_weights_that_are_noted(tmp_path, monkeypatch):
    """Arrays over several processes can only be read by all of them together."""
    read = []
    monkeypatch.setattr(saving, "weights_fingerprint", read.append)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    saving.RunWriter(make_run(), tmp_path, None, None).note_base("checkpoint_0", tmp_path, {"a": 1})
    assert read == [{"a": 1}] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_the_export_needs_travels_with_the_run(base, tmp_path):
    source = pathlib.Path(base, "source")
    source.mkdir()
    (source / "config.json").write_text("{}")
    finetune(tmp_path, base, steps=1)
    assert (tmp_path / "source" / "config.json").read_text() == "{}"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("trainable", ["lora", "memory", "lora+norms", "layers/mlp/.*|head", "all"])
def test_what_does_not_learn_stays_bit_for_bit(trainable, base, tmp_path):
    finetune(tmp_path, base, trainable=trainable)
    before, tree = flat(load_model(base).params), saved(tmp_path, STEPS)
    after = flat(tree["target"])
    learns = Trainable(trainable).learns
    assert (set(after) - set(before) != set()) == trainable.startswith("lora")
    for path, leaf in after.items():
        if path in before:
            same = np.asarray(before[path]).tobytes() == np.asarray(leaf).tobytes()
            assert same != learns(path), path
        else:
            assert path.endswith(ADAPTERS) and np.any(leaf), path
    moments = flat(tree["state"]["param_states"])
    learning = {path for path in after if learns(path)}
    assert {path.split("/mu/")[1] for path in moments if "/mu/" in path} == learning


def test_the_first_loss_is_that_of_the_base(base, tmp_path):
    finetune(tmp_path / "lora", base, steps=1)
    finetune(tmp_path / "all", base, steps=1, trainable="all")
    first = [history(tmp_path / name)[0]["loss"] for name in ("lora", "all")]
    np.testing.assert_allclose(*first, rtol=ROUNDING)


def test_learning_lowers_the_loss_of_a_fixed_batch():
    model = make_model(lora=Lora(rank=4))
    losses = train_steps(model, Trainable("lora"), steps=30)
    assert losses[-1] < 0.7 * losses[0]


def one_step(model, trainable):
    optimizer = optax.adam(3e-2)
    ready = make_run(model=model, optimizer=optimizer, trainable=trainable).ready()
    initialize, abstract = make_initializer(ready)
    step = make_train_step(ready, abstract)
    batch = {"decoder_input_tokens": TOKENS[:, :-1], "decoder_target_tokens": TOKENS[:, 1:]}
    return initialize, step, batch


def train_steps(model, trainable, steps):
    initialize, step, batch = one_step(model, trainable)
    state, losses = initialize(jax.random.key(0)), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"].total / metrics["loss"].count))
    return losses


@pytest.mark.slow
def test_only_what_learns_takes_memory_for_gradients_and_moments():
    wide = dict(embed_dim=256, mlp_dim=1024, vocab_size=300)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def measure(trainable):
        model = make_model(**wide, lora=Lora(rank=2) if trainable.name == "lora" else None)
        initialize, step, batch = one_step(model, trainable)
        state = jax.eval_shape(initialize, jax.random.key(0))
        compiled = step.lower(state, batch).compile().memory_analysis()
        return size(state.params), size(state.opt_state), compiled.temp_size_in_bytes

    params, moments, temporaries = measure(Trainable("all"))
    assert moments > 1.9 * params
    small, few, little = measure(Trainable("lora"))
    assert small < 1.05 * params and few < 0.05 * params
    assert little < temporaries - 0.5 * params  # no gradient of the base
    bf16 = measure(Trainable("lora", "bfloat16"))[0]
    int8 = measure(Trainable("lora", "int8"))[0]
    assert bf16 < 0.55 * params and int8 < 0.33 * params


@pytest.mark.slow
def test_a_run_is_loaded_with_its_adapters_merged(base, tmp_path):
    probes = []

    def evaluation(model, params, step):
        probes.append(model.module.apply({"params": params}, TOKENS)[0])
        return {"value": 0.0}

    finetune(tmp_path, base, evaluation=evaluation)
    trained = load_model(str(tmp_path))
    assert set(flat(trained.params)) == set(flat(load_model(base).params))
    assert_close(logits(trained), probes[-1], NEAR)
    assert np.abs(logits(trained) - logits(load_model(base))).max() > 1e-3
    tree = jax.tree.map(jnp.asarray, saved(tmp_path, STEPS)["target"])
    batch = {"decoder_input_tokens": TOKENS[:, :-1], "decoder_target_tokens": TOKENS[:, 1:]}
    model = trained.model
    unmerged, merged = (model.loss(params, batch)[0] for params in (tree, trained.params))
    np.testing.assert_allclose(unmerged, merged, rtol=1e-5)


@pytest.mark.slow
def test_the_small_adapter_file_onto_the_base_is_the_trained_model(base, tmp_path):
    finetune(tmp_path, base)
    adapted = load_model(base, adapter=str(tmp_path / "adapter"))
    assert_close(logits(adapted), logits(load_model(str(tmp_path))), NEAR)
    other = make_model()
    other = write_model_dir(tmp_path / "other", other, make_params(other.module, 1), passkey().vocab)
    with pytest.raises(ConfigError, match="trained on another base model"):
        load_model(other, adapter=str(tmp_path / "adapter"))


@pytest.mark.slow
def test_the_adapter_file_can_be_stored_in_half_the_space(base, tmp_path):
    finetune(tmp_path, base, adapter_dtype="bfloat16")
    with safetensors.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "np") as file:
        dtypes = {str(file.get_tensor(name).dtype) for name in file.keys() if "lora_" in name}
    assert dtypes == {"bfloat16"}
    adapted, trained = load_model(base, adapter=str(tmp_path / "adapter")), load_model(str(tmp_path))
    assert_close(logits(adapted), logits(trained), 1e-2)
    with pytest.raises(ConfigError, match="adapter_dtype must be one of 'float32', 'bfloat16', not"):
        finetune(tmp_path / "other", base, adapter_dtype="int8")


@pytest.mark.slow
def test_norms_and_what_was_measured_are_in_the_adapter_file(base, tmp_path):
    memory = Fam(2, normalize="measured", bias="zero", adapter_rank=1)
    finetune(tmp_path, base, model=make_model(memory=memory), trainable="lora+norms")
    trained, before = load_model(str(tmp_path)), load_model(base)
    for name in ("layers/attention_norm/scale", "final_norm/scale"):
        assert np.any(flat(trained.params)[name] != flat(before.params)[name]), name
    adapted = load_model(base, adapter=str(tmp_path / "adapter"))
    assert adapted.model.config == trained.model.config
    assert adapted.params["layers"]["memory"]["rms"] != 1
    assert_close(logits(adapted), logits(trained), NEAR)


def test_parts_of_the_parameters_have_names():
    has = lambda part, *paths: [in_part(part, path) for path in paths]
    paths = (
        "layers/query/kernel", "layers/query/lora_a", "layers/attention_norm/scale", "final_norm/scale",
        "layers/query_norm/scale", "memory/prompt", "layers/memory/rms",
        "layers/memory/adapters/a_query/kernel",
    )  # fmt: skip
    assert has("all", *paths) == [True] * 6 + [False, True]
    assert has("lora", *paths) == [False, True, False, False, False, True, False, True]
    assert has("memory", *paths) == [False] * 5 + [True, False, True]
    assert has("norms", *paths) == [False, False, True, True, True] + [False] * 3
    assert has("memory+norms", *paths) == [False, False, True, True, True, True, False, True]
    assert has("layers/.+", *paths) == [True, True, True, False, True, False, False, True]
    assert Trainable("lora+norms").has_adapters and not Trainable("memory+norms").has_adapters


@pytest.mark.slow
@pytest.mark.parametrize("frozen_dtype", [None, "bfloat16", "int8"])
def test_a_stopped_run_goes_on_bit_for_bit(frozen_dtype, base, tmp_path):
    lora = Lora(rank=3, dropout=0.2)
    settings = dict(lora=lora, frozen_dtype=frozen_dtype)
    finetune(tmp_path / "whole", base, **settings)
    finetune(tmp_path / "parts", base, steps=2, **settings)
    finetune(tmp_path / "parts", base, **settings)
    whole, parts = (saved(tmp_path / name, STEPS) for name in ("whole", "parts"))
    assert_identical(whole, parts)
    kinds = {path.rpartition("/")[2]: leaf.dtype for path, leaf in flat(whole["target"]).items()}
    assert kinds["kernel"] == (frozen_dtype or "float32")
    assert kinds["embedding"] == ("float32" if frozen_dtype is None else "bfloat16")
    assert kinds["lora_a"] == kinds["prompt"] == kinds["scale"] == "float32"
    assert (SCALE in kinds) == (frozen_dtype == "int8")
    trained = load_model(str(tmp_path / "whole"))
    exact = logits(load_model(base))
    assert set(flat(trained.params)) == set(flat(load_model(base).params))
    assert np.isfinite(logits(trained)).all() and logits(trained).shape == exact.shape


@pytest.mark.slow
def test_a_model_may_differ_from_its_checkpoint_in_its_memory(base, tmp_path):
    """FAM's checkpoint into BSWA, BSWA's into FAM, other blocks: all weights but the prompt's."""
    params = flat(load_model(base).params)
    for name, changes in {
        "bswa": dict(memory=Memory()), "longer": dict(memory=Fam(4), block_size=16, memory_segments=0),
    }.items():  # fmt: skip
        run(
            tmp_path / name, model=make_model(**changes), initial_checkpoint_path=base, steps=1,
            optimizer=optax.sgd(0.0), lengths={"targets": 64},
        )  # fmt: skip
        taken = flat(load_model(str(tmp_path / name)).params)
        assert ("memory/prompt" in taken) == (name == "longer")
        for path in params.keys() - {"memory/prompt"}:
            assert np.array_equal(params[path], taken[path]), path
    back = tmp_path / "back"
    run(back, initial_checkpoint_path=str(tmp_path / "bswa"), steps=1)
    assert load_model(str(back)).params["memory"]["prompt"].shape == params["memory/prompt"].shape


def test_the_prompt_is_taken_where_it_fits(base, tmp_path):
    run(tmp_path, initial_checkpoint_path=base, steps=1, optimizer=optax.sgd(0.0))
    prompt = lambda directory: load_model(str(directory)).params["memory"]["prompt"]
    assert np.array_equal(prompt(tmp_path), prompt(base))


@pytest.mark.slow
def test_an_adapter_brings_the_memory_that_it_was_trained_with(base, tmp_path):
    model = make_model(memory=Fam(4), memory_segments=0)
    finetune(tmp_path, base, model=model)
    adapted = load_model(base, adapter=str(tmp_path / "adapter"))
    assert adapted.model.config == model.config
    assert_close(logits(adapted), logits(load_model(str(tmp_path))), NEAR)
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["famx_memory"]["memory"]["kind"] = "unheard-of"
    file.write_text(json.dumps(config))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # without the checksum
    with pytest.raises(ConfigError, match="cannot be used: memory is of the kind 'unheard-of'"):
        load_model(base, adapter=str(tmp_path / "adapter"))


@pytest.mark.slow
def test_what_reads_a_model_takes_an_adapter(base, tmp_path):
    finetune(tmp_path / "run", base)
    adapter = str(tmp_path / "run" / "adapter")
    (tmp_path / "in.jsonl").write_text('{"inputs": "The grass is", "targets": " green."}\n')
    scores = []
    for number, (checkpoint, more) in enumerate([
        (base, {}), (base, {"adapter": adapter}), (str(tmp_path / "run"), {})
    ]):  # fmt: skip
        out = tmp_path / f"{number}.jsonl"
        infer(checkpoint, str(tmp_path / "in.jsonl"), str(out), mode="score", **more)
        scores.append(json.loads(out.read_text())["score"])
    np.testing.assert_allclose(scores[1], scores[2], rtol=ROUNDING)
    assert abs(scores[0] - scores[1]) > 1e-3
    assert_close(logits(load_with_vocabulary(base, adapter)), logits(load_model(base, None, adapter)))


# A saved memory as what learns.


@pytest.fixture(scope="module")
def memory(base, tmp_path_factory):
    """A memory file after some blocks and a part of one."""
    trained = load_model(base)
    streamer = Streamer(trained.model.module)
    state = streamer.initial_state(trained.params, 1)
    out, state = streamer.read(trained.params, state, TOKENS[:1, : 2 * BLOCK + 3])
    path = tmp_path_factory.mktemp("memory") / "book.famem"
    save_memory(path, trained, out, state)
    return str(path)


@pytest.mark.slow
def test_a_saved_memory_is_trained_alone(base, memory, tmp_path):
    settings = dict(trainable="memory", initial_memory_file=memory)
    finetune(tmp_path / "whole", base, **settings)
    finetune(tmp_path / "parts", base, steps=2, **settings)
    finetune(tmp_path / "parts", base, **settings)
    tree = saved(tmp_path / "whole", STEPS)
    assert_identical(tree, saved(tmp_path / "parts", STEPS))
    trained = load_model(base)
    assert_identical(jax.tree.map(np.asarray, trained.params), jax.tree.map(np.asarray, tree["target"]))
    before = load_memory(memory, trained)
    after = load_memory(tmp_path / "whole" / f"memory_{STEPS}.famem", trained)
    assert np.abs(after.memory - before.memory).max() > 1e-3
    assert_identical(*(s.replace(memory=before.memory) for s in (before, after)))
    losses = [line["loss"] for line in history(tmp_path / "whole")]
    assert losses[-1] != losses[0]
    assert set(tree["state"]["param_states"]["0"]["mu"]) == {"memory"}


@pytest.mark.slow
def test_the_loss_from_a_memory_is_that_of_reading_on(base, memory):
    """The first loss of such a run against the model that reads on from the file."""
    trained = load_model(base)
    state = load_memory(memory, trained).take(np.zeros(2, np.int32))
    model = DecoderModel(trained.model.module)
    batch = {"decoder_input_tokens": TOKENS[:, :-1], "decoder_target_tokens": TOKENS[:, 1:]}
    loss = model.loss(trained.params, batch, state=state, aligned=False)[0]
    out, _ = model.module.apply({"params": trained.params}, batch["decoder_input_tokens"], state=state)
    exact = optax.softmax_cross_entropy_with_integer_labels(out, batch["decoder_target_tokens"])
    np.testing.assert_allclose(loss, exact.mean(), rtol=1e-5)


# What is refused, before anything is compiled.


@pytest.mark.parametrize("changes, sentence", [
    (dict(lora=None), "TRAINABLE is 'lora', but the model has no adapters: set LORA=@Lora()."),
    (dict(lora=Lora(rank=17)), "The rank of LoRA is 17, but layers/key is only 16 wide"),
    (dict(trainable="layers/mpl/.*"), "leaves nothing to learn: it matches no whole path; the param"),
    (dict(trainable="["), "TRAINABLE '[' is neither one of all, lora, memory, norms nor a reg"),
    (dict(trainable="memory", model=make_model(memory=Memory())), "the model has no memory"),
    (dict(frozen_dtype="int4"), "frozen_dtype must be one of 'float32', 'bfloat16', 'int8', or None"),
    (dict(model=make_model(mlp_dim=48)), "holds another model, differing in mlp_dim (32 there, 48 h"),
    (dict(initial_checkpoint_path="/nowhere"), "There is no checkpoint /nowhere: /nowhere is not a"),
    (dict(task="passkey_bytes"), "is not that of {base}: give it with TASK_OPTIONS"),
    (dict(initial_memory_file="{memory}"), "INITIAL_MEMORY_FILE needs TRAINABLE='memory', not 'l"),
    (dict(initial_memory_file="{memory}", initial_checkpoint_path=None), "needs INITIAL_CHECKPOINT_"),
    (dict(initial_memory_file="{base}/none", trainable="memory"), "There is no memory file"),
    (
        dict(initial_memory_file="{memory}", trainable="memory", mode="continuous"),
        "needs STATE_PASSING='none', not 'continuous'",
    ),
    (
        dict(initial_memory_file="{memory}", trainable="memory", evaluation=lambda *args: {}),
        "An evaluation cannot begin from INITIAL_MEMORY_FILE",
    ),
    (
        dict(initial_memory_file="{memory}", trainable="memory", model=make_model(block_size=16)),
        "is the memory of another model, differing in block_size (8 there, 16 here)",
    ),
])  # fmt: skip
def test_what_does_not_fit_is_refused(changes, sentence, base, memory, tmp_path):
    fill = lambda x: x.format(base=base, memory=memory) if isinstance(x, str) else x
    changes = {name: fill(value) for name, value in changes.items()}
    with pytest.raises(ConfigError) as error:
        finetune(tmp_path, base, **changes)
    assert sentence.format(base=base) in str(error.value)
    assert not list(tmp_path.glob("checkpoint_*"))


@pytest.mark.slow
def test_a_checkpoint_with_adapters_can_be_begun_from(base, tmp_path):
    """They are merged: the run's own adapters start again."""
    finetune(tmp_path / "first", base)
    finetune(tmp_path / "second", str(tmp_path / "first"), steps=1, optimizer=optax.sgd(0.0))
    first, second = (load_model(str(tmp_path / name)) for name in ("first", "second"))
    assert_close(logits(first), logits(second), NEAR)


@pytest.mark.parametrize("trainable", ["lora", "lora+norms"])
def test_a_run_may_begin_with_a_saved_adapter(trainable, base, tmp_path):
    """The adapter of a run that learns nothing is then the one it began with, prompt included."""
    changes = dict(lora=Lora(rank=3, alpha=6.0), trainable=trainable)
    finetune(tmp_path / "first", base, **changes)
    adapter, still = str(tmp_path / "first" / "adapter"), dict(steps=1, optimizer=optax.sgd(0.0))
    finetune(tmp_path / "second", base, initial_adapter=adapter, **still, **changes)
    first, second = (flat(saved(tmp_path / name, step)["target"]) for name, step in (
        ("first", STEPS), ("second", 1)))  # fmt: skip
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)
    assert any(path.endswith(ADAPTERS) for path in first)
    bases = [json.loads((tmp_path / name / "base.json").read_text()) for name in ("first", "second")]
    assert bases[0] == bases[1]
    begun = load_model(base, adapter=str(tmp_path / "second" / "adapter"))  # its base is the original
    assert_close(logits(begun), logits(load_model(base, adapter=adapter)), NEAR)


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    """Before the run begins where its settings tell, and before it is saved in any case."""
    finetune(tmp_path / "first", base, steps=1)
    other = write_model_dir(
        tmp_path / "other", make_model(), make_params(make_model().module, seed=5), passkey().vocab
    )
    given = dict(initial_adapter=str(tmp_path / "first" / "adapter"), steps=1)
    for changes, sentence in (
        (dict(lora=Lora(rank=2)), "has rank 3 and alpha 3, the run's adapters have rank 2 and alpha 2:"),
        (dict(lora=Lora(rank=3, alpha=6)), "have rank 3 and alpha 6: set Lora.rank=3 and Lora.alpha=3."),
        (dict(lora=Lora(rank=3, targets="attention")), "lacks layers/mlp/down/lora_a"),
        (dict(trainable="all"), "needs adapters to begin with it: set TRAINABLE='lora'."),
        (dict(memory_start=MemoryStart("text")), "PROMPT='text' would replace the prompt of the adapter"),
        (dict(initial_checkpoint_path=None), "INITIAL_ADAPTER needs INITIAL_CHECKPOINT_PATH"),
        (dict(model=make_model(memory=Memory())), "prompt, a parameter of its memory, but the base"),
        (dict(initial_adapter="smollm3"), "There is no adapter in smollm3: it must contain"),
        (dict(initial_checkpoint_path=other), "was trained on another base model"),
    ):
        with pytest.raises(ConfigError) as error:
            finetune(tmp_path / "second", base, **{**given, **changes})
        assert sentence in str(error.value)
        late = changes.get("initial_checkpoint_path") == other  # whose weights are read first
        assert not list(tmp_path.glob("second/checkpoint_*" if late else "second/*"))


@pytest.mark.slow
def test_an_int8_base_computes_nearly_what_the_base_does(base):
    trained = load_model(base)
    model = DecoderModel(trained.model.module, lora=Lora(rank=2))
    adapters = model.lora.init(jax.random.key(0), trained.params)
    tree = combine(trained.params, adapters)
    batch = {"decoder_input_tokens": TOKENS[:, :-1], "decoder_target_tokens": TOKENS[:, 1:]}
    losses = [
        float(model.loss(dataclasses.replace(Trainable("lora"), frozen_dtype=d).freeze(tree), batch)[0])
        for d in (None, "bfloat16", "int8")
    ]
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-2)
    assert len(set(losses)) == 3
