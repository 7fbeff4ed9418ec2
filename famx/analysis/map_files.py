"""Files of the attention maps of a text: the numbers, their summary, a page and figures."""

import math
import pathlib
import warnings

from famx.analysis.attention_maps import AttentionMaps
from famx.analysis.attention_page import attention_page
from famx.base.errors import ConfigError
from famx.base.files import write_json, write_text

_MAX_TOGETHER = 50_000_000  # cells of a figure that shows several blocks


def write_maps(maps: AttentionMaps, folder: pathlib.Path) -> int:
    """Writes maps.npz, summary.json, attention.html and the figures into a directory.

    If the maps are too large for a page, attention.html is not written and a line on standard output says
    why.

    Returns:
      The number of figures.

    Raises:
      OSError: a file cannot be written.
    """
    from famx.analysis import figures  # slow to import

    maps.save(folder / "maps.npz")
    updated = [b for b in maps.blocks if maps.memory.shape[3] and maps.completed(b)]
    sources = {
        f"layer {layer}, block {block}": maps.sources(layer, block)
        for layer in maps.layers
        for block in updated
    }
    summary = maps.summary.to_dict() | {"sources": sources}
    write_json(folder / "summary.json", summary)
    try:
        page = attention_page(maps)
    except ConfigError as error:  # the other files do not depend on the page
        print(f"There is no attention.html: {error}")
    else:
        write_text(folder / "attention.html", page)

    made = {
        "masses": lambda: figures.mass_figure(maps.summary),
        "entropy": lambda: figures.entropy_figure(maps.summary),
    }
    sizes = (len(maps.blocks) * n for n in (maps.memory_columns + maps.block_size, maps.tokens.shape[-1]))
    together = len(maps.blocks) > 1 and math.prod(sizes) <= _MAX_TOGETHER
    for layer in maps.layers:
        if together:
            made[f"map_layer{layer}"] = lambda l=layer: figures.map_figure(maps.as_picture(l))
        if maps.memory_columns:
            made[f"travel_layer{layer}"] = lambda l=layer: figures.travel_figure(maps.summary, l)
        for block in maps.blocks:
            name = f"layer{layer}_block{block}"
            made[f"map_{name}"] = lambda l=layer, b=block: figures.map_figure(
                maps.as_picture(l, blocks=b)
            )
            made[f"heads_{name}"] = lambda l=layer, b=block: figures.heads_figure(maps, l, b)
            if block in updated:
                made[f"sources_{name}"] = lambda l=layer, b=block: figures.sources_figure(maps, l, b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # texts in other scripts
        for name, make in made.items():
            make().savefig(folder / f"{name}.png", dpi=130)
    return len(made)
