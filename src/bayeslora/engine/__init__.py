"""Prediction: examples to token ids, token ids to choices, draws to a `Prediction`."""

from bayeslora.engine.readouts import Readout, readout_for
from bayeslora.engine.run import predict

__all__ = ["Readout", "predict", "readout_for"]
