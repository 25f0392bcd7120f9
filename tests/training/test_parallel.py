from pathlib import Path

import pytest
import torch

from stepdistill import parallel
from stepdistill.training import checkpoints

from ..processes import on_two_processes
from ..unmagnified import unmagnified
from .toy import trainer

WORKER = """
import time
import torch
from pathlib import Path
from stepdistill import parallel
from stepdistill.data.cache import Cache, StoreSpec
from stepdistill.training import launched
from tests.training.test_parallel import until
from tests.training.toy import trainer
from tests.unmagnified import unmagnified
launched()
mine = [torch.full((2,), float(parallel.rank())), torch.full((3,), 2.0 * parallel.rank(), dtype=torch.float64)]
parallel.all_reduce_mean_(mine)
assert mine[0].tolist() == [0.5, 0.5] and mine[1].tolist() == [1.0, 1.0, 1.0]
assert parallel.gather(torch.tensor([[parallel.rank()]])).tolist() == [[0], [1]]
made, opened = [], StoreSpec.opened
def late(spec, path, rows):                # one rank has not yet looked when the other makes its first file
    time.sleep(0.3 * (parallel.rank() == 0))
    return opened(spec, path, rows)
StoreSpec.opened = late
make = lambda ids: (made.extend(ids.tolist()) or {"x": ids * 2.0}, [f"{i}" for i in ids.tolist()])
store = Cache(Path(sys.argv[1], "cache")).store("rows", {}, 5, ("x",), make, 2)
assert made == [[0, 1, 4], [2, 3]][parallel.rank()] and store.rows("x", torch.arange(5)).tolist() == [0, 2, 4, 6, 8]
with unmagnified():
    trainer(Path(sys.argv[1], "run"), accumulate=2, lr=0.3).train()
    until(Path(sys.argv[1], "moved"), 5, accumulate=2)
"""


class StopForward(Exception):
    pass


def until(run: Path, last: int, **config) -> None:
    """Goes on with a run and leaves it in the middle, after step `last`: what is kept is of an earlier one."""
    def stop(step: int) -> None:
        if step == last:
            raise StopForward
    with pytest.raises(StopForward):
        trainer(run, [stop], checkpoint_every=2, lr=0.3, **config).train(resume=True)


def test_one_process_needs_no_group():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    x = torch.arange(3.0)
    parallel.all_reduce_mean_([x])
    assert parallel.gather(x) is x and x.tolist() == [0, 1, 2]
    parallel.barrier()


def test_two_processes_train_what_one_does_and_a_run_may_move_between_them(tmp_path):
    """moved: steps 1 and 2 on one process, 3 and 4 on two, 5 to 7 on one."""
    with unmagnified():
        until(tmp_path / "moved", 3)
    on_two_processes(WORKER, tmp_path, tmp_path)
    with unmagnified():
        trainer(tmp_path / "one", lr=0.3).train()
        again = trainer(tmp_path / "moved", lr=0.3)
        again.train(resume=True)
    assert again.stream.asked[0][0] == 4
    one, run, moved = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("one", "run", "moved"))
    for name in one:
        for key in one[name]:
            for other in (run, moved):
                torch.testing.assert_close(other[name][key], one[name][key], rtol=1e-5, atol=1e-5)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 7
