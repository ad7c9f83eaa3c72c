"""Where tasks come from: batches, data frames, synthetic families."""

from __future__ import annotations

from hbmeta.tasks.batch import Episode, Tasks, TaskSource
from hbmeta.tasks.clusters import Clusters
from hbmeta.tasks.frame import from_frame
from hbmeta.tasks.gaussian_process import GaussianProcessTasks
from hbmeta.tasks.linear import LinearTasks
from hbmeta.tasks.radon import load_radon
from hbmeta.tasks.schema import Schema
from hbmeta.tasks.sinusoids import Sinusoids
from hbmeta.tasks.taskset import TaskSet

__all__ = [
    "Clusters",
    "Episode",
    "GaussianProcessTasks",
    "LinearTasks",
    "Schema",
    "Sinusoids",
    "TaskSet",
    "TaskSource",
    "Tasks",
    "from_frame",
    "load_radon",
]
