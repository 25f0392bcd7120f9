"""Plugins: what is imported, what is refused, and what a run remembers of them."""
from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch

import stepdistill
from stepdistill.errors import RequestError
from stepdistill.methods import METHODS, load_method
from stepdistill.methods.base import Method
from stepdistill.methods.trajectory.kd import KD
from stepdistill.models.families import FAMILIES, family_of
from stepdistill.recipe import Recipe, plugins
from stepdistill.recipe.plugins import Folder
from stepdistill.run.checks import check

from .conftest import COMMANDS, FILES

SHORT = {"data.count": 32, "data.batch": 16, "train.updates": 2, "train.warmup": 0, "train.decay": "constant",
         "train.log_every": 1,
         "train.checkpoint_every": 1, "train.ema": None}


def test_the_page_has_a_file_of_each_kind():
    assert {name.split("/")[0] for name in FILES} == {*plugins.REGISTERS, "proofs", "recipes"}
    assert [command[0] for command in COMMANDS] == ["methods", "train", "verify", "bench"]


def test_only_what_a_recipe_asks_for_is_imported(mine):
    (mine / "methods/broken.py").write_text("1 / 0\n")
    recipe = Recipe.load("toy/one_leap", {"plugins": mine})
    assert Recipe.load("toy/one_leap", {"plugins.folder": str(mine)}).resolved() == recipe.resolved()
    package = f"{plugins.PACKAGE}{Folder.open(mine).sha256[:16]}"
    assert {name for name in sys.modules if name.startswith(f"{package}.")} == {f"{package}.methods",
                                                                                f"{package}.methods.one_leap"}
    assert recipe.method_settings().power == 2.0 and load_method("one_leap").data == ("pairs",)
    assert METHODS["one_leap"].needs == ("teacher", "student") and METHODS["one_leap"].steps == (1, 1)
    assert not list(mine.rglob("__pycache__")) and "KandinskyPipeline" not in FAMILIES
    row, = stepdistill.methods("one_leap", mine)
    assert row["title"] == "One leap" and row["family"] == "plugin"
    assert [row["name"] for row in stepdistill.recipes(plugins=mine)][0] == "toy/one_leap"


