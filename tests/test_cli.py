"""The commands as a shell sees them: status, output, and how soon they answer."""
from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stepdistill.cli import answer, spelled
from stepdistill.errors import RequestError
from stepdistill.methods import METHODS
from stepdistill.recipe import catalogue
from stepdistill.training.stopping import SIGNALS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("args", [("--help",), ("methods",), ("recipes",), ("train", "--help"), ("methods", "lcm")])
def test_answers_without_torch(args):
    """The heavy imports are what costs seconds; a second is allowed, on a slow machine too."""
    code = ("import sys, runpy\nsys.argv[0] = 'stepdistill'\n"
            "try: runpy.run_module('stepdistill', run_name='__main__')\n"
            "finally: print([m for m in ('torch', 'diffusers', 'numpy', 'matplotlib') if m in sys.modules], "
            "file=sys.stderr)")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0 and done.stderr.strip().endswith("[]"), done.stderr
    assert seconds < 3        # generous to a busy machine; about 0.2 s on an idle one


def test_methods_as_json(stepdistill):
    rows = json.loads(stepdistill("methods", "--json").stdout)
    assert [set(row) for row in rows] == [{"name", "title", "arxiv", "family", "needs", "data", "steps"}] * len(rows)
    assert "lcm" in [row["name"] for row in rows]


def test_one_method_in_full(stepdistill):
    output = stepdistill("methods", "lcm").stdout
    assert "2310.04378" in output and "nodes: int = 50" in output and "Luo et al. 2023" in output


def test_a_method_in_full_has_the_whole_comment_of_its_last_setting():
    output = catalogue.algorithm("lightning").splitlines()
    assert (output[-2].startswith("    discriminator_times: ") and output[-1].lstrip().startswith("# ")
            and "the first five times over" in output[-1])
    assert all(line.startswith("    ") for name in METHODS
               for line in catalogue.algorithm(name).split("settings:\n")[1].splitlines())


def test_recipes_as_json(stepdistill):
    rows = {row["name"]: row for row in json.loads(stepdistill("recipes", "--json").stdout)}
    assert rows["shapes/lcm"] == {"name": "shapes/lcm", "path": str(ROOT / "recipes/shapes/lcm.yaml"), "method": "lcm",
                                  "teacher": "assets/shapes-sd"}
    assert stepdistill("recipes", "shapes/lcm").stdout == (ROOT / "recipes/shapes/lcm.yaml").read_text()


@pytest.mark.parametrize(("args", "message"), [
    (("trian",), "Did you mean 'train'"),
    (("methods", "lcn"), "did you mean lcm?"),
    (("recipes", "shapes/lcmm"), "did you mean shapes/lcm?"),
    (("train", "nowhere.yaml"), "there is no recipe"),
    (("train", "shapes/lcm", "--set", "stpes=2"), "did you mean steps?"),
    (("train", "shapes/lcm", "--set", "steps"), "a name and a value"),
    (("train", "shapes/lcm", "--set", "teacher=./nowhere"), "there is no pipeline at './nowhere'"),
    (("bench", "nowhere", "--nfe", "1,zwei"), "such as 1,2,4,8"),
    (("bench", "nowhere", "--nfe", "0"), "such as 1,2,4,8"),
    (("bench", "nowhere", "--guidance", "1,nan"), "--guidance 1,nan: should be finite numbers of at least 1"),
    (("sample", "nowhere", "--prompt", "a", "--guidance", "nan"), "--guidance nan: should be a finite number, "
     "such as 3.0"),
    (("export", "nowhere", "--guidance", "inf"), "--guidance inf: should be a finite number, such as 3.0"),
])
def test_a_bad_request_is_one_message_and_status_2(stepdistill, args, message):
    done = stepdistill(*args)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


# -- with a real, tiny teacher -----------------------------------------------------------------------------------------

RECIPE = """\
method: lcm
teacher: {teacher}
student: {{lora: {{rank: 2}}}}
guidance: 2.0
steps: 2
data: {{images: shapes, batch: 4}}
train: {{updates: 2, ema: 0.5, checkpoint_every: 1, log_every: 1}}
evaluate: {{prompts: [a red ring]}}
"""
SMALL = ("--set", "train.updates=1")


