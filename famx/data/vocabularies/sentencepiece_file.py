"""SentencePiece models as messages: limits and consistency before the library gets one."""

import math

from famx.base.packages import optional_package
from famx.data.vocabularies.special_tokens import MOST_TOKEN, MOST_TOKENS

_MOST_NORMALIZER_BYTES = 1 << 24


def read_model(content: bytes):
    """The `ModelProto` of a SentencePiece model.

    Raises:
      ConfigError: the package `sentencepiece` is missing.
      ValueError: it is damaged, or a piece is too long or has a score that is not finite.
    """
    optional_package("sentencepiece", "SentencePiece vocabularies")
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    damaged = ValueError("this is not a whole SentencePiece model; fetch it again.")
    try:
        model.ParseFromString(content)
    except (DecodeError, ValueError, RuntimeError) as error:
        raise damaged from error
    if not model.pieces:
        raise damaged
    if len(model.pieces) > MOST_TOKENS:
        raise ValueError(f"the model has {len(model.pieces):,} pieces; at most {MOST_TOKENS:,} are read.")
    for i, piece in enumerate(model.pieces):
        if not piece.piece or len(piece.piece) > MOST_TOKEN or not math.isfinite(piece.score):
            raise ValueError(f"the piece {i} is empty, too long or has no finite score; fetch it again.")
    if len(model.normalizer_spec.precompiled_charsmap) > _MOST_NORMALIZER_BYTES:
        raise ValueError("its normalizer is too large.")
    model.DiscardUnknownFields()  # such as texts that the library would encode on opening
    return model


def open_model(model):
    """The library's processor of a `ModelProto`.

    Raises:
      ValueError: the library refuses it.
    """
    library = optional_package("sentencepiece", "SentencePiece vocabularies")
    try:
        return library.SentencePieceProcessor(model_proto=model.SerializeToString(deterministic=True))
    except RuntimeError as error:
        raise ValueError("this is not a whole SentencePiece model; fetch it again.") from error
