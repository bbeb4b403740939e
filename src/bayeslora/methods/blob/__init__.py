"""BLoB (Wang et al. 2024, arXiv 2406.11675)."""
