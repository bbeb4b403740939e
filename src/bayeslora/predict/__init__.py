"""Prediction: examples to token ids, token ids to choices, draws to a `Prediction`."""

from bayeslora.predict.engine import predict
from bayeslora.predict.readouts import Readout, readout_for

__all__ = ["Readout", "predict", "readout_for"]
