"""What leaves of a run: any of its checkpoints, the average or the student; what the file says of itself; and the
Hub."""
from __future__ import annotations

import hashlib
import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import stepdistill
from stepdistill.errors import RequestError
from stepdistill.export import hub
from stepdistill.export.metadata import stamp
from stepdistill.run.setup import open_run
from stepdistill.training import checkpoints

RECIPE = {"method": "lcm", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
          "data": {"images": "shapes", "batch": 2},
          "train": {"updates": 2, "ema": 0.5, "checkpoint_every": 1, "log_every": 1},
          "evaluate": {"prompts": ["a red ring"]}}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_teacher):
    return stepdistill.train(RECIPE | {"teacher": str(tiny_teacher)}, out=tmp_path_factory.mktemp("runs") / "mine")


def state(run, step, role):
    return checkpoints.load_role(run / f"checkpoints/step-{step:06d}", role)


@pytest.mark.parametrize(("step", "weights", "known"), [(None, None, (2, "ema")), (1, None, (1, "ema")),
                                                        (1, "student", (1, "student")),
                                                        (2, "student", (2, "student"))])
def test_the_chosen_weights_leave(run, tmp_path, step, weights, known):
    folder = stepdistill.export(run, out=tmp_path / "out", dtype="float32", checkpoint=step, weights=weights)
    held, settings = (load_file(folder / "pytorch_lora_weights.safetensors"),
                      json.loads((folder / "stepdistill.json").read_text()))
    role = state(run, *known)
    assert len(held) == len(role) and all(torch.equal(held[f"unet.{name}"], role[name]) for name in role)
    assert (settings["step"], settings["role"]) == known and f"role `{known[1]}`" in (folder / "README.md").read_text()
    others = [state(run, *other) for other in ((1, "ema"), (1, "student"), (2, "ema"), (2, "student"))
              if other != known]
    assert not any(all(torch.equal(other[name], role[name]) for name in role) for other in others)


def test_the_chosen_weights_are_sampled(run):
    draw = lambda **chosen: stepdistill.sample(run, "a red ring", **chosen)[0].tobytes()
    assert draw(checkpoint=2, weights="ema") == draw() and open_run(run, 1, "student").step == 1


def test_what_a_run_has_not_is_refused(run, tiny_teacher, tmp_path):
    with pytest.raises(RequestError, match="has no checkpoint of step 7; it has those of 1, 2"):
        stepdistill.sample(run, "a", checkpoint=7)
    with pytest.raises(RequestError, match="--weights best: there are ema and student"):
        stepdistill.export(run, weights="best", out=tmp_path / "out")
    with pytest.raises(RequestError, match="is no run folder, and checkpoints .* are a run's"):
        stepdistill.sample(tiny_teacher, "a", checkpoint=1)
    plain = stepdistill.train("toy/lcm", out=tmp_path / "toy",
                              **{"train.updates": 1, "train.ema": None, "train.warmup": 0, "data.batch": 4})
    with pytest.raises(RequestError, match="--weights ema: recipe keeps no average"):
        open_run(plain, weights="ema")


@pytest.mark.parametrize("to", ["lora", "comfyui"])
def test_a_file_says_what_it_is(run, tmp_path, to):
    folder = stepdistill.export(run, to, out=tmp_path / "out")
    file = folder / json.loads((folder / "stepdistill.json").read_text())["weights"]
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert said["modelspec.sai_model_spec"] == "1.0.0" and said["modelspec.implementation"] == "diffusers"
    # of no known width
    assert said["modelspec.architecture"] == "stable-diffusion/lora" and "ss_base_model_version" not in said
    assert (said["modelspec.usage_hint"].startswith("2 steps of LCMScheduler") and said["modelspec.prediction_type"]
            == "epsilon")
    assert ((said["ss_network_dim"], said["ss_network_alpha"], said["ss_steps"], said["ss_output_name"])
            == ("2", "2", "2", file.stem))
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    assert begin % 8 == 0 and said["modelspec.hash_sha256"] == f"0x{hashlib.sha256(whole[begin:]).hexdigest()}"


