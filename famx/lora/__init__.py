"""Low-rank adapters (LoRA) and int8 weights, added from outside: the decoder's modules know neither.

Adapters are leaves `lora_a` and `lora_b` beside the kernels of the parameter tree, so whatever
slices, places or saves parameters does so with them:

    tree = combine(params, lora.init(key, params))
    with intercept(lora):
        logits, state = decoder.apply({"params": tree}, tokens)
    params = merged(tree, lora)  # the same logits without `intercept`
"""

from famx.lora.adapters import GROUPS, Lora, combine, merged, split
from famx.lora.applying import intercept
from famx.lora.files import adapter_memory, load_adapter, save_adapter
from famx.lora.int8 import quantize

__all__ = [
    "GROUPS",
    "Lora",
    "adapter_memory",
    "combine",
    "intercept",
    "load_adapter",
    "merged",
    "quantize",
    "save_adapter",
    "split",
]
