import os
import subprocess
import sys
from pathlib import Path

import torch

from stepdistill import parallel
from stepdistill.training import checkpoints

from ..unmagnified import unmagnified
from .toy import trainer

WORKER = """
import sys, torch
from pathlib import Path
from stepdistill import parallel
from stepdistill.training import launched
from tests.training.toy import trainer
from tests.unmagnified import unmagnified
launched()
mine = [torch.full((2,), float(parallel.rank())), torch.full((3,), 2.0 * parallel.rank(), dtype=torch.float64)]
parallel.all_reduce_mean_(mine)
assert mine[0].tolist() == [0.5, 0.5] and mine[1].tolist() == [1.0, 1.0, 1.0]
assert parallel.gather(torch.tensor([[parallel.rank()]])).tolist() == [[0], [1]]
with parallel.main_first():
    found = Path(sys.argv[1], "cache").exists()
    Path(sys.argv[1], "cache").touch()
assert found == (parallel.rank() == 1)
with unmagnified():
    trainer(Path(sys.argv[1], "run"), accumulate=2, lr=0.3).train()
torch.distributed.destroy_process_group()
"""


def test_one_process_needs_no_group():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    x = torch.arange(3.0)
    parallel.all_reduce_mean_([x])
    assert parallel.gather(x) is x and x.tolist() == [0, 1, 2]
    with parallel.main_first():
        parallel.barrier()


def test_two_processes_train_what_one_does(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "worker.py", str(tmp_path)]
    (tmp_path / "worker.py").write_text(WORKER)
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
    assert result.returncode == 0, result.stderr[-2000:]
    with unmagnified():
        trainer(tmp_path / "one", lr=0.3).train()
    one, two = (checkpoints.load(checkpoints.latest(tmp_path / name)) for name in ("one", "run"))
    for name in one:
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], rtol=1e-5, atol=1e-5)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 7
