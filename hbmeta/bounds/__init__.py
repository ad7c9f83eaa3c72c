"""PAC-Bayes theorems as pure functions in float64; a leaf that imports nothing of the rest.

Each function states its theorem, what it assumes and where it is from; docs/certificates.md says
which one to use when. Risks and losses are in [0, 1], KL divergences in nats. Arguments are
numbers, arrays or tensors and broadcast; what is given per task has the tasks last.

    bound = bounds.query_split(risk=0.1, hyper_kl=5.0, n_tasks=200, delta=0.05)
    bound.value, bound.across_task, bound.vacuous  # 0.229, 0.129, False
"""

from hbmeta.bounds.amit_meir import amit_meir, amit_meir_kl
from hbmeta.bounds.bound import Bound
from hbmeta.bounds.differentiable import differentiable_kl_inverse
from hbmeta.bounds.divergences import (
    categorical_kl,
    diagonal_gaussian_kl,
    gaussian_kl,
    low_rank_gaussian_kl,
)
from hbmeta.bounds.expected_divergences import (
    expected_kl_affine,
    expected_kl_fixed_variance,
    expected_kl_learned_variance,
    gaussian_hyper_kl,
)
from hbmeta.bounds.hold_out import clopper_pearson, hold_out, meta_test, monte_carlo
from hbmeta.bounds.inverse import kl_inverse, kl_inverse_lower
from hbmeta.bounds.joint import joint_kl, joint_root
from hbmeta.bounds.pentina_lampert import pentina_lampert
from hbmeta.bounds.query_split import query_split
from hbmeta.bounds.separate_roots import account_bound, separate_roots
from hbmeta.bounds.single_task import (
    catoni,
    maurer,
    mcallester,
    new_task,
    quadratic,
    seeger_kl,
    seeger_relaxed,
    thiemann,
)

__all__ = [
    "Bound",
    "account_bound",
    "amit_meir",
    "amit_meir_kl",
    "categorical_kl",
    "catoni",
    "clopper_pearson",
    "diagonal_gaussian_kl",
    "differentiable_kl_inverse",
    "expected_kl_affine",
    "expected_kl_fixed_variance",
    "expected_kl_learned_variance",
    "gaussian_hyper_kl",
    "gaussian_kl",
    "hold_out",
    "joint_kl",
    "joint_root",
    "kl_inverse",
    "kl_inverse_lower",
    "low_rank_gaussian_kl",
    "maurer",
    "mcallester",
    "meta_test",
    "monte_carlo",
    "new_task",
    "pentina_lampert",
    "quadratic",
    "query_split",
    "seeger_kl",
    "seeger_relaxed",
    "separate_roots",
    "thiemann",
]
