"""Recipes, captions and names that somebody made to do harm, and tokens of the environment: refused, escaped, or
hidden."""
from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
from PIL import Image

import stepdistill
from stepdistill import cli
from stepdistill.cli import printing
from stepdistill.data.images import FolderImages
from stepdistill.data.prompts import open_prompts
from stepdistill.errors import HIDDEN, RequestError, printable, redacted, unmarked
from stepdistill.evaluation.curve import curve
from stepdistill.evaluation.page import Drawing, Strip, page
from stepdistill.evaluation.report import as_csv, as_markdown, table
from stepdistill.export.card import block, card, code
from stepdistill.recipe import Recipe
from stepdistill.recipe.yaml import LENGTH, MARKS, Source, parse_set
from stepdistill.run.telling import spoken

SOUND = "method: lcm\nteacher: assets/toy\ndata: {images: assets/toy, batch: 4}\ntrain: {updates: 1}\n"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
                                                           for i in range(1, 9))
DOUBLES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  k: *a{i - 1}\n  l: *a{i - 1}\n" for i in range(1, 40))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: *a{i - 1}\n  k{i}: 1\n" for i in range(1, 1000))
WIDE = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 20)}]\n  k{i}: 1\n"
                                    for i in range(1, 99))
YAMLS = {
    "a billion laughs": (LAUGHS, "its anchors stand for more than"),
    "doubled tables": (DOUBLES, "its anchors stand for more than"),
    "a thousand merges": (MERGES, "takes tables into tables 999 times|commas, dashes"),
    "wide merges": (WIDE, "its anchors stand for more than|is no entry|takes tables|is missing|more entries"),
    "an anchor within itself": ("a: &a\n  <<: *a\n", "no valid YAML"),
    "an alias of nothing": ("a: *b\n", "undefined alias"),
    "50,000 brackets": ("a: " + "[" * 50_000, "is nested too deeply"),
    "200 brackets": ("a: " + "[" * 200 + "]" * 200, "is nested too deeply: 200 brackets"),
    "braces": ("{" * 20_000, "is nested too deeply"),
    "dashes": ("- " * 4_000, "is nested too deeply"),
    "questions": ("? " * 4_000, "is nested too deeply"),
    "1,000 indents": ("\n".join(" " * i + "a:" for i in range(400)), "is nested too deeply"),
    "python's object": ("a: !!python/object/apply:os.system [id]\n", "has the tag .*python/object/apply:os.system"),
    "python's name": ("a: !!python/name:os.system x\n", "a recipe is made of tables, lists, texts and numbers"),
    "python's module": ("a: !!python/module:os\n", "a recipe is made of tables, lists, texts and numbers"),
    "a tag of its own": ("%TAG ! tag:evil,2000:\n---\na: !run {b: c}\n", "has the tag"),
    "bytes": ("a: !!binary aGVsbG8=\n", "it has a bytes"),
    "a set": ("a: !!set {b, c}\n", "it has a CommentedSet"),
    "a date": ("teacher: 2020-01-01\n", "it has a date"),
    "50 MB": ("a: '" + "x" * 50_000_000 + "'", "a recipe has at most"),
    "a long text": ("a: '" + "x" * (LENGTH + 1) + "'", "characters"),
    "many entries": ("a: [" + "1," * 20_000 + "]", "commas, dashes, colons"),
    "many comments": ("# x: y, z\n" * 10_000, "commas, dashes, colons"),
    "two documents": (SOUND + "---\n" + SOUND, "another document"),
    "one entry twice": (SOUND + "method: dmd\n", "duplicate key"),
    "no text": ("\0", "no valid YAML"),
    "a hexadecimal number": (SOUND + "steps: 0x" + "f" * 30_000, "a number of thousands of digits"),
    "a decimal number": (SOUND + "steps: " + "9" * 30_000, "no valid YAML"),
    "a number of infinity": (SOUND + "guidance: .inf\n", "should be a finite number"),
    "a method by a path": (SOUND.replace("lcm", "../../evil"), "method is '../../evil', which is no method"),
    "a method by a module": (SOUND.replace("lcm", "os.system"), "method is 'os.system', which is no method"),
    "code in settings": (SOUND + "settings: {__class__: os.system}\n", "is no setting of lcm"),
    "a plugin": (SOUND + "plugins: evil.py\n", "there is no folder of plugins evil.py"),
    "trust": (SOUND + "trust_remote_code: true\n", "is no entry of a recipe"),
    "trust in the teacher": (SOUND.replace("teacher: assets/toy", "teacher: {base: assets/toy, "
                                           "trust_remote_code: true}"), "is no entry of teacher"),
    "a pickled teacher": (SOUND.replace("teacher: assets/toy", "teacher: model.ckpt"),
                          "there is no pipeline at|cannot be loaded"),
    "1,000 stages": (SOUND + "stages:\n  - steps: [" + ", ".join(["4"] * 1000) + "]\n", "stages are more than 64"),
    "1,000 unknown entries": (SOUND + "".join(f"entry{i}: 1\n" for i in range(1000)), "and 992 more entries are wrong"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_hostile_recipes_are_refused_within_a_second(name, tmp_path):
    text, message = YAMLS[name]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(RequestError, match=message) as refused:
        recipe = Recipe.load(path)
        recipe.method_settings()
        stepdistill.plan(recipe)
    assert time.process_time() - began < (1.0 if "pickled" not in name else 10) and len(str(refused.value)) < 3000


@pytest.mark.parametrize(("text", "message"), [
    ("a=" + "[" * 1000, "nested too deeply"), ("a=!!python/name:os.system x", "made of tables, lists"),
    ("a=" + "1," * 10_000, "is no valid YAML"),
    ("a=&x [*x, *x]", "refused|valid"), ("a=!!binary aGVsbG8=", "it has a bytes")])
def test_hostile_sets_are_refused(text, message):
    with pytest.raises(RequestError, match=message):
        parsed = parse_set([text])
        raise RequestError(f"refused by the schema: {parsed}")


def test_what_is_accepted_can_be_read_again(tmp_path):
    """The resolved recipe of the largest that is accepted is within the bounds."""
    prompts = [f"a red ring, number {i}" for i in range(MARKS // 4)]
    recipe = Recipe.load({"method": "dmd2", "teacher": "assets/shapes-sd", "data": {"prompts": prompts, "batch": 4},
                          "train": {"updates": 1}})
    (tmp_path / "recipe.yaml").write_text(recipe.dump())
    assert Recipe.load(tmp_path / "recipe.yaml").resolved() == recipe.resolved()
    with pytest.raises(RequestError, match="put long lists of prompts into a .txt file"):
        Recipe.load({"method": "dmd2", "teacher": "assets/shapes-sd", "data": {"prompts": prompts * 5, "batch": 4},
                     "train": {"updates": 1}})


def test_merges_are_still_served(tmp_path):
    (tmp_path / "mine.yaml").write_text("common: &common {lr: 1, seed: 2}\ntrain:\n  <<: *common\n  seed: 3\n")
    assert Source.of_file(tmp_path / "mine.yaml").values["train"] == {"lr": 1, "seed": 3}


# -- pictures and captions ---------------------------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """What is remembered of pictures lies in the test's own folder."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.mark.parametrize("name", ["../outside.png", "/outside.png", "a/../../outside.png", ["a.png"], None,
                                  "nowhere.png", "a.png\0"])
def test_tables_of_captions_name_nothing_outside(tmp_path, name):
    picture(tmp_path / "outside.png")
    folder = picture(tmp_path / "pictures/a.png").parent
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}) + "\n"
                                           + json.dumps({"file_name": name, "text": "b"}))
    with pytest.raises(RequestError, match="line 2 of"):
        FolderImages.open(folder, 8)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch REACHED) (w) file\n"


