"""Certificates: bounds on the risk of a fit that hold with a stated probability.

    certify        the average new task of an environment, before its data
    certify_task   this task, after its data

Both put what a fit does on data into the theorems of `hbmeta.bounds`, check what of their
assumptions can be checked, and return a `Certificate` that holds everything it was computed from.
"""

from hbmeta.certification.certificate import Certificate, Remark
from hbmeta.certification.checking import check_certificate
from hbmeta.certification.hyperpriors import FiniteHyperprior, GaussianHyperprior
from hbmeta.certification.losses import Loss
from hbmeta.certification.one_task import certify_task
from hbmeta.certification.over_tasks import certify
from hbmeta.certification.statements import Statement

__all__ = [
    "Certificate",
    "FiniteHyperprior",
    "GaussianHyperprior",
    "Loss",
    "Remark",
    "Statement",
    "certify",
    "certify_task",
    "check_certificate",
]
