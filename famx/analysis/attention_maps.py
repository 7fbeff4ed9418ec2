"""Attention maps of a text, read by a trained model.

    from famx.analysis import attention_maps, figures
    from famx.analysis.attention_page import attention_page
    from famx.model_dir.loading import load_model

    trained = load_model("/tmp/famx/passkey_tiny")
    maps = attention_maps.read_maps(trained, "any text", blocks=[0, -1])
    figures.heads_figure(maps, layer=0, block=0).savefig("heads.png")
    open("page.html", "w").write(attention_page(maps))

`famx attention-maps` does the same for a text file.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from famx.analysis.attention_reader import AttentionReader
from famx.analysis.maps import AttentionMaps, AttentionSummary
from famx.base.errors import ConfigError
from famx.mesh import make_mesh, make_rules, on_mesh

__all__ = ["AttentionMaps", "AttentionReader", "AttentionSummary", "read_maps", "token_text"]

_MAX_BYTES = 4 << 30  # limit on the size of the kept maps


def read_maps(
    trained,
    text: str | Iterable[Sequence[int] | Mapping[str, Any]],
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
) -> AttentionMaps:
    """Reads a text from its start, after begin of text, and returns its attention maps.

    Args:
      trained: a `famx.model_dir.loading.TrainedModel` with its vocabulary.
      text: a text, or its token ids in pieces of any size; of a model with a frontend, pieces of what it
        reads, see `AttentionReader.read`.
      layers: layers whose maps to keep; None keeps all.
      heads: heads whose maps to keep; None keeps all.
      blocks: blocks whose maps to keep; -1 is the last. None keeps all, which soon exceeds the limit
        of 4 GiB for a long text.

    Raises:
      ConfigError: there is no token, a layer, head or block does not exist, the maps would be too
        large, or the model has no vocabulary.
    """
    vocabulary, reader = trained.model.vocabulary, AttentionReader(trained.model.module)
    if vocabulary is None:
        raise ConfigError(
            "The model has no vocabulary, so it cannot read a text: pass token ids to AttentionReader."
        )
    chosen = [None if which is None else len(which) for which in (layers, heads)]

    def check_size(num_blocks: int) -> None:
        size = reader.num_bytes(num_blocks, *chosen)
        if size > _MAX_BYTES:
            raise ConfigError(
                f"The maps would take {size / 2**30:.1f} GiB, more than the limit of"
                f" {_MAX_BYTES >> 30} GiB: select fewer layers, heads or blocks."
            )

    check_size(1 if blocks is None else len(blocks))
    pieces = [vocabulary.encode(text)] if isinstance(text, str) else text

    def with_bos():
        count = 0
        for piece in pieces:
            features = isinstance(piece, Mapping)
            length = max(map(len, piece.values()), default=0) if features else len(piece)
            if not count and length and vocabulary.bos_id is not None and not features:
                yield [vocabulary.bos_id]
                count += 1
            count += length
            if blocks is None:
                check_size(-(-count // reader.config.block_size))
            yield piece

    try:
        with on_mesh(make_mesh(), make_rules()):
            return reader.read(
                trained.params, with_bos(), layers, heads, blocks,
                label=lambda token: token_text(vocabulary, token),
            )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from error


def token_text(vocabulary, token: int) -> str:
    """Readable text of one token: white space becomes visible, `<id>` replaces unprintable text.

    >>> from famx.data import ByteVocabulary
    >>> [token_text(ByteVocabulary(), token) for token in (1, 13, 35, 68, 200)]
    ['<bos>', '↵', '␣', 'A', '<200>']
    """
    for name in ("pad", "bos", "eos", "unk"):
        if token == getattr(vocabulary, f"{name}_id"):
            return f"<{name}>"
    text = vocabulary.decode([token]) if token < vocabulary.vocab_size else ""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    if not text or not text.isprintable() or "\N{REPLACEMENT CHARACTER}" in text:
        return f"<{token}>"
    return text if text.strip() else "␣" * len(text)