def test_a_method_of_a_folder_learns_and_goes_on_as_it_began(mine, tmp_path, monkeypatch):
    """Two steps at once, and two with an interruption between, to the last bit; its loss is the one that the page
    states."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    whole = stepdistill.train("toy/one_leap", plugins="mine", out="whole", **SHORT)
    half = stepdistill.train("toy/one_leap", plugins="mine", out="half", **SHORT | {"train.updates": 1})
    shutil.move(mine, tmp_path / "moved")
    stepdistill.train("toy/one_leap", plugins="moved", out="half", resume=True, **SHORT)
    shutil.move(tmp_path / "moved", mine)
    assert (whole / "metrics.jsonl").read_bytes() == (half / "metrics.jsonl").read_bytes()
    said = Recipe.load(whole / "recipe.yaml").plugins
    assert said.folder == str(mine) and said.sha256 == Folder.open(mine).sha256
    assert json.loads((whole / "environment.json").read_text())["plugins"] == {"methods/one_leap": said.sha256}
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    kd = stepdistill.train("toy/kd", out="kd", **SHORT | {"data.pairs.nodes": 4})
    known = json.loads((kd / "metrics.jsonl").read_text().splitlines()[0])
    # kd in one step is the same loss
    assert first["student/leap"] == pytest.approx(known["student/regression"], rel=1e-6)


def test_a_run_wants_the_plugins_that_it_was_begun_with(mine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("toy/one_leap", {"plugins": "mine", **SHORT})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(recipe.dump())
    (mine / "shared.py").write_text("X = 1\n")
    asked = Recipe.load("toy/one_leap", {"plugins": "mine", **SHORT})
    for again in (lambda: stepdistill.train(asked, out="run", resume=True), lambda: Recipe.load("run/recipe.yaml"),
                  lambda: stepdistill.export("run")):
        with pytest.raises(RequestError, match=r"recipe.yaml:\d+: plugins.sha256 is \w{12}..., but the .py files "
                           r"of .*mine are \w{12}.*have changed"):
            again()


@pytest.mark.parametrize(("text", "message"), [
    ("import nowhere_at_all\n", r"one_leap.py:1: cannot be imported: ModuleNotFoundError: No module named "
     r"'nowhere_at_all'"),
    ("x = 1\n\ndef f(:\n", r"one_leap.py:3: cannot be imported: SyntaxError"),
    ("def f():\n    return 1 / 0\n\nf()\n", r"one_leap.py:2: cannot be imported: ZeroDivisionError: division by zero"),
    ("raise SystemExit(3)\n", r"one_leap.py:1: cannot be imported: SystemExit: 3"),
    ("x = 1\n", r"one_leap.py: registers no 'one_leap'; it should call stepdistill.register_method\('one_leap', ...\)"),
    ("import stepdistill\nstepdistill.register_method('lcm', object, title='x')\n",
     r"one_leap.py:2: lcm is a method of stepdistill's own, which is not replaced"),
    ("import stepdistill\nstepdistill.register_method('one_leap', object, title='x')\n",
     r"one_leap.py:2: .* should be a subclass of"),
])
def test_a_plugin_that_fails_is_one_message_with_its_line(mine, text, message):
    (mine / "methods/one_leap.py").write_text(text)
    with pytest.raises(RequestError, match=message):
        Recipe.load("toy/one_leap", {"plugins": str(mine)})


def test_a_whole_method_is_wanted():
    @dataclass(frozen=True)
    class Bare:
        x: int

    whole = {name: vars(KD)[name] for name in ("needs", "inference", "updates")}
    for entries, message in (({}, "lacks inference, needs, updates"), (whole, "lacks Settings, data"),
                             (whole | {"Settings": object, "data": ("pairs",)}, "should be a frozen dataclass"),
                             (whole | {"Settings": Bare, "data": ("pairs",)}, "need a default each"),
                             (whole | {"Settings": KD.Settings, "data": ("films",)},
                              "should be some of images, prompts")):
        with pytest.raises(RequestError, match=message):
            stepdistill.register_method("mine", type("Mine", (Method,), entries), title="x")
    stepdistill.register_method("mine", KD, title="x")
    assert Recipe.load("toy/kd", {"method": "mine"}).method == "mine" and load_method("mine") is KD


def test_names_that_are_there_are_not_replaced(mine, tmp_path):
    shutil.copy(mine / "methods/one_leap.py", mine / "methods/lcm.py")
    with pytest.raises(RequestError, match=r"lcm.py: lcm is there already, and is not replaced"):
        Recipe.load("toy/lcm", {"plugins": str(mine)})
    (mine / "methods/lcm.py").unlink()
    Recipe.load("toy/one_leap", {"plugins": str(mine)})
    other = shutil.copytree(mine, tmp_path / "other")
    (other / "shared.py").write_text("X = 1\n")
    with pytest.raises(RequestError, match=r"one_leap was read from .*mine/methods/one_leap.py in this "
                       r"process already"):
        Recipe.load("toy/one_leap", {"plugins": str(other)})
    for wrong, message in ((tmp_path / "nowhere", "there is no folder of plugins"),
                           (tmp_path, "holds no plugins: expected a file for each name")):
        with pytest.raises(RequestError, match=message):
            Recipe.load("toy/kd", {"plugins": str(wrong)})
    with pytest.raises(RequestError, match="which is no method; did you mean one_leap?"):
        Recipe.load("toy/one_leap", {"plugins": str(mine), "method": "one_leep"})


def test_a_name_from_a_file_of_others_leads_nowhere(mine):
    """A teacher's index names its pipeline's class."""
    (mine / "elsewhere.py").write_text("1 / 0\n")
    folder = Folder.open(mine)
    assert (folder.file("families", "../elsewhere") is None
            and folder.file("families", "StableDiffusionPAGPipeline") is not None)
    plugins.load("families", "../elsewhere", FAMILIES, folder)


def test_a_file_that_changed_is_read_anew(mine):
    Recipe.load("toy/one_leap", {"plugins": str(mine)})
    file = mine / "methods/one_leap.py"
    file.write_text(file.read_text().replace("power: float = 2.0", "power: float = 3.0"))
    assert Recipe.load("toy/one_leap", {"plugins": str(mine)}).method_settings().power == 3.0


def test_an_installed_package_is_asked_for_its_name_alone(mine, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "leaps").mkdir(parents=True)
    shutil.copy(mine / "methods/one_leap.py", site / "leaps/leap.py")
    (site / "leaps/other.py").write_text("1 / 0\n")
    (site / "leaps-1.2.dist-info").mkdir()
    (site / "leaps-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: leaps\nVersion: 1.2\n")
    (site / "leaps-1.2.dist-info/entry_points.txt").write_text("[stepdistill.methods]\none_leap = leaps.leap\nother "
                                                               "= leaps.other\nlcm = leaps.other\n")
    monkeypatch.syspath_prepend(site)
    recipe = Recipe.load(mine / "recipes/toy/one_leap.yaml")
    assert recipe.method_settings().power == 2.0 and recipe.plugins is None and "leaps.other" not in sys.modules
    assert (plugins.mark_of("methods", "one_leap") == "leaps 1.2"
            and load_method("lcm").__module__.startswith("stepdistill."))
    with pytest.raises(RequestError, match=r"leaps/other.py:1: cannot be imported: ZeroDivisionError"):
        Recipe.load(mine / "recipes/toy/one_leap.yaml", {"method": "other"})


def test_a_family_of_a_folder_serves_its_pipeline(mine, tmp_path, tiny_teacher):
    """The conditions and guided answers are those of the family that it builds on, and each call is told its scale."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "pag")
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    recipe = {"method": "lcm", "teacher": str(teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
              "data": {"images": "shapes", "batch": 2},
              "train": {"updates": 1}, "evaluate": {"prompts": ["a red ring"]}}
    with pytest.raises(RequestError, match="is a StableDiffusionPAGPipeline, which has no family here"):
        check(Recipe.load(recipe))
    run = stepdistill.train(recipe, plugins=str(mine), out=tmp_path / "run")
    assert family_of("StableDiffusionPAGPipeline").name == "unet2d_condition"
    folder = stepdistill.export(run)
    assert json.loads((folder / "stepdistill.json").read_text())["teacher_call"]["pag_scale"] == 0.0
    plain = stepdistill.sample(teacher, "a red ring", steps=2, guidance=1.0, plugins=mine)[0]
    known = stepdistill.sample(tiny_teacher, "a red ring", steps=2, guidance=1.0)[0]
    assert plain.tobytes() == known.tobytes()


def test_data_of_a_folder(mine, tmp_path, monkeypatch, tiny_teacher):
    from stepdistill.run.data import captions
    from stepdistill.run.setup import setup
    monkeypatch.chdir(tmp_path)
    plain = {"method": "lcm", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}}, "steps": 2,
             "data": {"images": "squares", "batch": 2},
             "train": {"updates": 1, "seed": 4}, "plugins": "mine"}
    run = setup(Recipe.load(plain), torch.device("cpu"))
    found, ids = captions(run), torch.tensor([4, 0])
    assert found.captions(ids) == ["a green square", "a red square"] and found.count is None
    assert found.pixels(ids).shape == (2, 3, 16, 16) and found.pixels(ids)[0, :, 3, 3].tolist() == [-1, 1, -1]
    assert found.identity == {"plugin": "squares", "code": Folder.open("mine").sha256, "seed": 4, "size": 16}
    prompts = setup(Recipe.load(plain | {"method": "swiftbrush", "steps": 1,
                                         "data": {"prompts": "squares", "batch": 2}}), torch.device("cpu"))
    assert captions(prompts).captions(ids) == found.captions(ids)
    (tmp_path / "squares").mkdir()
    with pytest.raises(RequestError, match="data.images is squares, which a plugin has and .*squares is too"):
        check(Recipe.load(plain))


def test_pictures_that_are_none_are_refused(mine, monkeypatch):
    from stepdistill.data.sources import SOURCES, open_source
    plugins.load("data", "squares", SOURCES, Folder.open(mine))
    source = open_source("squares", None, (4, 6), 0, 9)
    assert source.pixels(torch.arange(2)).shape == (2, 3, 4, 6) and source.count == 9
    monkeypatch.setattr(type(source.source), "pixels", lambda self, indices: torch.full((len(indices), 3, 4, 6), 255.0))
    with pytest.raises(RequestError, match=r"the data squares should give 2 pictures .* in \[-1, 1\]; found \(2, "
                       r"3, 4, 6\) of torch.float32 in \[255, 255\]"):
        source.pixels(torch.arange(2))
    with pytest.raises(RequestError, match="not shapes or none"):
        stepdistill.register_data("shapes", lambda *_: None)
