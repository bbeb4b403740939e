"""Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111)."""