@pytest.mark.parametrize(("data", "kind"), [(POSTSCRIPT, "PostScript"), (b"%PDF-1.4\n", "PDF"),
                                            (b"\x80\x02cos\nsystem\n", "a pickle"), (b"", "nothing"),
                                            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
                                            (b"GIF89a" + b"\0" * 20, "GIF"),
                                            (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\x7f\xff\xff\xff" * 2
                                             + b"\x08\x02\0\0\0" + b"\0" * 4, "a bomb")])
def test_what_is_no_picture_by_its_bytes_is_refused(tmp_path, monkeypatch, data, kind):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(data)
    (tmp_path / "pictures/a.txt").write_text("a")
    with pytest.raises(RequestError, match="cannot be read as an image"):
        FolderImages.open(tmp_path / "pictures", 8)
    assert not (tmp_path / "REACHED").exists()


@pytest.mark.parametrize("data", [b"", b"\n\n \n", b"\xff\xfe\x00", b"\x80\x00cos\nsystem\n"])
def test_prompt_files_that_are_no_text_are_refused(tmp_path, data):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(RequestError, match="prompts: |cannot be read as UTF-8 text"):
        open_prompts(tmp_path / "prompts.txt")


# -- what terminals, cards and pages are given -------------------------------------------------------------------------

ESCAPES = "\x1b[31mred\x1b]0;title\x07\x1b]8;;http://evil\x1b\\link\u202egnp.exe\x9b31m"


