"""famx: TransformerFAM (arXiv 2404.09173) in JAX and Flax. Importing it imports nothing else."""

__version__ = "0.1.0"
