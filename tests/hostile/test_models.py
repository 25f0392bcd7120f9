"""Folders, weights and configs that somebody made to do harm: each is refused, and nothing of it runs."""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import stepdistill
from stepdistill.errors import RequestError
from stepdistill.evaluation.features import load_features
from stepdistill.export import open_export
from stepdistill.models.fused import load_lora
from stepdistill.models.sources import FusedLora, Source, index_at
from stepdistill.models.teacher import load_teacher
from stepdistill.models.vision import VisionConfig
from stepdistill.training import checkpoints

from ..tiny import tiny_pipeline
from . import world as w
from .conftest import RECIPE

UNET, WEIGHTS = "unet/diffusion_pytorch_model", "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
LORA = "pytorch_lora_weights.safetensors"


def only(path: str, name: str, make=w.torched):
    """In place of a component's weights this file alone."""
    def spoil(world: Path) -> None:
        (world / "teacher" / path).unlink()
        (world / "teacher" / path).with_name(name).write_bytes(make(world))
    return spoil


def weights(data, path: str = f"{UNET}.safetensors"):
    return lambda world: (world / "teacher" / path).write_bytes(data(world) if callable(data) else data)


def config(path: str, **entries):
    return lambda world: w.edited(world / "teacher" / path, **entries)


def text(path: str, what: str):
    return lambda world: (world / "teacher" / path).write_text(what)


def linked(path: str, to: str = "outside"):
    """A file, or a folder, moved out of the teacher and linked back."""
    def spoil(world: Path) -> None:
        (world / to).mkdir(exist_ok=True)
        place, moved = world / "teacher" / path, world / to / Path(path).name
        shutil.move(place, moved)
        place.symlink_to(moved)
    return spoil


