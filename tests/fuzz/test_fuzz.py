"""Three thousand bad inputs through the command's main function. What is accepted trains.

Every case is drawn by hypothesis from a fixed seed, so that a failure is the same anywhere.
"""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import stepdistill
from stepdistill.recipe import catalogue

from .command import held, run
from .inputs import copied, damage, edited, recipes, spoil

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
TOY = {"method": "lcm", "teacher": "toy", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
       "data": {"images": "toy", "batch": 4}, "train": {"updates": 1}, "evaluate": {"nfe": [1]}}
TINY = {"method": "lcm", "teacher": "teacher", "student": {"lora": {"rank": 2}}, "guidance": 2.0, "steps": 2,
        "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1},
        "evaluate": {"nfe": [1], "prompts": ["a red ring"]}}
PAIRS = {**TOY, "method": "kd", "steps": 1, "guidance": 2.0,
         "data": {"pairs": {"prompts": "toy", "solver": "ddim", "steps": 2, "path": "pairs"}, "count": 6, "batch": 2}}


def cases(count: int):
    """So many, the same each time, none of them tried again in a smaller form."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    phases=(Phase.explicit, Phase.generate),
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def world(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in` with all that commands read, `out` where they write and stand."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_teacher, folder / "in/teacher")
    shutil.copytree(ROOT / "assets/toy", folder / "in/toy")
    (folder / "in/prompts.txt").write_text("a red ring\na blue square\n")
    for i in range(3):
        (folder / "in/pictures").mkdir(exist_ok=True)
        Image.new("RGB", (9, 7 + i), (i, 9, 9)).save(folder / f"in/pictures/{i}.png")
        (folder / f"in/pictures/{i}.txt").write_text(f"picture {i}")
    (folder / "out").mkdir()
    return folder


@pytest.fixture(autouse=True)
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of what is read, so that the words of a recipe name something; the cache lies where is written."""
    monkeypatch.chdir(world / "in")
    monkeypatch.setenv("STEPDISTILL_CACHE", str(world / "out/cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def checked(world: Path, *arguments: object):
    """A command that reads `in` and writes to `out`."""
    before = held(world / "in")
    done = run(*arguments)
    assert held(world / "in") == before, done
    return done


def test_recipes_of_pipelines_are_planned_or_refused(world):
    @cases(900)
    @given(text=recipes(TINY, least=1))
    def case(text):
        path = world / "out/recipe.yaml"
        path.write_text(text)
        checked(world, "plan", path)
    case()


@pytest.mark.parametrize("name", ["toy/lcm", "toy/progressive", "sd15/lcm", "shapes/dmd2", "shapes/kd"])
def test_edited_texts_of_recipes_are_planned_or_refused(world, name):
    whole = catalogue.find(name).read_bytes().replace(b"assets/shapes-sd", b"teacher")

    @cases(160)
    @given(data=edited(whole))
    def case(data):
        path = world / "out/recipe.yaml"
        path.write_bytes(data)
        checked(world, "plan", path)
    case()


def test_bytes_for_recipes_are_refused(world):
    @cases(120)
    @given(data=st.binary(max_size=60))
    def case(data):
        path = world / "out/recipe.yaml"
        path.write_bytes(data)
        assert checked(world, "plan", path).status == 2
    case()


def test_what_is_set_is_planned_or_refused(world):
    path = world / "out/set.yaml"
    path.write_text(json.dumps(TINY))
    names = ("steps", "train.lr", "student", "student.lora.rank", "data.batch", "guidance", "teacher", "stages",
             "settings.nodes", "data", "..", "a.b", "")

    @cases(200)
    @given(name=st.sampled_from(names),
           value=st.one_of(st.text(max_size=9), st.sampled_from(("[1,2]", "{lora: null}", ".nan", "1e400", "[[[[",
                                                                 "&a [*a]", "!!set {a}", "full"))))
    def case(name, value):
        checked(world, "plan", path, "--set", f"{name}={value}")
    case()


def test_recipes_of_toys_train_or_are_refused(world):
    """What is accepted trains: numbers are drawn small, so that it does at once."""
    # mostly what holds, or nothing would train
    some = lambda sound, *unsound: st.sampled_from(sound * 6 + unsound)
    small = st.fixed_dictionaries({
        "method": some(("lcm", "cd", "tcd", "sid", "swiftbrush"), "dmd2", "ladd", "nothing"),
        "steps": some((1, 2, 4), 0, 5),
        "guidance": some((1, 2.0, [1, 3]), 0.5), "student": some(("full", {"lora": {"rank": 1}}),
                                                                 {"lora": {"rank": 0}}),
        "data": some(({"images": "toy", "batch": 4}, {"images": "toy", "batch": 3}), {"images": "toy", "batch": 0},
                     {"prompts": "toy", "batch": 2},
                     {"images": "pictures", "batch": 2}, {"images": "toy", "prompts": "none", "batch": 2},
                     {"batch": 2}),
        "train": st.fixed_dictionaries({"updates": st.integers(1, 2)}, optional={
            "accumulate": some((1,), 2, 3), "ema": some((0.5, 0.9), 1.0), "warmup": st.integers(0, 3),
            "lr": some((1e-4, 1e-30), 1e30),
            "clip": st.sampled_from((None, 1e-9)), "precision": st.sampled_from(("fp32", "bf16")),
            "decay": some(("cosine", "constant"), "none")})})
    trained = []

    @cases(100)
    @given(entries=small)
    def case(entries):
        path, out = world / "out/recipe.yaml", world / "out/run"
        path.write_text(json.dumps(TOY | entries))
        shutil.rmtree(out, ignore_errors=True)
        done = checked(world, "train", path, "--out", out)
        assert (out / "checkpoints").is_dir() == (done.status == 0), done
        trained.append(done.status == 0)
    case()
    assert 10 < sum(trained) < 95


def test_folders_of_teachers_are_planned_or_refused(world):
    path = world / "out/teacher.yaml"
    path.write_text(json.dumps(TINY | {"teacher": str(world / "out/teacher")}))

    @cases(260)
    @given(done=damage(world / "in/teacher"))
    def case(done):
        spoil(copied(world / "in/teacher", world / "out/teacher"), done)
        checked(world, "plan", path)
    case()


def test_folders_of_toys_train_or_are_refused(world):
    path, out = world / "out/teacher.yaml", world / "out/run"
    path.write_text(json.dumps(TOY | {"teacher": str(world / "out/toy"),
                                      "data": {"images": str(world / "out/toy"), "batch": 4}}))

    @cases(100)
    @given(done=damage(world / "in/toy"))
    def case(done):
        spoil(copied(world / "in/toy", world / "out/toy"), done)
        shutil.rmtree(out, ignore_errors=True)
        checked(world, "train", path, "--out", out)
    case()


def test_files_of_prompts_are_read_or_refused(world):
    lines = "a red ring\na blue square\n\n  \u00e9\n".encode()

    @cases(300)
    @given(data=st.one_of(st.binary(max_size=40), edited(lines)))
    def case(data):
        path = world / "out/prompts.txt"
        path.write_bytes(data)
        assert checked(world, "bench", "./nowhere", "--prompts", path, "--out", world / "out/bench").status == 2
    case()


def test_pictures_are_read_or_refused(world):
    """Their headers and captions by `bench`, before anything is loaded."""
    folder = world / "out/pictures"

    @cases(300)
    @given(done=damage(world / "in/pictures"), table=st.one_of(st.none(), st.binary(max_size=30), st.sampled_from((
        b'{"file_name": "0.png", "text": "a"}', b'{"file_name": "../in/pictures/0.png", "text": "a"}',
        b'{"file_name": 1, "text": 2}', b'[1]', b'"', b'null',
        b'{"file_name": "a\\u0000.png", "text": ""}', b'{"file_name": {}, "text": []}', b"[" * 3000))))
    def case(done, table):
        spoil(copied(world / "in/pictures", folder), done)
        if table is not None:
            (folder / "metadata.jsonl").write_bytes(table)
        assert checked(world, "bench", "./nowhere", "--reference", folder, "--out", world / "out/bench").status == 2
    case()


def test_pictures_decode_or_are_refused(world):
    """A run of one update on one picture, of a teacher of one layer."""
    picture = (world / "in/pictures/0.png").read_bytes()
    folder, path = world / "out/pictures", world / "out/recipe.yaml"
    path.write_text(json.dumps(TINY | {"data": {"images": str(folder), "batch": 1}}))

    @cases(24)
    @given(data=st.one_of(edited(picture),
                          st.sampled_from((16, 30, 40, 60)).map(lambda n: picture[:n] + picture[n + 1:])))
    def case(data):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(world / "out/run", ignore_errors=True)
        folder.mkdir()
        (folder / "0.png").write_bytes(data)
        (folder / "0.txt").write_text("a")
        checked(world, "train", path, "--out", world / "out/run")
    case()


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """A Toy run of two updates, with a checkpoint of each."""
    recipe = TOY | {"teacher": str(world / "in/toy"), "data": {"images": str(world / "in/toy"), "batch": 4},
                    "train": {"updates": 2, "checkpoint_every": 1, "log_every": 1}}
    return stepdistill.train(recipe, out=world / "in/run")


def test_folders_of_runs_go_on_or_are_refused(world, finished):
    @cases(90)
    @given(done=damage(finished))
    def case(done):
        folder = copied(finished, world / "out/run")
        spoil(folder, done)
        checked(world, "train", finished / "recipe.yaml", "--out", folder, "--resume")
    case()


def test_folders_of_runs_export_or_are_refused(world, finished):
    @cases(120)
    @given(done=damage(finished, "*.json*"))
    def case(done):
        folder = copied(finished, world / "out/run")
        spoil(folder, done)
        (folder / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes().replace(
            b"lcm", random.Random(repr(done)).choice((b"lcm", b"kd", b"\xff"))))
        checked(world, "export", folder, "--out", world / "out/exported")
    case()


def test_folders_of_exports_sample_or_are_refused(world, tiny_teacher):
    made = stepdistill.export(stepdistill.train(TINY | {"teacher": str(tiny_teacher)}, out=world / "in/of-export"),
                              out=world / "in/export")

    @cases(160)
    @given(done=damage(made))
    def case(done):
        folder = copied(made, world / "out/export")
        spoil(folder, done)
        checked(world, "sample", folder, "--prompt", "a red ring", "--out", world / "out/sample.png")
    case()


def test_caches_are_made_again_or_refused(world):
    path = world / "out/pairs.yaml"
    path.write_text(json.dumps(PAIRS))
    run("pairs", path, "--out", world / "in/pairs")

    @cases(90)
    @given(done=damage(world / "in/pairs"))
    def case(done):
        folder = copied(world / "in/pairs", world / "out/pairs")
        spoil(folder, done)
        checked(world, "pairs", path, "--out", folder)
    case()
