"""Tests of a card: `pytest -m gpu tests/gpu`. With STEPDISTILL_GPU_TINY=1 those that can run on the CPU do so there."""
from __future__ import annotations

import json
import os

import pytest
import torch

from stepdistill.run.first_call import whole_float32

TINY = os.environ.get("STEPDISTILL_GPU_TINY") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not TINY and not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA card"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line in $STEPDISTILL_GPU_OUTCOMES as soon as a test is done, so that a run that is stopped keeps what it
    found."""
    place = os.environ.get("STEPDISTILL_GPU_OUTCOMES")
    if place is None or "PYTEST_XDIST_WORKER" in os.environ or report.when != "call" and report.passed:
        return
    reason = "" if report.passed else str(report.longrepr).strip().splitlines()[-1][-300:]
    line = {"test": report.nodeid.partition("::")[2], "outcome": report.outcome, "reason": reason,
            "seconds": round(report.duration, 1)}
    with open(place, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu") if TINY else torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def card(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("only a card can show this")
    return device


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["STEPDISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def exact() -> None:
    """float32 products as they are, and kernels that always add in the same order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with whole_float32():
        yield
    torch.use_deterministic_algorithms(False)
