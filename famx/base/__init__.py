"""Helpers that every other package may import; nothing here imports another package of famx."""
