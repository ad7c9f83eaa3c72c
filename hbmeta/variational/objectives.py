"""Lower bounds of log p(S | θ), and gradients of them with little noise.

With φ_k ~ q, log w_k = log p(S, φ_k | θ) − log q(φ_k), k = 1..K, and α ≥ 0,

    L_α = 1/(1 − α) · log (1/K) Σ_k w_k^{1−α},
    L_1 = (1/K) Σ_k log w_k (the ELBO),   L_0 = log (1/K) Σ_k w_k (importance weighted, "iwae").

E L_0 ≤ log p(S | θ) and does not fall with K; for K → ∞, L_α tends to the variational Rényi bound,
which lies between the ELBO and the evidence for 0 < α < 1 and below the ELBO for α > 1.

Gradients. With shares ρ_k ∝ w_k^{1−α}, Σ ρ = 1, and φ_k = T_λ(ε_k),

    ∂L_α/∂θ = Σ_k ρ_k ∂ log p/∂θ,
    ∂L_α/∂λ = Σ_k ρ_k [∂ log w_k/∂φ_k · ∂φ_k/∂λ − ∂ log q/∂λ].

The last term is a score. Its mean is zero for α = 1 (Roeder et al. 2017). In general a second
reparametrisation, E[ρ_k ∂ log q(φ_k)/∂λ] = E[∂ρ_k/∂φ_k · ∂φ_k/∂λ] with ∂ρ_k/∂φ_k =
(1 − α) ρ_k (1 − ρ_k) ∂ log w_k/∂φ_k, leaves the path alone:

    ∂L_α/∂λ = Σ_k ρ_k c_k ∂ log w_k/∂φ_k · ∂φ_k/∂λ,    c_k = α + (1 − α) ρ_k,

which for α = 0 is Tucker et al. (2019), eq. 8. It needs draws that are independent of each other.
All of it vanishes without noise where q is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Bound"]


@dataclass(frozen=True)
class Bound:
    """L_α with K draws.

    Attributes:
        alpha: 1 for the ELBO, 0 for the importance-weighted bound.
        draws: K; for the ELBO only how many draws an estimate averages over.
    """

    alpha: float
    draws: int

    @property
    def is_elbo(self) -> bool:
        """Whether α = 1, for which every draw is an estimate by itself."""
        return self.alpha == 1.0

    def value(self, log_w: Tensor) -> Tensor:
        """(...) L_α from log weights (draws, ...)."""
        if self.is_elbo:
            return log_w.mean(0)
        power = 1.0 - self.alpha
        total = (power * log_w).logsumexp(0) - math.log(log_w.shape[0])
        return total / power

    def average(self, log_w: Tensor) -> Tensor:
        """(...) the mean of L_α over groups of K of more draws (n · K, ...)."""
        if self.is_elbo:
            return log_w.mean(0)
        groups = log_w.unflatten(0, (-1, self.draws))
        return self.value(groups.transpose(0, 1)).mean(0)

    def estimate(
        self,
        phi: Tensor,
        log_joint: Callable[[Tensor], Tensor],
        log_q: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """(tasks,) L_α, with the gradients of the module's last line.

        Args:
            phi: (draws, tasks, size), with its history in λ.
            log_joint: φ to (draws, tasks), differentiable in φ and θ.
            log_q: φ to (draws, tasks), differentiable in φ alone.
        """
        if self.is_elbo:
            return (log_joint(phi) - log_q(phi)).mean(0)
        held = phi.detach()
        log_w = (log_joint(held) - log_q(held)).detach()
        shares = ((1.0 - self.alpha) * log_w).softmax(0)
        scale = (self.alpha + (1.0 - self.alpha) * shares).unsqueeze(-1)
        # The value is φ, the gradient c times that of φ.
        slowed = scale * phi + (1.0 - scale) * held
        # The two differ by the rounding of the line above.
        path = (shares * (log_joint(slowed) - log_q(slowed))).sum(0)
        return path - path.detach() + self.value(log_w)