def sharded(name: str):
    def spoil(world: Path) -> None:
        folder = world / "teacher/unet"
        shutil.copy(folder / f"{WEIGHTS}.safetensors", world / "outside.safetensors")
        keys = w.load_file(folder / f"{WEIGHTS}.safetensors")
        (folder / f"{WEIGHTS}.safetensors").rename(folder / f"{WEIGHTS}-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))
    return spoil


def code(world: Path) -> None:
    (world / "teacher/pipeline.py").write_text(f"import os\nos.system('touch {world / w.MARK}')\n")


TEACHERS = {
    # pickles, whatever they are called
    "denoiser as .bin": (only(f"{UNET}.safetensors", f"{WEIGHTS}.bin"), "is a pickle or may hold one"),
    "denoiser as .pt": (only(f"{UNET}.safetensors", "model.pt", w.pickled), "is a pickle or may hold one"),
    "denoiser as .ckpt": (only(f"{UNET}.safetensors", "model.ckpt", w.pickled), "is a pickle or may hold one"),
    "encoder as pytorch_model.bin": (only("text_encoder/model.safetensors", "pytorch_model.bin"),
                                     "is a pickle or may hold one"),
    "encoder as flax": (only("text_encoder/model.safetensors", "flax_model.msgpack"), "is a pickle or may hold one"),
    "codec as .bin": (only("vae/diffusion_pytorch_model.safetensors", f"{WEIGHTS}.bin"), "is a pickle or may hold one"),
    "codec of a variant as .bin": (only("vae/diffusion_pytorch_model.safetensors", f"{WEIGHTS}.fp16.bin"),
                                   "is a pickle or may hold one"),
    "pickle renamed": (weights(w.pickled), "is no safetensors file but a pickle"),
    "archive renamed": (weights(w.torched), "is no safetensors file but a zip archive"),
    "encoder's pickle renamed": (weights(w.torched, "text_encoder/model.safetensors"),
                                 "is no safetensors file but a zip archive"),
    "codec's pickle renamed": (weights(w.pickled, "vae/diffusion_pytorch_model.safetensors"),
                               "is no safetensors file but a pickle"),
    "compressed": (weights(b"\x1f\x8b" + b"\0" * 100), "is no safetensors file but a compressed archive"),
    "numpy renamed": (weights(b"\x93NUMPY" + b"\0" * 100), "is no safetensors file but a NumPy file"),
    "vocabulary as a pickle": (lambda world: (world / "teacher/tokenizer/vocab.pkl").write_bytes(w.pickled(world)),
                               "is a pickle or may hold one"),
    # headers of safetensors
    "header of 2**63 bytes": (weights(w.header(2**63)), "no safetensors file by its first bytes"),
    "header of 2**64 - 1 bytes": (weights(w.header(2**64 - 1)), "no safetensors file by its first bytes"),
    "header longer than the file": (weights(w.header(10_000)), "no safetensors file by its first bytes"),
    "header of nothing": (weights(w.header(0)), "no safetensors file by its first bytes"),
    "no header": (weights(b""), "no safetensors file by its first bytes"),
    "header that is no JSON": (weights(w.whole(b"{" * 100)), "damaged or cut short"),
    "header nested deeply": (weights(w.whole(b'{"a":' * 5000)), "damaged or cut short"),
    "offsets beyond the file": (weights(w.whole({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
                                "damaged or cut short"),
    "offsets backwards": (weights(w.whole({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4)),
                          "damaged or cut short"),
    "shape that overflows": (weights(w.whole({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}},
                                             b"\0" * 4)), "damaged or cut short"),
    "tensors over each other": (weights(w.whole({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
                                                 for n in "ab"}, b"\0" * 4)), "damaged or cut short"),
    "unknown dtype": (weights(w.whole({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4)),
                      "damaged or cut short"),
    # code
    "auto_map of the denoiser": (config("unet/config.json", auto_map={"AutoModel": "evil.Model"}),
                                 "names code: auto_map"),
    "auto_map of the encoder": (config("text_encoder/config.json", auto_map={"AutoModel": "evil.Model"}),
                                "names code: auto_map"),
    "auto_map of the tokenizer": (config("tokenizer/tokenizer_config.json",
                                         auto_map={"AutoTokenizer": ["evil.T", None]}), "names code: auto_map"),
    "auto_map of the scheduler": (config("scheduler/scheduler_config.json", auto_map={"AutoScheduler": "evil.S"}),
                                  "names code: auto_map"),
    "auto_map of a part": (config("text_encoder/config.json", text_config={"auto_map": {"AutoModel": "evil.M"}}),
                           "names code: auto_map"),
    "trust_remote_code": (config("text_encoder/config.json", trust_remote_code=True), "names code: trust_remote_code"),
    "custom pipeline": (config("model_index.json", custom_pipeline="evil/pipeline"), "names code: custom_pipeline"),
    "class of a file beside "
    "it": (lambda world: (code(world), config("model_index.json", _class_name=["pipeline", "Evil"])(world)),
           "code beside the pipeline"),
    "class by a path": (config("model_index.json", _class_name="os.system"), "names the class 'os.system'"),
    "class by a file": (config("model_index.json", _class_name="../pipeline"), r"names the class '\.\./pipeline'"),
    "class of a network by a path": (config("unet/config.json", _class_name="builtins.exec"),
                                     "names the class 'builtins.exec'"),
    "class of a scheduler by a path": (config("scheduler/scheduler_config.json", _class_name="subprocess.Popen"),
                                       "names the class"),
    "component of a module": (config("model_index.json", unet=["os", "system"]),
                              "code beside the pipeline and is never run"),
    "component of a module in a package": (config("model_index.json", unet=["os.path", "join"]),
                                           "a component is a name with a library and a class"),
    "component of no pipeline": (config("model_index.json", extra=["subprocess", "Popen"]),
                                 "code beside the pipeline and is never run"),
    "safety checker of a module": (config("model_index.json", safety_checker=["shutil", "rmtree"]),
                                   "code beside the pipeline and is never run"),
    "component that is a function": (config("model_index.json", unet=["transformers", "pipeline"]),
                                     "does not have as a class"),
    "component that is a module": (config("model_index.json", unet=["diffusers", "utils"]), "does not have as a class"),
    "component that trains": (config("model_index.json", unet=["transformers", "Trainer"]), "does not have as a class"),
    "network that is a scheduler": (config("model_index.json", unet=["diffusers", "DDIMScheduler"]),
                                    "which is not served"),
    "scheduler that is a network": (config("model_index.json", scheduler=["diffusers", "UNet2DModel"]),
                                    "no scheduler|cannot be|of its scheduler has no config.json"),
    "attention of the Hub": (config("text_encoder/config.json", attn_implementation="evil/kernel"),
                             "names code: attn_implementation"),
    # paths
    "component above": (config("model_index.json", **{"../unet": ["diffusers", "UNet2DConditionModel"]}),
                        "is a name with a library and a class|no slashes"),
    "component at a root": (config("model_index.json", **{"/etc": ["diffusers", "UNet2DConditionModel"]}),
                            "is a name with a library and a class|no slashes"),
    "weights linked out": (linked(f"{UNET}.safetensors"), "is a link that leads out of"),
    "component linked out": (linked("unet"), "is a link that leads out of"),
    "config linked out": (linked("vae/config.json"), "is a link that leads out of"),
    "scheduler linked out": (linked("scheduler/scheduler_config.json"), "is a link that leads out of"),
    "index linked out": (linked("model_index.json"), "is a link that leads out of"),
    "shards above": (sharded("../../outside.safetensors"), "which is no name of something in that folder"),
    "shards at a root": (sharded("/etc/passwd"), "which is no name of something in that folder"),
    "shards that are pickles": (sharded("model.bin"), "which is no safetensors file"),
    "shards of nothing": (lambda world: (world / "teacher/unet" / INDEX).write_text('{"weight_map": ["a"]}'),
                          "weight_map is no table"),
    # sizes and depths
    "config nested deeply": (text("unet/config.json", "[" * 200_000), "is damaged: it is nested too deeply"),
    "config of 5 MB": (text("unet/config.json", '{"a": "' + "x" * 5_000_000 + '"}'), "such a file has at most"),
    "index of 5 MB": (text("model_index.json", '{"a": "' + "x" * 5_000_000 + '"}'), "such a file has at most"),
    "number of 100,000 digits": (text("unet/config.json", '{"in_channels": ' + "9" * 100_000 + "}"), "is damaged"),
    "config that is a list": (text("vae/config.json", "[]"), "holds a list where a table should be"),
    "config that is no text": (lambda world: (world / "teacher/unet/config.json").write_bytes(b"\xff\xfe\x00"),
                               "is damaged"),
    # what a teacher's calls are given
    "call with a callback": (text("stepdistill.json", '{"call": {"callback_on_step_end": "os.system"}}'),
                             "gives every call of this pipeline callback_on_step_end"),
    "call with a pipeline": (text("stepdistill.json", '{"call": {"custom_pipeline": "evil"}}'),
                             "gives every call of this pipeline custom_pipeline"),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_hostile_teachers_are_refused(world, name):
    spoil, message = TEACHERS[name]
    spoil(world)
    for device in (None, "meta"):                                     # train, sample and plan
        with pytest.raises(RequestError, match=message):
            load_teacher(world / "teacher", device=device)
    assert not (world / w.MARK).exists()


@pytest.mark.parametrize("name", [name for name in TEACHERS if "call with" not in name
                                  and "which is not served" not in TEACHERS[name][1]])
def test_they_are_refused_as_targets_too(world, name):
    spoil, _ = TEACHERS[name]
    spoil(world)
    with pytest.raises(RequestError):
        stepdistill.sample(world / "teacher", "a red ring", steps=1)
    assert not (world / w.MARK).exists()


def test_pickles_beside_safetensors_are_left_alone(world):
    for path in (f"{UNET}.bin", "text_encoder/pytorch_model.bin", "vae/diffusion_pytorch_model.bin"):
        (world / "teacher" / path).write_bytes(w.pickled(world))
    assert load_teacher(world / "teacher").name and not (world / w.MARK).exists()


def test_a_link_within_a_folder_is_no_way_out(world):
    folder = world / "teacher/unet"
    (folder / f"{WEIGHTS}.safetensors").rename(folder / "held.safetensors")
    (folder / f"{WEIGHTS}.safetensors").symlink_to("held.safetensors")
    assert index_at(Source(str(world / "teacher")))["_class_name"] == "StableDiffusionPipeline"


def test_the_caches_links_are_no_way_out(world):
    """models--owner--name/snapshots/COMMIT/... are links to models--owner--name/blobs."""
    snapshot, blobs = world / "models--a--b/snapshots/0123", world / "models--a--b/blobs"
    shutil.copytree(world / "teacher", snapshot)
    blobs.mkdir()
    file = snapshot / f"{UNET}.safetensors"
    shutil.move(file, blobs / "cafe")
    file.symlink_to("../../../blobs/cafe")
    assert index_at(Source(str(snapshot)))["_class_name"] == "StableDiffusionPipeline"
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(RequestError, match="leads out of"):
        index_at(Source(str(snapshot)))


# -- LoRAs -------------------------------------------------------------------------------------------------------------

def lora_file(data):
    def make(world: Path) -> str:
        (world / "mine.safetensors").write_bytes(data(world) if callable(data) else data)
        return "mine.safetensors"
    return make


def lora_named(name: str):
    def make(world: Path) -> str:
        (world / name).write_bytes(w.torched(world))
        return name
    return make


def lora_folder(*names: str):
    def make(world: Path) -> str:
        (world / "folder").mkdir()
        for name in names:
            (world / "folder" / name).write_bytes(w.torched(world))
        return "folder"
    return make


def lora_linked(world: Path) -> str:
    w.lora(world / "outside/lora.safetensors")
    (world / "folder").mkdir()
    (world / "folder" / LORA).symlink_to(world / "outside/lora.safetensors")
    return "folder"


def lora_with_code(world: Path) -> str:
    (world / "evilmodule.py").write_text(f"open({str(world / w.MARK)!r}, 'w').close()\n")
    said = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"], "unet.megatron_config": {"a": 1},
            "unet.megatron_core": "evilmodule"}
    return str(w.lora(world / "mine.safetensors", said))


LORAS = {
    "a pickle": (lora_named("lora.bin"), "is no .safetensors file"),
    "a checkpoint": (lora_named("lora.ckpt"), "is no .safetensors file"),
    "a pickle without a suffix": (lora_named("mine"), "is no .safetensors file"),
    "a pickle renamed": (lora_file(w.pickled), "is no safetensors file but a pickle"),
    "an archive renamed": (lora_file(w.torched), "is no safetensors file but a zip archive"),
    "a long header": (lora_file(w.header(2**40)), "no safetensors file by its first bytes"),
    "a folder of a pickle": (lora_folder("pytorch_lora_weights.bin"), "found none: name the file"),
    "a folder of a renamed pickle": (lora_folder(LORA), "is no safetensors file but a zip archive"),
    "a link out of its folder": (lora_linked, "is a link that leads out of"),
    "code in its header": (lora_with_code, "names code in its header: unet.megatron_config"),
    "a Hub id that climbs": (lambda world: "owner/../../etc", "there is no LoRA"),
    "a Hub id with a file that climbs": (lambda world: "owner/../x.safetensors", "there is no LoRA"),
    "a pickle of the Hub": (lambda world: "owner/name/lora.bin", "is no .safetensors file"),
}


@pytest.mark.parametrize("name", LORAS)
def test_hostile_loras_are_refused(world, name, monkeypatch):
    make, message = LORAS[name]
    monkeypatch.syspath_prepend(str(world))
    with pytest.raises(RequestError, match=message):
        load_lora(tiny_pipeline(), FusedLora(make(world)))
    assert not (world / w.MARK).exists() and "evilmodule" not in sys.modules


@pytest.mark.parametrize("entry", ["teacher", "student"])
def test_a_recipe_with_a_hostile_lora_is_refused(world, entry):
    path = str(w.lora(world / "mine.safetensors"))
    Path(path).write_bytes(w.torched(world))
    teacher = str(world / "teacher")
    changed = ({"teacher": {"base": teacher, "loras": [path]}} if entry == "teacher"
               else {"teacher": teacher, "student": {"from": path}})
    with pytest.raises(RequestError, match="is no safetensors file but a zip archive"):
        stepdistill.plan(RECIPE | {"data": {"images": "shapes", "batch": 2}} | changed)
    assert not (world / w.MARK).exists()


# -- components of elsewhere, networks of features ---------------------------------------------------------------------

@pytest.mark.parametrize(("entries", "spoil", "message"), [
    ({"vae": "teacher/vae"}, weights(w.torched, "vae/diffusion_pytorch_model.safetensors"),
     "is no safetensors file but a zip archive"),
    ({"vae": "teacher/vae"}, config("vae/config.json", auto_map={"AutoModel": "evil.Model"}), "names code: auto_map"),
    ({"vae": "teacher/vae"}, only("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
     "is a pickle or may hold one"),
    ({"scheduler": "teacher"}, config("scheduler/scheduler_config.json", _class_name="os.system"),
     "names the class 'os.system'"),
    ({"scheduler": "teacher/scheduler"}, config("scheduler/scheduler_config.json", _class_name="UNet2DModel"),
     "no scheduler of diffusers"),
    ({"scheduler": "teacher/scheduler"}, linked("scheduler/scheduler_config.json"), "leads out of"),
    ({"subfolder": "../teacher"}, lambda world: None, "subfolder is ../teacher, which leads out of"),
    ({"subfolder": "/etc"}, lambda world: None, "subfolder is /etc, which leads out of"),
    ({"variant": "../../x"}, lambda world: None, "variant is '../../x', which is no such name"),
    ({"revision": "../../x"}, lambda world: None, "revision is '../../x', which is no such name"),
    ({"revision": "a\n[x](y)"}, lambda world: None, "revision is 'a"),
])
def test_hostile_parts_of_a_teacher_are_refused(world, entries, spoil, message):
    shutil.copytree(world / "teacher", world / "base")
    spoil(world)
    given = {name: str(world / value) if name in ("vae", "scheduler") else value for name, value in entries.items()}
    with pytest.raises(RequestError, match=message):
        load_teacher(Source(str(world / "base"), **given))
    assert not (world / w.MARK).exists()


def vision(world: Path) -> Path:
    return Path(shutil.copytree(Path(__file__).parents[2] / "assets/shapes-clip", world / "clip"))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda folder, world: w.edited(folder / "config.json", auto_map={"AutoModel": "evil.Model"}),
     "names code: auto_map"),
    (lambda folder, world: (folder / "model.safetensors").write_bytes(w.torched(world)),
     "is no safetensors file but a zip archive"),
    (lambda folder, world: (folder / "config.json").write_text("[" * 100_000), "nested too deeply"),
    (lambda folder, world: w.edited(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.P"}),
     "names code: auto_map"),
    (lambda folder, world: ((folder / "model.safetensors").unlink(),
                            (folder / "model.safetensors").symlink_to("/etc/hostname")), "leads out of"),
])
def test_hostile_networks_of_features_are_refused(world, spoil, message):
    folder = vision(world)
    spoil(folder, world)
    for open_ in (VisionConfig.of, load_features):
        with pytest.raises(RequestError, match=message):
            open_(str(folder))
    assert not (world / w.MARK).exists()


def test_a_vision_network_of_pickles_is_refused(world):
    folder = vision(world)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(w.torched(world))
    with pytest.raises(RequestError, match="is a pickle or may hold one"):
        VisionConfig.of(str(folder))


# -- exports and runs --------------------------------------------------------------------------------------------------

def said(**entries):
    return lambda world: w.edited(world / "export/stepdistill.json", **entries)


def export_file(name: str, data):
    return lambda world: (world / "export" / name).write_bytes(data(world) if callable(data) else data)


def export_linked(world: Path) -> None:
    shutil.move(world / "export" / LORA, world / LORA)
    (world / "export" / LORA).symlink_to(world / LORA)


EXPORTS = {
    "weights above": (said(weights="../run/x.safetensors"), "no slashes and no"),
    "weights at a root": (said(weights="/etc/passwd"), "no slashes and no"),
    "weights that are a pickle": (lambda world: (said(weights="lora.bin", schema=1)(world),
                                                 export_file("lora.bin", w.torched)(world)), "no .safetensors file"),
    "weights renamed": (export_file(LORA, w.torched), "is no safetensors file but a zip archive"),
    "weights linked out": (export_linked, "leads out of"),
    "weights exchanged": (lambda world: shutil.copy(world / "lora" / LORA, world / "export" / LORA), "is another file"),
    "pipeline by a path": (said(pipeline="os.system"), "does not have"),
    "pipeline that is a function": (said(pipeline="logging"), "does not have"),
    "pipeline that is a network": (said(pipeline="UNet2DModel"), "is no pipeline"),
    "scheduler by a path": (lambda world: w.edited(world / "export/scheduler/scheduler_config.json",
                                                   _class_name="os.system"), "names the class 'os.system'"),
    "scheduler that is a network": (lambda world: w.edited(world / "export/scheduler/scheduler_config.json",
                                                           _class_name="UNet2DModel"), "no scheduler"),
    "a scheduler linked out": (lambda world: ((world / "export/scheduler/scheduler_config.json").rename(world
                                                                                                        / "s.json"),
                                              (world / "export/scheduler/scheduler_config.json").symlink_to(
                                                  world / "s.json")), "leads out of"),
    "an adapter with code": (lambda world: (world / "export/adapter_config.json").write_text(
        '{"megatron_config": {"a": 1}, "megatron_core": "evil"}'),
                             "names code: megatron_config"),
    "parts of a teacher by other names": (said(teacher_parts={"__class__": "x"}), "teacher_parts"),
    "a teacher's revision that climbs": (said(revision="../../x"), "which is no such name"),
    "a teacher's subfolder that climbs": (said(teacher_parts={"subfolder": "../export"}), "leads out of"),
    "settings nested deeply": (lambda world: (world / "export/stepdistill.json").write_text("[" * 100_000),
                               "nested too deeply"),
    "settings of 70 MB": (lambda world: (world / "export/stepdistill.json").write_text('{"a": "' + "x" * 70_000_000
                                                                                       + '"}'), "has at most"),
    "a call with a callback": (said(call={"callback_on_step_end": "os.system"}), "callback_on_step_end"),
    "a call with a file": (said(call={"num_inference_steps": 2, "ip_adapter_image": "/etc/passwd"}),
                           "ip_adapter_image"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_hostile_exports_are_refused(world, name):
    spoil, message = EXPORTS[name]
    spoil(world)
    with pytest.raises(RequestError, match=message):
        stepdistill.sample(world / "export", "a red ring")
    assert not (world / w.MARK).exists()


def checkpoint(world: Path) -> Path:
    return checkpoints.latest(world / "run")


def listing(**sums):
    def spoil(world: Path) -> None:
        folder = checkpoint(world)
        table = json.loads((folder / "checksums.json").read_text())
        (folder / "checksums.json").write_text(json.dumps(table | {"sha256": table["sha256"] | sums}))
    return spoil


def taken_for(name: str, data):
    """A file of a checkpoint with another's bytes and their right checksum."""
    def spoil(world: Path) -> None:
        (checkpoint(world) / name).write_bytes(data(world))
        listing(**{name: checkpoints.checksum(checkpoint(world) / name)})(world)
    return spoil


def checkpoint_linked(world: Path) -> None:
    file = checkpoint(world) / "role-student.safetensors"
    shutil.move(file, world / "student.safetensors")
    file.symlink_to(world / "student.safetensors")


RUNS = {
    "an optimizer that is a pickle": (taken_for("optimizer.bin", w.torched),
                                      "optimizer.bin, which is no safetensors file"),
    "a role that is a pickle": (taken_for("role-student.pt", w.pickled),
                                "role-student.pt, which is no safetensors file"),
    "a renamed pickle with its checksum": (taken_for("role-student.safetensors", w.torched),
                                           "is no safetensors file but a zip archive"),
    "a renamed pickle of an optimizer": (taken_for("optimizer-student.safetensors", w.pickled),
                                         "is no safetensors file but a pickle"),
    "a file above": (listing(**{"../../recipe.yaml": "0"}), "which is no safetensors file of its folder"),
    "a file at a root": (listing(**{"/etc/passwd": "0"}), "which is no safetensors file of its folder"),
    "a link out": (checkpoint_linked, "leads out of"),
    "checksums nested deeply": (lambda world: (checkpoint(world) / "checksums.json").write_text("[" * 100_000),
                                "nested too deeply"),
    "a long header": (taken_for("role-student.safetensors", lambda world: w.header(2**63)),
                      "no safetensors file by its first bytes"),
}


@pytest.mark.parametrize("name", RUNS)
def test_hostile_checkpoints_are_refused(world, name):
    spoil, message = RUNS[name]
    spoil(world)
    with pytest.raises(RequestError, match=message):
        checkpoints.newest(world / "run", checkpoints.load)
    assert not (world / w.MARK).exists()


def test_a_sound_export_still_opens(world):
    assert open_export(world / "export")[1]["num_inference_steps"] == 2
    assert os.path.isdir(world / "run")
