"""Measures of predictions: probabilities, uncertainty, calibration, detection, intervals. No model in here."""
