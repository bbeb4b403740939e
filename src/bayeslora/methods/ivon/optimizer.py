"""IVON, the improved variational online Newton method, as a PyTorch optimiser.

Shen et al. 2024 (arXiv 2402.17641), algorithm 1. It learns q = N(m, diag σ²), σ = 1/√(λ(h+δ)), and needs gradients at
draws θ = m + σ⊙ε instead of at m. With ĝ = ∇ℓ(θ), ℓ the mean loss per example:

    g ← β₁g + (1−β₁)ĝ
    f = λ(h+δ)·(θ−m)⊙ĝ                              Price's (Stein's) estimate of the Hessian's diagonal
    h ← β₂h + (1−β₂)f + ½(1−β₂)²(h−f)²/(h+δ)        so that h+δ at least halves, and never becomes negative
    m ← m − η·clip( (g/(1−β₁ᵗ) + δm)/(h+δ), ±ξ )

What is ours: noise is a function of (seed, step, number of the draw, number of the parameter), so a checkpoint holds
nothing random and every process draws the same; several draws per step, each with its own share of the gradient; and
the settings that docs/methods/ivon.md explains. An empirical prior is in σ and in the divisor, and does not pull m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from bayeslora.errors import InputError
from bayeslora.methods.ivon.settings import (
    Group,
    check_ivon,
    clamp,
    estimate_prior,
    from_prior,
    parts,
    pull_weight,
    update_hessian,
)
from bayeslora.params import local, seed_of, spread_as, stack_across, whole


@final
class IvonOptimizer(torch.optim.Optimizer):
    """IVON, for any PyTorch loop.

    In a loop of one's own:

        optimizer = IvonOptimizer(model.parameters(), lr=0.1, ess=len(data))
        for batch in loader:
            optimizer.zero_grad()
            with optimizer.sampled():            # the parameters are a draw here, and the means afterwards
                loss(model, batch).backward()    # the mean loss per example; accumulate as you like
            optimizer.step()

    For several draws per step, enter ``sampled`` several times and scale each loss by its share, as for micro-batches.
    Everything kept per parameter is float32 and in the normal optimiser state: ``avg_grad`` (g), ``hess`` (h),
    ``delta`` (δ), ``mean`` (m) of one in half precision, ``start`` (m₀) with ``prior_mean="start"`` unless it is zero.

    Args:
        params: Parameters or parameter groups; every setting below can be a group's own.
        lr: Learning rate η of the mean.
        ess: λ, how many examples the data count for: N is Bayes' rule, more is a cold posterior.
        hess_init: h₀, the first value of h.
        betas: (β₁, β₂), the memories of g and of h.
        weight_decay: δ; the prior is N(0, 1/(λδ)).
        prior_mean: ``zero``, or ``start`` for a prior around m's first value.
        prior_warmup: w, if not 0: the pull to the prior's mean is multiplied by 1 − e^{−t/w}.
        bounded: Whether h is kept from falling below zero, so that σ ≤ 1/√(λδ).
        clip_radius: ξ, bound on each coordinate of the update before η.
        rescale_lr: Whether η is multiplied by h₀ + δ.
        price_clip: κ, bound on |λ(θ−m)⊙ĝ|, which is |f|/(h+δ).
        prior: ``fixed``, or ``empirical``: δ is estimated for each parameter tensor from its own m and σ.
        seed: Which stream of noise.

    Raises:
        InputError: If a setting has no meaning, or λ and h₀ + δ make σ infinite.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        ess: float,
        hess_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 0.0,
        prior_mean: Literal["zero", "start"] = "zero",
        prior_warmup: float = 0.0,
        bounded: bool = False,
        clip_radius: float = math.inf,
        rescale_lr: bool = False,
        price_clip: float = math.inf,
        prior: Literal["fixed", "empirical"] = "fixed",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "ess": ess, "hess_init": hess_init, "betas": betas, "weight_decay": weight_decay,
            "clip_radius": clip_radius, "rescale_lr": rescale_lr, "price_clip": price_clip, "prior": prior,
            "prior_mean": prior_mean, "prior_warmup": prior_warmup, "bounded": bounded,
        }  # fmt: skip
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_ivon(group)
        self.param_groups[0] |= {"seed": seed, "steps": 0}
        self._noise: dict[Tensor, Tensor] = {}
        self._products: dict[Tensor, Tensor] = {}  # Σ noise ⊙ gradient of the draws of this step that are done
        self._seen: dict[Tensor, Tensor] = {}  # the gradient when the last of them was done
        self._draws = self._folds = 0  # draws of this step, and how many of them are in the products

    def noise(self, parameter: Tensor) -> Tensor | None:
        """Return θ − m of the present draw, float32, whole in every process; None outside a step."""
        return self._noise.get(parameter)

    def mean(self, parameter: Tensor) -> Tensor:
        """Return m of a parameter: itself, or the float32 copy that is kept of one in half precision."""
        mean: Tensor = self.state[parameter].get("mean", parameter) if parameter in self.state else parameter
        return mean.detach()

    def variance(self, parameter: Tensor) -> Tensor:
        """Return σ² of a parameter, float32."""
        group = self._group(parameter)
        state = self._state(parameter, group)
        return 1 / (group["ess"] * (whole(state["hess"]) + state["delta"]))

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the noise of this step, or another draw of it, for those who add `noise` themselves (see `sampled`)."""
        grads = self._grads()
        if self._draws and grads:
            self._fold(grads)
        else:
            self._forget()
        self._draws += 1
        head, trained = self.param_groups[0], [(p, g) for g in self.param_groups for p in g["params"]]
        for number, (p, group) in enumerate(trained):
            if p.requires_grad:
                key = seed_of("ivon", head["seed"], head["steps"], self._draws, number)
                noise = torch.randn(p.shape, generator=torch.Generator(p.device).manual_seed(key), device=p.device)
                state = self._state(p, group)
                self._noise[p] = noise.div_(torch.add(whole(state["hess"]), state["delta"]).mul_(group["ess"]).sqrt_())

    @contextmanager
    def sampled(self) -> Iterator[None]:
        """Make the parameters a draw for the length of a ``with`` block; gradients are taken inside.

        Yields:
            Nothing. Afterwards, and on any exception, the parameters are bit for bit the means again.
        """
        self.draw()
        before = {p: p.detach().clone() for p in self._noise}
        try:
            for p, noise in self._noise.items():
                p.detach().copy_(self.mean(p) + spread_as(noise, p))
            yield
        finally:
            for p, mean in before.items():
                p.detach().copy_(mean)
        if self._draws > 1:
            self._fold(self._grads())

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update h and m from the gradients at the draws.

        Args:
            closure: Computes the loss and its gradient; it is called at a draw.

        Returns:
            The closure's loss.

        Raises:
            InputError: If there are gradients and nothing was drawn.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.sampled():
                loss = closure()
        grads = self._grads()
        if grads and not self._draws:
            if any(bool(grad.any()) for grad in grads.values()):
                raise InputError("IVON needs gradients at a draw; compute them inside `with optimizer.sampled():`")
            _ = [self._state(p, self._group(p)) for p in grads]  # so PyTorch's distributed checkpoints ask for states
            return loss
        products = self._folded(grads)
        for group in self.param_groups:
            params = [p for p in group["params"] if p in grads and p in products]
            if params:
                self._update(group, params, [grads[p] for p in params], [products[p] for p in params])
        self.param_groups[0]["steps"] += 1
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and forget the draws that they belong to."""
        super().zero_grad(set_to_none)
        self._forget()

    def load_state_dict(self, state_dict: Group) -> None:
        """Load a state; what is float32 stays so, also for parameters in half precision."""
        super().load_state_dict(state_dict)
        self._forget()
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, p in zip(names, (p for group in self.param_groups for p in group["params"]), strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = spread_as(value.to(p.device, torch.float32, copy=True), p)

    def begin(self, parameter: Tensor, *, hess_init: float, weight_decay: float) -> None:
        """Give a parameter its own h₀ and δ in the place of its group's; nothing happens once it has taken a step.

        Args:
            parameter: One of the parameters.
            hess_init: h₀.
            weight_decay: δ.
        """
        state = self._state(parameter, self._group(parameter))
        if not state["step"]:
            state["hess"].fill_(hess_init)
            state["hess_init"], state["delta"] = hess_init, weight_decay

    def _group(self, parameter: Tensor) -> Group:
        """Return the group that a parameter is in."""
        return next(g for g in self.param_groups if any(p is parameter for p in g["params"]))

    def _state(self, p: Tensor, group: Group) -> Group:
        """Return a parameter's state, begun if need be."""
        state: Group = self.state[p]
        if not state:
            state["step"] = 0
            state["avg_grad"] = torch.zeros_like(p, dtype=torch.float32)
            state["hess"] = torch.full_like(p, group["hess_init"], dtype=torch.float32)
            state["delta"], state["hess_init"] = float(group["weight_decay"]), float(group["hess_init"])
            if group["prior_mean"] == "start" and bool(p.detach().any()):
                state["start"] = p.detach().to(torch.float32, copy=True)
            if p.dtype != torch.float32:
                state["mean"] = p.detach().float()
        return state

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor], products: list[Tensor]) -> None:
        """Take one step for the parameters of a group: the formulas at the top, for all of them at once."""
        for p in params:
            self.state[p]["step"] += 1
        states = [parts(self.state[p], local) for p in params]
        beta1, _ = group["betas"]
        hess, average, deltas = ([s[key] for s in states] for key in ("hess", "avg_grad", "delta"))
        torch._foreach_lerp_(average, grads, 1 - beta1)
        update_hessian(group, hess, deltas, products)
        means = [local(self.mean(p)) for p in params]
        if group["prior"] == "empirical":
            deltas = estimate_prior(group, [self.state[p] for p in params], [self.mean(p) for p in params])
        update = torch._foreach_div(average, [1 - beta1 ** s["step"] for s in states])
        weights = [pull_weight(group, s) for s in states]
        if any(weights):
            torch._foreach_add_(update, torch._foreach_mul(from_prior(means, states), weights))
        torch._foreach_div_(update, torch._foreach_add(hess, deltas))
        clamp(update, group["clip_radius"])
        rate = group["lr"] * (group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0)
        torch._foreach_add_(means, update, alpha=-rate)
        for p, mean in zip(params, means, strict=True):
            if p.dtype != torch.float32:
                local(p.detach()).copy_(mean)

    def _grads(self) -> dict[Tensor, Tensor]:
        """Return the gradients that there are, float32, of this process's part where parameters are spread."""
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return {p: local(p.grad).float() for p in trained}

    @torch.no_grad()
    def _fold(self, grads: dict[Tensor, Tensor]) -> None:
        """Add noise ⊙ gradient of a draw that is done, unless it was added, and note the gradient up to it."""
        if self._folds == self._draws:
            return
        self._folds = self._draws
        for p, grad in grads.items():
            if p in self._noise:
                product = self._product(p, grad - self._seen[p] if p in self._seen else grad)
                self._products[p] = self._products[p] + product if p in self._products else product
                self._seen[p] = grad.detach().to(torch.float32, copy=True)

    def _folded(self, grads: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Return Σ noise ⊙ gradient over the step's draws; gradients may have been scaled as a whole since the last."""
        sampled_params = [p for p in grads if p in self._noise]
        if self._draws <= 1 or not sampled_params:
            return {p: self._product(p, grads[p]) for p in sampled_params}
        if self._folds < self._draws:
            self._fold(grads)
            return {p: self._products[p] for p in sampled_params}
        now = stack_across([grads[p].norm() for p in sampled_params]).norm()
        then = stack_across([self._seen[p].norm() for p in sampled_params]).norm()
        factor = torch.where(then > 0, now / then, 1.0)
        return {p: self._products[p] * factor.to(p.device) for p in sampled_params}

    def _product(self, p: Tensor, grad: Tensor) -> Tensor:
        """Return noise ⊙ gradient."""
        return local(spread_as(self._noise[p], p)) * grad

    def _forget(self) -> None:
        """End a step: no draw, no products."""
        self._noise, self._products, self._seen = {}, {}, {}
        self._draws = self._folds = 0
