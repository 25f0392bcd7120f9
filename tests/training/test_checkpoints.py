import pytest
import torch

from stepdistill.errors import RequestError
from stepdistill.training import checkpoints

TENSORS = {"role-student": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(())}, "optimizer-student": {}}


def test_round_trip(tmp_path):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    assert folder == tmp_path / "checkpoints/step-000020" == checkpoints.latest(tmp_path)
    found = checkpoints.load(folder)
    assert found.keys() == TENSORS.keys() and found["optimizer-student"] == {}
    assert torch.equal(found["role-student"]["a"], TENSORS["role-student"]["a"])
    assert torch.equal(checkpoints.load_role(folder, "student")["b"], torch.ones(()))
    assert checkpoints.roles_in(folder) == ["student"] and checkpoints.step_of(folder) == 20


def test_the_latest_is_the_greatest_step_and_halves_do_not_count(tmp_path):
    assert checkpoints.latest(tmp_path) is None
    for step in (999_999, 1_000_000, 30):
        checkpoints.save(tmp_path, step, TENSORS)
    (tmp_path / "checkpoints/.step-2000000.partial").mkdir()
    assert checkpoints.latest(tmp_path).name == "step-1000000"


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints.save(tmp_path, 1, TENSORS)
    folder = checkpoints.save(tmp_path, 1, {"role-student": {"a": torch.zeros(1)}})
    assert checkpoints.load(folder).keys() == {"role-student"}


@pytest.mark.parametrize("name", ["role-student.safetensors", "checksums.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(tmp_path, name, damage):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    path, data = folder / name, (folder / name).read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(RequestError, match=f"{name} is damaged.*Remove the folder"):
        checkpoints.load(folder)


def test_an_absent_role_is_named(tmp_path):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    with pytest.raises(RequestError, match="holds no role-ema.safetensors; it holds optimizer-student.safetensors, role-student"):
        checkpoints.load_role(folder, "ema")
