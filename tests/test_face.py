"""The package as Python sees it: what editors and `help` show, and what is there without torch."""
from __future__ import annotations

import inspect
import subprocess
import sys

import stepdistill
from stepdistill import api
from stepdistill.recipe import catalogue

from .conftest import ROOT


def test_signatures_are_those_of_the_functions():
    assert inspect.signature(stepdistill.export) == inspect.signature(api.export)
    assert inspect.signature(stepdistill.methods) == inspect.signature(catalogue.methods)
    for name in ("train", "sample", "bench", "pairs", "plan", "load", "recipes", "verify"):
        kinds = {parameter.name: parameter.kind
                 for parameter in inspect.signature(getattr(stepdistill, name)).parameters.values()}
        assert "options" not in kinds and "args" not in kinds and len(kinds) > 0, name


def test_what_there_is_can_be_asked_without_torch():
    code = ("import sys, stepdistill\n"
            "print(stepdistill.methods('lcm')[0]['arxiv'], stepdistill.recipes('shapes/lcm')[0]['teacher'])\n"
            "import stepdistill.methods.base\nassert callable(stepdistill.methods)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2310.04378 assets/shapes-sd\n", done.stderr
