"""Prediction: examples to token ids, token ids to choices, draws to a `Prediction`."""

from bayeslora.prediction.passes import PassOptions
from bayeslora.prediction.readouts import Readout, readout_for
from bayeslora.prediction.run import predict

__all__ = ["PassOptions", "Readout", "predict", "readout_for"]