@pytest.fixture
def recipe(tmp_path: Path, tiny_teacher: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(teacher=tiny_teacher))
    return path


def test_train_sample_export(stepdistill, recipe, tmp_path):
    """The commands in the order in which a newcomer types them."""
    done = stepdistill("train", recipe, "--out", "a run", "--json", "--set", "train.updates=1")
    found = json.loads(done.stdout)
    assert found["next"] == "stepdistill export 'a run' --to lora" and (tmp_path / found["log"]).is_file(), done.stderr
    done = stepdistill("train", recipe, "--out", "run")
    assert done.returncode == 0 and "next: stepdistill export run --to lora" in done.stdout, done.stderr
    run = tmp_path / "run"
    assert ({"recipe.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "checkpoints", "samples"}
            <= {p.name for p in run.iterdir()})
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]

    again = stepdistill("train", recipe, "--out", "run")
    assert again.returncode == 2 and "--resume" in again.stderr, again.stderr
    resumed = stepdistill("train", recipe, "--out", "run", "--resume", "--set", "data.batch=2")
    assert resumed.returncode == 2 and "data.batch was 4, now 2" in resumed.stderr, resumed.stderr

    done = stepdistill("sample", "run", "--prompt", "a red ring", "--prompt", "a blue cross", "--steps", 2,
                       "--out", "s.png")
    assert done.returncode == 0 and (tmp_path / "s.png").stat().st_size, done.stderr
    done = stepdistill("export", "run", "--to", "lora", "--out", "lora", "--json")
    assert json.loads(done.stdout)["folder"] == "lora" and (
        tmp_path / "lora/pytorch_lora_weights.safetensors").is_file(), done.stderr
    done = stepdistill("sample", "lora", "--prompt", "a red ring", "--prompt", "a blue cross", "--steps", 2, "--out",
                       "t.png", "--json")
    assert json.loads(done.stdout) == {"picture": "t.png", "prompts": ["a red ring", "a blue cross"], "size": [16, 16],
                                       "seed": 0}, done.stderr
    one, other = (np.array(Image.open(tmp_path / name)).astype(int) for name in ("s.png", "t.png"))
    assert one.shape == other.shape and abs(one - other).max() <= 1        # a merged adapter rounds differently


@pytest.mark.parametrize(("change", "message"), [
    ("student={lora: {rank: 2, targets: [to_qq]}}", "to_q"),
    ("steps=51", "50"),
    ("data.batch=0", "at least 1"),
    ("critic=full", "critic"),
])
def test_what_cannot_work_is_refused_before_training(stepdistill, recipe, tmp_path, change, message):
    done = stepdistill("train", recipe, "--out", "run", "--set", change)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_damaged_teachers_are_refused(stepdistill, recipe, tmp_path, tiny_teacher):
    (tmp_path / "empty").mkdir()
    assert ("model_index.json" in (done := stepdistill("train", recipe, "--set", "teacher=empty")).stderr
            and done.returncode == 2)
    shutil.copytree(tiny_teacher, tmp_path / "cut")
    weights = tmp_path / "cut/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = stepdistill("train", recipe, "--set", "teacher=cut")
    assert (done.returncode == 2 and "diffusion_pytorch_model.safetensors" in done.stderr
            and "Traceback" not in done.stderr)


@pytest.mark.long
def test_pairs_are_made_once_and_others_are_refused_with_the_command_that_makes_the_right_ones(stepdistill,
                                                                                               tmp_path, recipe):
    text = recipe.read_text().replace("images: shapes", "pairs: {prompts: [a red ring], solver: ddim, steps: "
                                      "2}, count: 4")
    recipe.write_text(text)
    made, again = (stepdistill("pairs", recipe, "--out", "named") for _ in range(2))
    assert made.returncode == 0 and "4 of 4 pairs made in" in made.stdout and f"{Path('named')}" in made.stdout, (
        made.stderr)
    assert "4 pairs are there already" in again.stdout
    asked = ("--set", "data.pairs.guidance=3.0", "--set", "data.pairs.path=named", "--out", "run")
    refused = stepdistill("train", recipe, *asked)
    assert (refused.returncode == 2 and "made_by.guidance is 2.0 there and 3.0 here" in refused.stderr
            and not (tmp_path / "run").exists())
    command = shlex.split(refused.stderr.split("`")[1].replace("FOLDER", "right"))
    assert command[0] == "stepdistill" and stepdistill(*command[1:]).returncode == 0
    done = stepdistill("train", recipe, *asked, "--set", "data.pairs.path=right", *SMALL)
    assert done.returncode == 0 and (tmp_path / "run/checkpoints/step-000001").is_dir(), done.stderr


