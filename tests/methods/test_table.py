import subprocess
import sys

import pytest

from stepdistill.errors import RequestError
from stepdistill.methods import METHODS, load_method


def test_the_table_is_read_without_torch():
    code = "import sys, stepdistill.methods as m; assert m.METHODS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_row_loads_and_is_true():
    for name, entry in METHODS.items():
        method = load_method(name)
        assert entry.module.split(".")[-1] == name and method.data == entry.data
        assert tuple(method.needs(method.Settings(), full=True)) == entry.needs
        assert (entry.arxiv in sys.modules[method.__module__].__doc__
                and entry.title in sys.modules[method.__module__].__doc__)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RequestError, match="no method 'lcn'.*did you mean 'lcm'"):
        load_method("lcn")
    with pytest.raises(RequestError, match=f"methods are {', '.join(METHODS)}"):
        load_method("zzzzzz")
