"""`--with-teacher` as users write it: what it says, what it refuses before anything is loaded, and what is drawn."""
from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from tiny import save_tiny, tiny_pipeline

from stepdistill import api
from stepdistill.errors import RequestError
from stepdistill.evaluation.plans import plans
from stepdistill.run.targets import open_target, teachers
from stepdistill.run.with_teacher import Asked, helped

PROMPTS = ["a red ring left of a blue square on a plain navy background"] * 2
STUDENT = "assets/students/shapes-dmd2"


def test_what_is_asked_for_is_read():
    assert Asked.of("diversity") == Asked("diversity", {})
    assert Asked.of("diversity,teacher_steps=2,guidance=3.5,teacher=a/b") == Asked("diversity", {"teacher_steps": 2},
                                                                                   3.5, "a/b")
    assert Asked.of("distillation_pp,weight=1.0").options == {"weight": 1.0}
    assert Asked.of("adaptive,share=0.25") == Asked("adaptive", {}, share=0.25)


@pytest.mark.parametrize("text,words", [
    ("divers", "there is no system 'divers', there are diversity, distillation_pp, adaptive"),
    ("diversity,weight=0.1", "'weight=0.1' is no option of diversity, which are written diversity,handover=1 and may "
                             "be guidance, teacher, teacher_steps, handover"),
    ("diversity,handover", "'handover' is no option"), ("diversity,share=0.5", "'share=0.5' is no option"),
    ("diversity,handover=two", "handover is a number, such as handover=1; found 'two'"),
    ("adaptive,share=50", "a share of pictures is from 0 to 1")])
def test_what_cannot_be_read_is_refused_before_anything_is_loaded(text, words):
    for ask in (api.sample, api.bench):
        with pytest.raises(RequestError, match=words):
            ask("no-such-folder", *([PROMPTS] if ask is api.sample else []), with_teacher=text)
    with pytest.raises(RequestError, match="a sheet of x_0 is drawn beside a teacher"):
        api.sample("no-such-folder", PROMPTS, x0="x0.png")


def test_sample_draws_with_the_teacher_and_shows_each_turn(tmp_path, capfd):
    alone, handed, both = (api.sample(STUDENT, PROMPTS, with_teacher=text, x0=x0) for text, x0 in (
        (None, None), ("diversity,handover=0", None), ("diversity", tmp_path / "x0.png")))
    assert [list(a.getdata()) == list(b.getdata()) for a, b in zip(alone, handed)] == [True, True]
    assert all(list(a.getdata()) != list(b.getdata()) for a, b in zip(alone, both))
    assert Image.open(tmp_path / "x0.png").height == 4 * 100 + 4          # a row for each of four evaluations
    assert "diversity: network evaluations a picture: 3 of the student, 2 of the teacher" in capfd.readouterr().err


class TestOfOthers:
    """A few-step pipeline that somebody else made: its teacher and the scale are to be said."""

    @pytest.fixture
    def places(self, tmp_path):
        pipe = tiny_pipeline(seed=1)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.save_pretrained(tmp_path / "turbo")
        return tmp_path / "turbo", save_tiny(tmp_path / "base")

    def test_it_is_helped_by_the_teacher_that_is_named(self, places):
        turbo, base = places
        opened = open_target(turbo, "turbo", say=lambda text: None)
        target = helped(opened, Asked.of(f"diversity,guidance=2,teacher={base}"), [])
        row, = plans(target, [4], [1.0], ["ddim"], print)
        assert (target.name, row.nfe, row.guidance) == ("turbo + teacher (diversity)", 5, 2.0)
        assert target.made["with_teacher"] == {"system": "diversity", "guidance": 2.0}
        drawn = row.images(PROMPTS, torch.arange(2), 0)
        assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all()

    @pytest.mark.parametrize("text,words", [
        ("diversity,guidance=2", "nothing says what turbo was made of: --with-teacher diversity,teacher=FOLDER does"),
        ("diversity,teacher={base}", "nothing says at which guidance scale the teacher of turbo is asked"),
        ("diversity,guidance=2,teacher={turbo}", "is a few-step generator itself, and no teacher"),
        ("distillation_pp,guidance=2,teacher={base},guided_steps=4", "in 1 to 3 of 4 steps; found guided_steps = 4"),
        ("adaptive,guidance=2,teacher={base}", "a judge of Shapes alone ships: from Python")])
    def test_what_is_not_said_is_asked_for(self, places, text, words):
        turbo, base = places
        opened = open_target(turbo, "turbo", say=lambda text: None)
        with pytest.raises(RequestError, match=words):
            helped(opened, Asked.of(text.format(turbo=turbo, base=base)), [])

    def test_a_teacher_is_not_helped(self, places):
        opened = open_target(places[1], "base")
        with pytest.raises(RequestError, match="base is called as a teacher is: --with-teacher helps students"):
            helped(opened, Asked.of("diversity"), teachers([opened]))


def test_adaptive_sends_back_the_share_of_the_shipped_student_s_pictures_that_was_asked_for():
    opened = open_target(STUDENT, "student")
    found = helped(opened, Asked.of("adaptive,share=0.25"), teachers([opened]))
    row, = plans(found, [4], [1.0], ["ddim"], print)
    assert row.nfe == 4 + 0.25 * 2 * 4 and found.help.below < 100
