"""What variational inference is made of: bounds, guides, and two ways to tighten a bound.

objectives    ELBO, importance-weighted and Rényi bounds, and gradients of them
noise         fixed standard normal draws whose first two moments are exact
frames        where q starts: the Gaussian expansion of the task prior
point_guide   q(φ_i) of every task, θ at a point
joint_guide   q(θ) Π_i q(φ_i | θ)
search        truncated Newton on a bound with fixed noise
training      Adam on minibatches of tasks, with fresh noise
distributed   fits of the joint guide, as draws
"""

from hbmeta.variational.distributed import JointDensity, learn_distribution
from hbmeta.variational.frames import as_frame, prior_frame
from hbmeta.variational.joint_guide import JointGuide
from hbmeta.variational.local import LocalSearch
from hbmeta.variational.noise import matched_noise
from hbmeta.variational.objectives import Bound
from hbmeta.variational.point_guide import PointGuide
from hbmeta.variational.pointwise import learn_point

__all__ = [
    "Bound",
    "JointDensity",
    "JointGuide",
    "LocalSearch",
    "PointGuide",
    "as_frame",
    "learn_distribution",
    "learn_point",
    "matched_noise",
    "prior_frame",
]
