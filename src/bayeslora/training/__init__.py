"""Training by a Trainer: fit, the Trainer of the command line, ensembles in one pass, distillation."""

from bayeslora.training.run import fit

__all__ = ["fit"]
