"""Posteriors: what was learned, as values; one file for each kind of distribution."""

from bayeslora.posteriors.answer_noise import AnswerNoise
from bayeslora.posteriors.base import Posterior
from bayeslora.posteriors.dropout import ColumnDropout, TokenDropout
from bayeslora.posteriors.gaussian import DiagonalGaussian, LowRankGaussian
from bayeslora.posteriors.kronecker import KroneckerGaussian
from bayeslora.posteriors.linearised import Linearised
from bayeslora.posteriors.mixture import Mixture
from bayeslora.posteriors.point import Point
from bayeslora.posteriors.sampling import Draws, Sampling
from bayeslora.posteriors.wrappers import Scaled, scale

__all__ = [
    "AnswerNoise",
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
    "scale",
]
