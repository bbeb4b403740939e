"""IVON-LoRA (Cong et al. 2024, arXiv 2411.04421)."""
