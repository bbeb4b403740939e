"""Posteriors: what was learned, as values; one file for each kind of distribution."""

from bayeslora.posteriors.base import Point, Posterior
from bayeslora.posteriors.dropout import ColumnDropout, TokenDropout
from bayeslora.posteriors.gaussian import DiagonalGaussian, LowRankGaussian
from bayeslora.posteriors.kronecker import KroneckerGaussian
from bayeslora.posteriors.mixture import Mixture, member_seed
from bayeslora.posteriors.sampling import GROUPS, Draws, Sampling
from bayeslora.posteriors.wrappers import Linearised, Scaled, has_weights, scale

__all__ = [
    "GROUPS",
    "ColumnDropout",
    "DiagonalGaussian",
    "Draws",
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
