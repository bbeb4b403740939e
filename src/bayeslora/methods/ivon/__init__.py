"""IVON-LoRA (Cong et al. 2024, arXiv 2411.04421)."""

from bayeslora.methods.ivon.method import Ivon

__all__ = ["Ivon"]
