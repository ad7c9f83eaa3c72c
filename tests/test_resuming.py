"""Checkpoints: the state of a training run, and whose it is."""

import pytest
import torch

from hbmeta.errors import FileError
from hbmeta.files import read_tensors
from hbmeta.resuming import Checkpoint, digest
from tests.cases import case


def state(seed):
    """Parameters, an optimiser that has taken three steps, and a generator in use."""
    noise = torch.Generator().manual_seed(seed)
    free = {f"theta/{n}": torch.randn(shape, generator=noise) for n, shape in (("a", 3), ("b", ()))}
    optimizer = torch.optim.Adam(free.values(), lr=0.1, fused=True)
    for _ in range(3):
        for value in free.values():
            value.grad = torch.randn(value.shape, generator=noise)
        optimizer.step()
    return free, optimizer, noise


def test_a_state_comes_back_to_the_bit(tmp_path):
    checkpoint = Checkpoint(tmp_path / "on.safetensors", {"seed": 1, "sites": ("a", "b")})
    assert len(checkpoint.resume(*state(0))) == 0
    free, optimizer, noise = state(1)
    losses = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    checkpoint.save(free, optimizer, losses, noise)
    other_free, other, other_noise = state(2)
    assert torch.equal(checkpoint.resume(other_free, other, other_noise), losses)
    for kept, found in ((free, other_free), (noise, other_noise)):
        if kept is noise:
            assert torch.equal(kept.get_state(), found.get_state())
            continue
        assert all(torch.equal(kept[k], found[k]) for k in kept)
    for values, adam in ((free, optimizer), (other_free, other)):
        for value in values.values():
            value.grad = torch.ones_like(value)
        adam.step()
    assert all(torch.equal(free[k], other_free[k]) for k in free)


def test_another_fit_is_refused(tmp_path):
    path = tmp_path / "on.safetensors"
    free, optimizer, noise = state(0)
    Checkpoint(path, {"seed": 1, "steps": 10}).save(free, optimizer, torch.ones(1), noise)
    assert read_tensors(path)[1]["kind"] == "checkpoint"
    with pytest.raises(FileError, match=r"this very fit.*another steps"):
        Checkpoint(path, {"seed": 1, "steps": 11}).resume(free, optimizer, noise)
    with pytest.raises(FileError, match="another model"):
        Checkpoint(path, {"seed": 1, "steps": 10}).resume({"theta/c": free["theta/a"]}, None, noise)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_digest_is_of_every_number(dtype):
    tasks = case("varying_intercepts").tasks.to(dtype=dtype)
    assert digest(tasks) == digest(tasks.to(dtype=dtype))
    y = tasks.flat_y.clone()
    y[-1] *= 1.01
    changed = type(tasks).from_flat(
        tasks.flat_x, y, tasks.task, tasks.n_tasks, features=tasks.features, ids=tasks.ids
    )
    assert digest(changed) != digest(tasks)
    assert digest(tasks.to(dtype=torch.float32)) != digest(tasks)
