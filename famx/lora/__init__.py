"""Low-rank adapters (LoRA, arXiv 2106.09685) and int8 weights, without any code in the decoder's modules.

Adapters are leaves `lora_a` and `lora_b` next to the kernels of the parameter tree, so scans, sharding
and checkpoints treat them like any parameter:

    tree = combine(params, lora.init(key, params))
    with intercept(lora):
        logits, state = decoder.apply({"params": tree}, tokens)
    params = merged(tree, lora)  # the same logits without `intercept`
"""

from famx.lora.adapters import GROUPS, Lora, combine, merged, split
from famx.lora.applying import intercept
from famx.lora.files import (
    adapter_directory,
    adapter_memory,
    average_adapters,
    check_base,
    check_continued,
    load_adapter,
    save_adapter,
)
from famx.lora.int8 import quantize

__all__ = [
    "GROUPS",
    "Lora",
    "adapter_directory",
    "adapter_memory",
    "average_adapters",
    "check_base",
    "check_continued",
    "combine",
    "intercept",
    "load_adapter",
    "merged",
    "quantize",
    "save_adapter",
    "split",
]
