"""Pretrained decoders of other frameworks become ours, and ours become theirs."""