@pytest.mark.parametrize(("width", "kind", "architecture", "version"), [
    (768, "eps", "stable-diffusion-v1", "sd_v1"), (1024, "v", "stable-diffusion-v2-768-v", "sd_v2_v"),
    (1024, "eps", "stable-diffusion-v2-512", "sd_v2"), (640, "eps", "stable-diffusion", None)])
def test_the_base_is_known_by_what_it_reads(width, kind, architecture, version):
    from types import SimpleNamespace

    from stepdistill.export.metadata import _architecture
    network = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=width))
    student = SimpleNamespace(teacher=SimpleNamespace(network=network, kind=kind, family=SimpleNamespace(name="sana")))
    assert _architecture(student, "StableDiffusionPipeline") == (architecture, version)
    assert _architecture(student, "StableDiffusionXLPipeline") == ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    assert _architecture(student, "SanaPipeline") == ("sana", None)


def test_a_stamp_keeps_the_tensors_and_is_the_same_file_each_time(tmp_path):
    tensors = {"a": torch.arange(5, dtype=torch.float16), "b": torch.ones(2, 3)}
    files = [tmp_path / name for name in ("one", "two")]
    for file in files:
        save_file(tensors, file, metadata={"format": "pt", "own": "kept"})
        stamp(file, {f"ss_{i}": "x" * i for i in range(9)})
    assert files[0].read_bytes() == files[1].read_bytes()
    found = load_file(files[0])
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata()["own"] == "kept" and opened.metadata()["ss_8"] == "x" * 8


class Api:
    """A Hub that remembers, and refuses a repository of others."""

    asked: list[tuple] = []

    def create_repo(self, name, private, exist_ok):
        if name.startswith("others/"):
            raise HfHubHTTPError.__new__(HfHubHTTPError, "403")
        self.asked.append(("create", name, private, exist_ok))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.asked.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def at_hand(monkeypatch):
    monkeypatch.setattr(Api, "asked", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(hub, "unreachable", lambda: None)


def test_an_export_goes_to_the_hub_private_and_its_card_names_it(run, tmp_path, at_hand):
    folder = stepdistill.export(run, out=tmp_path / "out", push="me/few-steps")
    create, upload = Api.asked
    assert create == ("create", "me/few-steps", True, True)
    assert (upload == ("upload", "me/few-steps", sorted(path.name for path in folder.iterdir()))
            and "README.md" in upload[2])
    assert 'folder = "me/few-steps"' in (folder / "README.md").read_text()
    hub.push(folder, "me/few-steps", public=True)
    assert Api.asked[2] == ("create", "me/few-steps", False, True)


@pytest.mark.parametrize(("name", "token", "away", "message"), [
    ("few-steps", "t", None, "--push few-steps: should be a repository of the Hub, OWNER/NAME"),
    ("me/few steps", "t", None, "--push me/few steps: "),
    ("me/few-steps", None, None, "there is no token of the Hub here: log in by `hf auth login`, or set HF_TOKEN"),
    ("me/few-steps", "t", "huggingface.co: Name or service not known", "the Hub cannot be asked .* export "
     "without --push")])
def test_what_cannot_go_is_refused_before_anything_is_written(run, tmp_path, at_hand, monkeypatch, name, token,
                                                              away, message):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(hub, "unreachable", lambda: away)
    with pytest.raises(RequestError, match=message):
        stepdistill.export(run, out=tmp_path / "out", push=name)
    assert not (tmp_path / "out").exists() and not Api.asked


def test_a_refusal_of_the_hub_leaves_the_export(run, tmp_path, at_hand):
    with pytest.raises(RequestError, match="--push others/few-steps: the Hub did not take it .* The export "
                       "is whole in"):
        stepdistill.export(run, out=tmp_path / "out", push="others/few-steps")
    assert (tmp_path / "out/stepdistill.json").is_file()
