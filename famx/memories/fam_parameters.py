"""Parameters of feedback attention memory that options add to each layer."""

import math

import flax.linen as nn

from famx.memories.learned_rows import learned_rows
from famx.modules.components import Projection, partitioned


class OfLayer(nn.Module):
    """What each layer has for the memory alone, those of its parts that are in use."""

    config: object

    def setup(self):
        c, memory = self.config, self.config.memory
        if memory.start_from == "prefix":
            self.prefix = learned_rows(self, "prefix", memory.length)
        if memory.query == "learned":
            self.queries = learned_rows(self, "queries", memory.length)
        if memory.has_column_bias:
            start = {"zero": 0.0, "minus_log_length": -math.log(memory.length)}[memory.bias]
            init = partitioned(nn.initializers.constant(start), "heads")
            self.bias = self.param("bias", init, (c.num_heads,), c.param_dtype)
        if memory.normalize == "measured":
            self.rms = self.param("rms", partitioned(nn.initializers.ones), (), c.param_dtype)
        if memory.adapter_rank:
            self.adapters = Adapters(c)


def shapes(config) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of what each projection of a layer takes and makes."""
    c = config
    width, wide, heads = (c.embed_dim,), (c.mlp_dim,), (c.num_heads, c.head_dim)
    to_heads, to_kv_heads = (width, heads), (width, (c.num_kv_heads, c.head_dim))
    gate = {"gate": (width, wide)} if c.gated_mlp else {}
    return {
        "query": to_heads, "key": to_kv_heads, "value": to_kv_heads, "output": (heads, width),
        **gate, "up": (width, wide), "down": (wide, width),
    }  # fmt: skip


class Adapters(nn.Module):
    """Low-rank adapters of all projections of a layer, `x A B`; `B` is zero at first."""

    config: object

    def setup(self):
        c, rank = self.config, self.config.memory.adapter_rank
        heads = {"query": "heads", "key": "kv_heads", "value": "kv_heads", "output": "heads"}
        a, b = {}, {}
        for name, (_, made) in shapes(c).items():
            inner = (heads[name], "kv") if name in heads else ("mlp",)
            taken_axes, made_axes = ("embed",), inner
            if name in ("output", "down"):
                taken_axes, made_axes = inner, ("embed",)
            a[name] = Projection(c, (rank,), taken_axes, ("lora_rank",))
            b[name] = Projection(c, made, ("lora_rank",), made_axes, starts_at_zero=True)
        self.a, self.b = a, b

    def __call__(self, names, x, ys):
        first, *others = (self.a[name] for name in names)
        low = first.jointly(x, *others) if others else [first(x)]
        return [y + self.b[name](z) for name, y, z in zip(names, ys, low, strict=True)]
