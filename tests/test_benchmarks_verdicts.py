"""The benchmark of verdicts: what it holds against what, on a case whose truth is known."""

import json
from dataclasses import asdict

import hbmeta
from benchmarks import verdicts
from benchmarks.approximations import moments_by_name
from benchmarks.posterior_programs import Moments
from hbmeta import inference
from tests.cases import case


def test_parameters_meet_their_references_by_name():
    """A reference moved by half an sd in one entry makes that one wrong, and no other."""
    known = case("linear_own_nested")
    fitted = inference.ExactLinear().fit(known.program, known.tasks, compile=False)
    posterior = fitted.posterior
    diagnosis = hbmeta.diagnose(fitted, known.tasks)
    found = moments_by_name(posterior)
    names = verdicts.names_of(posterior)
    assert sorted(names.values()) == sorted(found)
    mean, _ = posterior.moments()["coefficients"]
    for position, task in enumerate(posterior.ids):
        for entry in range(2):
            name = names["coefficients", task, (entry,)]
            assert found[name].mean == float(mean[position, entry])
    count, truths = verdicts.compare(diagnosis, posterior, found)
    assert dict(count) == {"right/right": 2 * len(posterior.ids)}
    assert set(truths) == {("right", "right")}
    moved = names["coefficients", posterior.ids[1], (0,)]
    was = found[moved]
    count, _ = verdicts.compare(
        diagnosis, posterior, found | {moved: Moments(was.mean + 0.5 * was.sd, was.sd)}
    )
    assert count["wrong/right"] == 1


def test_truth_has_the_stated_limits():
    reference = Moments(1.0, 2.0)
    assert verdicts.truth_of(Moments(1.59, 2.0), reference) == ("right", "right")
    assert verdicts.truth_of(Moments(1.61, 2.0), reference) == ("wrong", "wrong")
    assert verdicts.truth_of(Moments(1.0, 1.49), reference) == ("wrong", "right")
    assert verdicts.truth_of(Moments(1.0, 2.67), reference) == ("wrong", "right")


def test_the_matrix_counts_what_is_not_right_as_flagged():
    pairs = [("right", "right")] * 3 + [("right", "unverified")] + [("wrong", "wrong")] * 4
    text = verdicts.matrix([*pairs, ("wrong", "right")])
    assert "| right | 3 | 0 | 1 | 25 % |" in text
    assert "| wrong | 1 | 4 | 0 | 80 % |" in text


def test_results_are_read_back_and_misses_named(tmp_path):
    hit = verdicts.Judged("p", "Laplace", truth="right", verdict="right", means=("right", "right"))
    miss = verdicts.Judged("p", "NUTS", truth="wrong", verdict="right", means=("right", "right"))
    path = tmp_path / "p.NUTS.json"
    path.write_text(json.dumps(asdict(miss)))
    back = verdicts.from_file(path)
    assert back.means == miss.means
    assert back.verdict == miss.verdict
    text = verdicts.report([hit, back, verdicts.Judged("p", "MAML", "refused")])
    assert "1 misses" in text
    assert "- NUTS on p: it is wrong, the verdict is right" in text
    assert "Laplace on p:" not in text
    assert "1 fits were refused" in text
