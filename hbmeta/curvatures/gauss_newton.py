"""Generalised Gauss–Newton: Λ = Σ_c J_cᵀ F_c J_c − ∇² log p(φ | θ).

J_c is the Jacobian of the parameters of the distribution at cell c, F_c the information about them
(`curvatures.response`). Where these parameters are natural and linear in φ (a linear mean, the
canonical links of Bernoulli, Poisson and Categorical) this is the exact curvature; elsewhere it
leaves out Σ_c ∂ log p/∂η_c ∇²η_c, which has mean zero over y given φ, and with it all that could
make the curvature of a likelihood negative. Under a log-concave prior it is positive everywhere.

With fewer rows R_c J_c than entries of φ, Λ is kept as the prior's diagonal and these rows:
log det Λ = log det B + log det (I + R B⁻¹ Rᵀ) (matrix determinant lemma), and no matrix of φ's size
is formed. It is the same Λ.

References:
    Schraudolph (2002), Neural Computation 14(7); Martens (2020), JMLR 21(146).
"""

from __future__ import annotations

from torch import Tensor

from hbmeta.curvatures.precision import Dense, Diagonal, Precision, Rows
from hbmeta.curvatures.prior import prior_diagonal, prior_matrix
from hbmeta.curvatures.response import gram, response_rows
from hbmeta.errors import UnsupportedModelError
from hbmeta.problem import Problem
from hbmeta.program import Batch, Theta

__all__ = ["DENSE", "diagonal_gauss_newton", "gauss_newton"]

# Largest φ for which matrices of its size are formed as a matter of course, and at all.
DENSE = 64
_DENSE_AT_ALL = 512


def gauss_newton(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> Precision:
    """Λ of every task; dense up to 64 parameters, or where a task has as many rows as parameters.

    Raises:
        UnsupportedModelError: more than 512 parameters and as many rows.
    """
    size = phi.shape[-1]
    rows = response_rows(problem, theta, phi, batch, create_graph=create_graph)
    if size <= DENSE or batch.task is not None or rows.shape[1] >= size:
        if size > _DENSE_AT_ALL:
            raise UnsupportedModelError(
                'curvature="ggn"',
                needed=f"at most {_DENSE_AT_ALL} parameters per task, or fewer observations than "
                "parameters in every task",
                found=f"{size} parameters and {rows.shape[1]} observations",
                do='Use curvature="kronecker", "diagonal" or "last_layer".',
            )
        prior = prior_matrix(problem, theta, phi, batch, create_graph=create_graph)
        return Dense(prior + gram(rows, batch))
    prior = prior_diagonal(problem, theta, phi, batch, create_graph=create_graph)
    return Rows(prior, rows)


def diagonal_gauss_newton(
    problem: Problem, theta: Theta, phi: Tensor, batch: Batch, *, create_graph: bool = False
) -> Diagonal:
    """The diagonal of the Gauss–Newton Λ: N(φ̂, ·) has its variances 1/Λ_jj, too small ones.

    1/Λ_jj is the variance of entry j given all the others.
    """
    rows = response_rows(problem, theta, phi, batch, create_graph=create_graph)
    take = prior_matrix if phi.shape[-1] <= DENSE else prior_diagonal
    prior = take(problem, theta, phi, batch, create_graph=create_graph)
    prior = prior.diagonal(dim1=-2, dim2=-1) if take is prior_matrix else prior
    if batch.task is None:
        return Diagonal(prior + rows.square().sum(-2))
    squares = rows.square().sum(-2)
    zero = squares.new_zeros(batch.n_tasks, squares.shape[-1])
    return Diagonal(prior + zero.index_add(0, batch.task, squares))
