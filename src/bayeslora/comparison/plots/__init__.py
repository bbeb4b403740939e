"""Plots of predictions; they need the extra ``plot`` (matplotlib)."""

from bayeslora.comparison.plots.curves import reliability_diagram, risk_coverage_plot
from bayeslora.comparison.plots.overconfidence import overconfidence_picture
from bayeslora.comparison.plots.style import render, save
from bayeslora.comparison.plots.tradeoff import tradeoff_plot

__all__ = ["overconfidence_picture", "reliability_diagram", "render", "risk_coverage_plot", "save", "tradeoff_plot"]
