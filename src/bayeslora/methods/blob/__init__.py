"""BLoB (Wang et al. 2024, arXiv 2406.11675)."""

from bayeslora.methods.blob.method import Blob

__all__ = ["Blob"]
