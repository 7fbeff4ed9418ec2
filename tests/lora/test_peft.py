"""PEFT reads saved adapters: transformers then gives the logits of the merged model."""

import copy

import jax
import numpy as np
import pytest
from modules.helpers import difference
from trees import adapters_of, logits

from famx.conversion.families import decoder_config, tensors
from famx.lora import Lora, combine, load_adapter, merged, save_adapter
from famx.modules import Memory

torch = pytest.importorskip("torch", reason="torch, an independent implementation, is missing")
peft = pytest.importorskip("peft", reason="peft, an independent implementation, is missing")
transformers = pytest.importorskip("transformers", reason="transformers is missing")

LORA = Lora(rank=4, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def llama():
    """A random Llama of transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    return transformers.LlamaForCausalLM(config).eval()


def ours(llama):
    """`(config, params)` of the same decoder; one block holds all tokens, without memory."""
    hf = llama.config.to_dict()
    c = decoder_config(hf, block_size=16, memory_segments=0, memory=Memory())
    state = {name: x.detach().numpy() for name, x in llama.state_dict().items()}
    params, stacks = {}, {}
    for tensor in tensors(hf, c):
        value = tensor.to_ours(state[tensor.name])
        if tensor.layer is None:
            params = combine(params, {"/".join(tensor.path): value})
        else:
            stacks.setdefault("/".join(tensor.path), {})[tensor.layer] = value
    stacked = {path: np.stack([x[i] for i in range(len(x))]) for path, x in stacks.items()}
    return c, combine(params, stacked)


def theirs(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


@pytest.mark.slow
def test_peft_loads_what_we_save_and_we_load_what_peft_saves(llama, tmp_path):
    c, params = ours(llama)
    assert difference(logits(c, params, TOKENS, None), theirs(llama)) < 1e-4
    tree = combine(params, adapters_of(params, LORA))
    tree["memory"] = {"prompt": np.ones((2, 16), np.float32)}
    save_adapter(tmp_path / "ours", tree, LORA)
    del tree["memory"]
    wanted = logits(c, merged(tree, LORA), TOKENS, None)

    model = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "ours").eval()
    assert difference(wanted, theirs(model)) < 1e-4
    assert difference(wanted, logits(c, params, TOKENS, None)) > 0.1

    model.save_pretrained(tmp_path / "theirs")
    adapters, lora = load_adapter(tmp_path / "theirs", params)
    assert lora == LORA
    back = combine(params, adapters)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_made_gives_its_logits(llama, tmp_path, rslora):
    c, params = ours(llama)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", use_rslora=rslora
    )
    model = peft.get_peft_model(copy.deepcopy(llama), settings).eval()
    torch.manual_seed(1)
    for name, x in model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter
            torch.nn.init.normal_(x, std=0.3)
    model.save_pretrained(tmp_path)
    adapters, lora = load_adapter(tmp_path, params)
    wanted = theirs(model)
    assert difference(logits(c, merged(combine(params, adapters), lora), TOKENS, None), wanted) < 1e-4
    assert difference(logits(c, params, TOKENS, None), wanted) > 0.01
