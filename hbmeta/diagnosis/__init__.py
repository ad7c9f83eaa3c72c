"""Whether a posterior is wrong, told without a reference at hand: `hbmeta.diagnose`.

records      the Diagnosis: symptoms, a verdict per parameter and per task
chains       R̂, effective draws, divergences
weights      Pareto k̂ of q(φ | S) per task, and the moments that its weights correct it to
reference    a posterior to judge by, made on the spot and checked
observations the response against its predictive: the model, not the approximation
judgement    one call for all
"""

from hbmeta.diagnosis.judgement import diagnose
from hbmeta.diagnosis.records import Diagnosis, Parameter, Symptom, Task
from hbmeta.diagnosis.reference import reference_fit

__all__ = ["Diagnosis", "Parameter", "Symptom", "Task", "diagnose", "reference_fit"]