def test_terminals_obey_nothing_of_a_name(capsys, monkeypatch):
    assert not set(printable(ESCAPES)) & {"\x1b", "\x07", "\x9b", "\u202e"}
    with spoken(), pytest.raises(RequestError):
        logging.getLogger("stepdistill").info("looking at %s", ESCAPES)
        raise RequestError(ESCAPES)
    printing.tell(ESCAPES)
    printing.show(printing.table([{"name": ESCAPES + "[bold]x[/]"}], ("name",)))
    with pytest.raises(SystemExit):
        cli._fail(ESCAPES + "[/]", 2)
    said = capsys.readouterr()
    assert "\x1b]" not in said.out + said.err and "\u202e" not in said.out + said.err and "\\x1b" in said.err


ROW = {"target": "<script>alert(1)</script>$\\frac{$|`x`", "method": None, "nfe": 2, "steps": 2, "guidance": 1.0,
       "samples": 4, "seed": 0,
       "metrics": {"fd": 1.0, "fd_low": 0.9, "fd_high": 1.1, "kid": 0.1, "precision": 0.5, "recall": 0.5,
                   "clip_score": 1.0, "diversity": 0.5,
                   "all_attributes": None}, "latency_ms": None, "images_per_s": None}


def test_pages_tables_and_curves_take_names_as_they_are(capsys):
    text = page("<b>", "</p><script>", [Drawing("\"><script>", b"", b"")], ("<i>",), [("student", [ROW["target"]])],
                [Strip("'><script>", 2, b"")], {"<a>": "</dd><script>"})
    assert text.count("<script>") == 1 and "alert(1)</script>" not in text
    assert curve([ROW], 4)[:4] == b"\x89PNG"
    cli.show(table({"protocol": {"samples": 4, "reference": "[bold]x[/nothing]",
                                 "features": "\x1b[31m[link=http://evil]y"}, "rows": [ROW]}))
    assert (r"\<script\>" in as_markdown([ROW]) and ",'=cmd" in ","
            + as_csv([ROW | {"target": "=cmd|' /C calc'!A0"}]).splitlines()[1])
    assert ("[bold]x[/nothing]" in (out := capsys.readouterr().out) and "\x1b" not in out
            and "[link=http://evil]y" in out)


def test_cards_are_no_markup_but_their_own(world):
    settings = json.loads((world / "export/stepdistill.json").read_text())
    settings["call"]["negative_prompt"] = "```\n# heading\n<script>alert(1)</script>` " + TOKEN
    settings["teacher"] = "a`b<script>"
    results = {"protocol": {"features": "<img src=x>", "reference": "[x](javascript:y)", "id": "|", "samples": 4},
               "rows": [ROW]}
    text = card(settings, "folder\n```\n# x", results, '"a red ring"')
    inside = text.split("## Use\n\n")[1].split("\n\n## Settings")[0]
    fence = inside.split("python")[0]
    assert len(fence) > 3 and inside.endswith(fence) and fence not in inside[len(fence):-len(fence)]
    outside = text.split("## Use")[0] + text.split("## Settings")[1]
    plain = [part for i, part in enumerate(outside.split("`")) if i % 2 == 0]
    assert TOKEN not in text and r"\<script\>" in outside and not any("\n# heading" in part for part in plain)
    assert unmarked("<b>") == r"\<b\>" and code("a`b") == "``a`b``" and block("x\n") == "```python\nx\n```"


# -- tokens ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", [TOKEN, "https://user:" + "secret99@hub.example/a", "gh" + "p_" + "a1" * 18,
                                  "AKIA" + "ABCDEFGH12345678", "Bearer abcdefgh.ijkl",
                                  "token=abcdef123", "PASSWORD=abcdef123", "sk-" + "a1b2" * 8, "glpat-" + "a1" * 10])
def test_what_looks_like_a_token_is_hidden(text):
    found = redacted(f"teacher is {text}, which")
    assert HIDDEN in found and found.endswith(", which") and text not in found


def test_plain_words_are_not_taken_for_tokens():
    text = ("teacher is stabilityai/sdxl-turbo at 0123456789abcdef0123456789abcdef01234567, token 3, a secret "
            "garden, hf_hub")
    assert redacted(text) == text


def test_tokens_reach_no_file_and_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sys.argv", ["stepdistill", "train", "x", "--set", "teacher=correct horse battery", TOKEN])
    folder = tmp_path / "run"
    recipe = {"method": "lcm", "teacher": "assets/toy", "steps": 2, "guidance": 2.0,
              "data": {"images": "assets/toy", "batch": 4}, "train": {"updates": 1}}
    stepdistill.train(recipe, out=folder,
                      on_step=lambda step: logging.getLogger("stepdistill").info("%s correct horse battery", TOKEN))
    with pytest.raises(SystemExit):
        cli._fail(f"no permission for {TOKEN}", 2)
    held = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode(errors="replace")
    said = capsys.readouterr()
    assert TOKEN not in held + said.out + said.err and "correct horse battery" not in held + said.out + said.err
    assert HIDDEN in (folder / "environment.json").read_text() and HIDDEN in (folder / "train.log").read_text()

