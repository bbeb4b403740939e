"""Training by a Trainer: fit, the Trainer of the command line, ensembles in one pass, distillation."""
