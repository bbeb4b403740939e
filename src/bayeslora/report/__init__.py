"""Figures of predictions; they need the extra ``plot`` (matplotlib)."""

from bayeslora.report.picture import overconfidence_picture
from bayeslora.report.plots import reliability_diagram, risk_coverage_plot
from bayeslora.report.style import render, save
from bayeslora.report.tradeoff import tradeoff_plot

__all__ = ["overconfidence_picture", "reliability_diagram", "render", "risk_coverage_plot", "save", "tradeoff_plot"]
