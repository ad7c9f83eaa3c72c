"""The known answers, to 1e-9: every formula of hbmeta.bounds."""

import pytest

from hbmeta import bounds
from tests.bounds import vectors


@pytest.mark.parametrize(
    "part",
    [
        vectors.inverses,
        vectors.single_task,
        vectors.over_tasks,
        vectors.unequal_tasks,
        vectors.sampled,
        vectors.divergences,
        vectors.edges,
    ],
)
def test_known_answers(part):
    part(bounds)
