"""Bayesian LoRA fine-tuning: the posterior over an adapter instead of one adapter."""
