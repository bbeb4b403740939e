"""How unsure a set of predictions is, and which part of it more data could remove.

Every function takes ``log_probs [S N C]``: natural logarithms of the S draws' probabilities for N examples with up to
C choices, ``-inf`` for choices that an example does not have. A draw that was not taken for an example has ``-inf`` for
all of its choices and counts nowhere. With p̄ = (1/S) Σ_s p_s the total uncertainty splits as

    H(p̄)  =  (1/S) Σ_s H(p_s)  +  I,     I = mutual information between the answer and the draw,

the first part being the noise in the answers themselves, the second the ignorance about the weights (Depeweg et al.,
2018, *Decomposition of Uncertainty in Bayesian Deep Learning*, eq. 6-7; Houlsby et al., 2011, eq. 2). All results are
in nats, are computed in float64 and come back in the type of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslora._typing import Bool, Float
from bayeslora.errors import InputError

_ROUNDING = 1e-12
"""Mutual information under this many nats is the rounding of a difference of entropies, and is returned as 0."""


def taken(log_probs: Float[Tensor, "S N C"]) -> Bool[Tensor, "S N"]:
    """Say which draws were taken for which examples: not those whose choices all have -inf."""
    return torch.isfinite(log_probs).any(-1)


def average(log_probs: Float[Tensor, "S N C"]) -> Float[Tensor, "N C"]:
    """Average the draws' probabilities, log p̄ = logsumexp_s log p_s - log S; -inf where every draw has -inf."""
    if log_probs.ndim != 3 or log_probs.shape[0] == 0:
        raise InputError(
            f"log_probs has shape {list(log_probs.shape)}; give [draws, examples, choices] with at least one draw"
        )
    count = taken(log_probs).sum(0).double()
    return (torch.logsumexp(log_probs.double(), dim=0) - count.log()[:, None]).to(log_probs.dtype)


def entropy(log_p: Float[Tensor, "*batch C"]) -> Float[Tensor, " *batch"]:
    """Compute the entropy H(p) = -Σ_c p_c log p_c, between 0 and log C, where 0 log 0 = 0."""
    return torch.special.entr(log_p.double().exp()).sum(-1).to(log_p.dtype)


def divergences(log_p: Float[Tensor, "*batch C"], log_q: Float[Tensor, "*batch C"]) -> Float[Tensor, " *batch"]:
    """Return KL(p ‖ q) of each row in nats; log p is -inf for choices that a row does not have."""
    return (log_p.exp() * (log_p - log_q).masked_fill(torch.isneginf(log_p), 0.0)).sum(-1)


def expected_entropy(log_probs: Float[Tensor, "S N C"]) -> Float[Tensor, " N"]:
    """Average the draws' entropies, (1/S) Σ_s H(p_s): the uncertainty that stays when the weights are known."""
    return (entropy(log_probs.double()).sum(0) / taken(log_probs).sum(0)).to(log_probs.dtype)


def mutual_information(log_probs: Float[Tensor, "S N C"]) -> Float[Tensor, " N"]:
    """Compute I = H(p̄) - (1/S) Σ_s H(p_s), between 0 and log min(S, C): the uncertainty that comes from the weights."""
    draws = log_probs.double()
    information = entropy(average(draws)) - expected_entropy(draws)
    # what is within rounding of 0 is 0, so that identical draws tie exactly
    return information.masked_fill(information < _ROUNDING, 0.0).to(log_probs.dtype)


def disagreement(log_probs: Float[Tensor, "S N C"]) -> Float[Tensor, " N"]:
    """Compute 1 - (1/S) Σ_s 1[argmax p_s = argmax p̄]: the share of draws whose answer is not that of their average."""
    was_taken = taken(log_probs)
    agrees = (log_probs.argmax(-1) == average(log_probs.double()).argmax(-1)) & was_taken
    return 1 - agrees.sum(0).to(log_probs.dtype) / was_taken.sum(0)


def drift(log_p: Float[Tensor, "*batch C"], base: Float[Tensor, "*batch C"]) -> Float[Tensor, " *batch"]:
    """Compute KL(p ‖ p_base) = Σ_c p_c (log p_c − log p_base,c) ≥ 0, where 0 log 0 = 0: how far tuning went."""
    # rounding may leave a little below 0
    return divergences(log_p.double(), base.double()).clamp_min(0).to(log_p.dtype)


def likelihood_ratio(log_p: Float[Tensor, "*batch C"], base: Float[Tensor, "*batch C"]) -> Float[Tensor, " *batch"]:
    """Compute log p_c − log p_base,c of the answer c = argmax p (Zhang et al. 2025, arXiv 2404.08679, for S_a|q)."""
    answer = log_p.argmax(-1, keepdim=True)
    return (log_p.double().gather(-1, answer) - base.double().gather(-1, answer)).squeeze(-1).to(log_p.dtype)


def between_within(
    log_probs: Float[Tensor, "S N C"], components: Sequence[int]
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Split a mixture's mutual information into ``(between, within)`` its members, one component per draw."""
    if len(components) != log_probs.shape[0]:
        raise InputError(
            f"components has {len(components)} entries for {log_probs.shape[0]} draws; give one member per draw"
        )
    # With p_m the average over member m's draws and p the equal-weight average over the members,
    # between = H(p) - mean_m H(p_m) and within = mean_m [H(p_m) - mean_{s in m} H(p_s)]: the chain rule of mutual
    # information over (member, draw). They sum to it when every member has equally many draws.
    draws, member = log_probs.double(), torch.tensor(components, device=log_probs.device)
    groups = [draws[member == m] for m in sorted(set(components))]
    between = mutual_information(torch.stack([average(group) for group in groups]))
    within = torch.stack([mutual_information(group) for group in groups]).mean(0)
    return between.to(log_probs.dtype), within.to(log_probs.dtype)


def monte_carlo_error(
    log_probs: Float[Tensor, "S N C"], components: Sequence[int] | None = None, *, paired: bool = False
) -> Float[Tensor, " N"]:
    """Return the standard error of the average probabilities, of the choice where it is largest; inf for one unit.

    The draws of a mixture are a sample from each member, stratified: with s_m² the variance over the n_m units of
    member m, the error is √(Σ_m s_m²/n_m) / M. Where some member has a single unit, the variance over all units takes
    its place, which is an upper bound on average. A unit is a draw or, if ``paired``, a member's antithetic draws 2k
    and 2k + 1, of which only the average is a sample.
    """
    probs, was_taken = log_probs.double().exp(), taken(log_probs)
    components = components or [0] * len(probs)
    member = torch.tensor(components, device=probs.device)
    strata = []
    for m in sorted(set(components)):
        p, t = probs[member == m], was_taken[member == m]
        if paired and len(p) > 1:
            even = len(p) // 2 * 2
            p, t = p[:even].view(-1, 2, *p.shape[1:]).mean(1), t[:even].view(-1, 2, t.shape[1]).all(1)
        strata.append((p, t))
    if any(bool((t.sum(0) < 2).any()) for _, t in strata):
        strata = [(torch.cat([p for p, _ in strata]), torch.cat([t for _, t in strata]))]
    total = torch.zeros_like(probs[0])
    for p, t in strata:
        count = t.sum(0)[:, None]
        mean = (p * t[..., None]).sum(0) / count
        squares = ((p - mean).square() * t[..., None]).sum(0)
        total += torch.where(count > 1, squares / (count * (count - 1)), torch.inf)
    return (total.sqrt() / len(strata)).amax(-1).to(log_probs.dtype)
