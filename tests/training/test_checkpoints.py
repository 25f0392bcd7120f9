import json

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
        path.write_bytes(data[: len(data) // 2] if damage == "truncate" else data[:-3] + bytes([data[-3] ^ 1])
                         + data[-2:])
    with pytest.raises(RequestError, match=f"{name} is damaged"):
        checkpoints.load(folder)


def test_an_absent_role_is_named(tmp_path):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    with pytest.raises(RequestError, match="holds no role-ema.safetensors; it holds optimizer-student.safetensors, "
                       "role-student"):
        checkpoints.load_role(folder, "ema")


@pytest.mark.parametrize(("text", "message"), [
    ('{"step": 20, "sha256": null}', "sha256 is None, and should be a table"), ("[]", "should be a table"),
    ('{"step": 20}', "has no sha256"), ('{"step": "20", "sha256": {}}', "step is '20', and should be a whole number"),
    ('{"step": 20, "sha256": {"../role-student.safetensors": "0"}}', "is no safetensors file of its folder"),
    ('{"step": 19, "sha256": {}}', "is not what its name says: its checksums.json is of step 19")])
def test_a_list_of_checksums_has_a_schema(tmp_path, text, message):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    (folder / "checksums.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        checkpoints.load(folder)
    assert checkpoints.latest(tmp_path) is None


def test_foreign_names_are_left_alone(tmp_path):
    folder = checkpoints.save(tmp_path, 20, TENSORS)
    for name in ("step-abc", "step-000030.bak", "step-30", "step-0000030", ".step-000040.partial",
                 "damaged-1-step-000050"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints/step-000060").write_text("a file")
    assert checkpoints.latest(tmp_path) == folder and checkpoints.found(tmp_path) == [folder]


def test_the_newest_that_can_be_used_is_taken(tmp_path, caplog):
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, step, TENSORS)
    (tmp_path / "checkpoints/step-000020").rename(tmp_path / "checkpoints/step-000040")
    path = tmp_path / "checkpoints/step-000030/role-student.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    use = lambda folder: checkpoints.load_role(folder, "student")
    folder, state = checkpoints.newest(tmp_path, use)
    assert folder.name == "step-000010" and torch.equal(state["a"], TENSORS["role-student"]["a"])
    assert ("step-000030/role-student.safetensors is damaged" in caplog.text and "is of step 20. It is skipped: "
            "step-000010 is taken" in caplog.text)
    assert checkpoints.newest(tmp_path, use, aside=True)[0] == folder
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged-1-step-000030", "damaged-1-step-000040", "step-000010"]
    path = folder / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": {}}))
    with pytest.raises(RequestError, match="holds no role-student.safetensors; it holds nothing"):
        checkpoints.newest(tmp_path, use, aside=True)
    assert folder.is_dir() and checkpoints.newest(tmp_path / "none", use) is None


def test_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.save(tmp_path, step, TENSORS)
    checkpoints.prune(tmp_path, 30, 2)
    assert [folder.name for folder in checkpoints.found(tmp_path)] == ["step-000040", "step-000030", "step-000020"], (
        "40 is of nobody here")
    checkpoints.prune(tmp_path, 40, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000040"]
