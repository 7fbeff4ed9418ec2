"""SeqIO, or one sentence that says how to install it."""

from famx.base.packages import missing_package

try:
    import seqio as seqio  # which imports TensorFlow
except ImportError as error:
    raise missing_package("seqio", "SeqIO's tasks", "seqio") from error
