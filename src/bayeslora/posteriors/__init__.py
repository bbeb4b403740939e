"""Posteriors: what was learned, as values; one file for each kind of distribution."""

from bayeslora.posteriors.base import GROUPS, Point, Posterior, Sampling
from bayeslora.posteriors.combined import Linearised, Mixture, Scaled, has_weights, member_seed, scale
from bayeslora.posteriors.dropout import ColumnDropout, TokenDropout
from bayeslora.posteriors.gaussian import DiagonalGaussian, LowRankGaussian
from bayeslora.posteriors.kronecker import KroneckerGaussian

__all__ = [
    "GROUPS",
    "ColumnDropout",
    "DiagonalGaussian",
    "KroneckerGaussian",
    "Linearised",
    "LowRankGaussian",
    "Mixture",
    "Point",
    "Posterior",
    "Sampling",
    "Scaled",
    "TokenDropout",
    "has_weights",
    "member_seed",
    "scale",
]
