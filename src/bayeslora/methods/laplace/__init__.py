"""Laplace-LoRA (Yang et al. 2024, arXiv 2308.13111)."""

from bayeslora.methods.laplace.method import Laplace

__all__ = ["Laplace"]