def test_resume_is_a_switch_and_auto_a_choice():
    assert spelled(["train", "r", "--resume", "auto", "--out", "x"]) == ["train", "r", "--resume-auto", "--out", "x"]
    assert spelled(["train", "r", "--resume=auto"]) == ["train", "r", "--resume-auto"]
    assert spelled(["train", "--resume", "auto.yaml"]) == ["train", "--resume", "auto.yaml"] and spelled([]) == []


@pytest.mark.parametrize(("error", "status", "message"), [
    (PermissionError(13, "Permission denied", "/etc/x"), 2, "no permission for '/etc/x': name a folder that may "
     "be written"),
    (OSError(30, "Read-only file system", "/cdrom/x"), 2, "'/cdrom/x' lies on a disk that can only be read"),
    (OSError(36, "File name too long", "a" * 300), 2, "is too long for this file system"),
    (OSError(28, "No space left on device", "x"), 1, "the disk is full ('x'); what was saved before is whole"),
    (NotADirectoryError(20, "Not a directory", "file/x"), 2, "'file/x' is in the way"),
    (OSError("We couldn't connect to the Hub"), 2, "We couldn't connect to the Hub"),
    (MemoryError(), 2, "there is not enough memory: MemoryError"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 4 bytes"), 2, "not enough memory"),
    (RequestError("in \x1b]0;pwned\x07 '[bold]x'"), 2, r"in \x1b]0;pwned\x07 '[bold]x'")])
def test_errors_of_the_system_are_one_message(capsys, error, status, message):
    def command():
        raise error
    before = {one: signal.getsignal(one) for one in SIGNALS}
    with pytest.raises(SystemExit) as ended:
        answer(command)
    for one, handler in before.items():
        signal.signal(one, handler)
    assert ended.value.code == status
    said = capsys.readouterr().err
    assert message in said.replace("\n", " ") and "\x1b" not in said


def test_errors_of_ours_are_shown_in_full():
    def command():
        raise RuntimeError("shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        answer(command)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_an_interrupted_run_is_kept_and_goes_on(stepdistill, recipe, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "stepdistill", "train", str(recipe), "--out", "run", "--set",
                                "train.updates=100000"],
                               cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1 and "--resume" in output and "Traceback" not in output, output
    assert not list((tmp_path / "run/checkpoints").glob(".*")) and not (tmp_path / "run/.lock").exists()


def test_plan_counts_what_training_makes(stepdistill, recipe, tiny_teacher):
    """An adapter's parameters as planned are those of the adapter that is built; nothing but configs is read."""
    for weights in tiny_teacher.rglob("*.safetensors"):
        assert weights.stat().st_size
    found = json.loads(stepdistill("plan", recipe, "--json").stdout)
    assert set(found) == {"roles", "bytes", "over_base", "peak", "passes", "disk", "downloads"}
    from stepdistill.methods.base import Frozen, Trained
    from stepdistill.models.roles import Lora, build_roles
    from stepdistill.models.teacher import load_teacher
    roles = build_roles(load_teacher(tiny_teacher), {"teacher": Frozen(), "student": Trained()}, {"student": Lora(2)})
    assert found["roles"]["student"]["parameters"] == sum(p.numel() for p in roles.parameters("student"))
    # two of the teacher, target, student
    assert found["passes"] == {"forward": 4, "backward": 1, "batch": 4, "updates": 2}


@pytest.mark.long
def test_plan_says_whether_it_fits_a_card_and_what_makes_it_fit(recipe):
    import stepdistill
    whole = stepdistill.plan(recipe, **{"data.batch": 256})
    half = stepdistill.plan(recipe, **{"data.batch": 256, "train.precision": "bf16"})
    assert half["peak"] < whole["peak"]
    found = stepdistill.plan(recipe, half["peak"], **{"data.batch": 256})["fit"]
    assert found == {"memory": half["peak"], "switches": {"train.precision": "bf16"}, "peak": half["peak"],
                     "fits": True}
    assert stepdistill.plan(recipe, 1e12)["fit"]["switches"] == {}
    tight = stepdistill.plan(recipe, 1e6)["fit"]
    assert not tight["fits"] and {"train.gradient_checkpointing", "train.accumulate"} < set(tight["switches"])


@pytest.mark.parametrize("size, says", [("16GB", "on a card of 16 GB it fits"),
                                        pytest.param("1MB", "does not fit, not even with --set 'train.precision=bf16'",
                                                     marks=pytest.mark.long)])
def test_plan_prints_whether_it_fits(stepdistill, recipe, size, says):
    assert says in stepdistill("plan", recipe, "--gpu-memory", size).stdout


def test_plan_refuses_a_card_of_no_size(stepdistill, recipe):
    done = stepdistill("plan", recipe, "--gpu-memory", "large")
    assert done.returncode == 2 and "--gpu-memory is large; expected a size such as 16GB" in done.stderr


@pytest.mark.long
def test_plan_of_a_method_with_critic_and_discriminator(tiny_teacher):
    """Means over rollouts of 1 to 4 evaluations, the heads' own passes by the arithmetic of the network's first
    half."""
    from stepdistill.methods.distribution.dmd2 import DMD2, Settings
    from stepdistill.models.roles import Lora, build_roles
    from stepdistill.models.teacher import load_teacher
    from stepdistill.recipe import Recipe
    from stepdistill.run.plan import plan
    made = {"method": "dmd2", "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "guidance": 3.0, "steps": 4,
            "data": {"images": "shapes", "batch": 4}, "train": {"updates": 2}}
    count = lambda **settings: plan(Recipe.load(made | {"settings": settings}))
    plain, shared = count(gan_weight=0.0)["passes"], count(gan_weight=0.0, share_rollout=True)["passes"]
    assert ((plain["forward"], plain["backward"]) == (2.5 + 2 + 1 + 4 * 2.5 + 5, 6)
            and shared["forward"] == 2.5 + 2 + 1 + 5)
    with_discriminator = count()
    share = (with_discriminator["passes"]["forward"] - plain["forward"]) / 5
    # and once through the critic to x
    assert 0.2 < share < 0.6 and with_discriminator["passes"]["backward"] == pytest.approx(6 + 1 + 5 * share)
    roles = build_roles(load_teacher(tiny_teacher), DMD2.needs(Settings(), False), {"student": Lora(2)})
    for name in ("student", "critic", "discriminator"):
        parameters = sum(p.numel() for p in roles.parameters(name))
        assert with_discriminator["roles"][name] == {"parameters": parameters, "trained": parameters,
                                                     "bytes": 4 * parameters}
    prompts = plan(Recipe.load(made | {"settings": {"gan_weight": 0.0},
                                       "data": {"prompts": ["a red ring"], "batch": 4}}))
    assert prompts["passes"]["forward"] == plain["forward"]
    with pytest.raises(RequestError, match="steps is 1001; it should be at most 1000"):
        plan(Recipe.load(made | {"steps": 1001}))


@pytest.mark.long
def test_plan_of_stable_diffusion_from_its_configs_alone(stepdistill, recipe, tmp_path):
    """859,520,964 parameters of SD 1.5's UNet; LCM-LoRA of rank 64 ships as 67 million (135 MB in fp16)."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig
    folder = tmp_path / "sd15"
    import torch
    with torch.device("meta"):
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768).save_config(folder / "unet")
        AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      block_out_channels=(128, 256, 512, 512), layers_per_block=2).save_config(folder / "vae")
    CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12,
                   num_hidden_layers=12).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "scheduler": ["diffusers", "PNDMScheduler"]}))
    PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  steps_offset=1).save_config(folder / "scheduler")
    done = stepdistill("plan", recipe, "--json", "--set", f"teacher={folder}", "--set", "student={lora: {rank: 64}}")
    roles = json.loads(done.stdout)["roles"]
    assert roles["teacher"]["parameters"] == 859_520_964
    assert 67.0e6 < roles["student"]["parameters"] < 67.6e6
