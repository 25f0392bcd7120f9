"""A bench and its pictures on two processes are those of one."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdistill import api
from stepdistill.evaluation.report import read_results

from ..processes import on_two_processes

pytestmark = pytest.mark.long
PROMPTS = ["a red ring", "a blue square", "a green cross"]
ASKED = {"nfe": (1, 2, 4), "solvers": ("ddim", "euler"), "guidance": (1.0,)}
WORKER = """
from tests.evaluation.test_two_processes import everything
everything(sys.argv[1], sys.argv[2])
"""
REFUSED = """
from contextlib import contextmanager
from stepdistill import parallel
from stepdistill.errors import RequestError
from stepdistill.training import launched

@contextmanager
def taken():
    raise RequestError(f"in use, says {parallel.rank()}")
    yield

launched()
assert parallel.dealt(parallel.share("abcde")) == list("abcde")
try:
    with parallel.held_by_first(taken()):
        pass
except RequestError as error:
    assert str(error) == "in use, says 0", error
else:
    raise AssertionError("it was held")
"""


def everything(teacher: str, out: str) -> None:
    place = Path(out)
    api.bench(teacher, samples=40, reference="shapes", out=place / "shapes", **ASKED)
    api.bench(teacher, samples=6, reference="teacher", prompts=PROMPTS, out=place / "own", **ASKED)
    api.sample(teacher, PROMPTS, steps=2, out=place / "sample.png")


def figures(folder: Path) -> list[dict[str, Any]]:
    """Rows without what is of the machine and the moment."""
    rows = [{name: value for name, value in row.items() if name not in ("latency_ms", "images_per_s", "made")}
            for row in read_results(folder / "results.json")["rows"]]
    assert len(rows) >= 6 and (folder / "report.html").is_file()
    return rows


def test_two_processes_share_a_bench_and_a_sample(tiny_teacher, tmp_path):
    everything(str(tiny_teacher), str(tmp_path / "one"))
    on_two_processes(WORKER, tmp_path, tiny_teacher, tmp_path / "two")
    for name in ("shapes", "own"):
        one, two = (figures(tmp_path / which / name) for which in ("one", "two"))
        assert one == two
        pictures = [sorted(path.name for path in (tmp_path / which / name / "samples").iterdir())
                    for which in ("one", "two")]
        assert pictures[0] == pictures[1]
    one, two = (np.array(Image.open(tmp_path / which / "sample.png")).astype(int) for which in ("one", "two"))
    assert one.shape == two.shape and abs(one - two).max() <= 1


def test_what_is_refused_to_one_is_refused_to_all(tmp_path):
    on_two_processes(REFUSED, tmp_path)
