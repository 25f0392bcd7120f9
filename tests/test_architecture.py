"""The rules of the house, read off the syntax trees: who may import what, and how long things may grow."""
from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stepdistill"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in FILES]

# part -> (what of ours, what of others) beside torch, the standard library, `errors`, `resources`, `files` and the part
# itself
EVERYTHING = "recipe run api.py training evaluation export methods models data losses diffusion parallel.py"
MAY = {
    "diffusion": ("diffusion", ""),
    "losses": ("diffusion", ""),
    "parallel.py": ("diffusion", ""),
    # base: the needs it supplies
    "models": ("diffusion parallel.py methods/base.py", "bitsandbytes diffusers transformers peft safetensors "
               "huggingface_hub triton"),
    "data": ("diffusion parallel.py", "safetensors PIL numpy datasets webdataset av"),
    "methods": ("methods/base.py diffusion losses", ""),
    "training": ("methods/base.py models data diffusion parallel.py", "accelerate bitsandbytes safetensors tensorboard "
                 "rich psutil"),
    "evaluation": ("models data diffusion parallel.py",
                   "torchmetrics torch_fidelity matplotlib diffusers transformers safetensors numpy PIL rich"),
    "export": ("models data diffusion parallel.py", "diffusers transformers peft safetensors numpy PIL "
               "huggingface_hub"),
    "recipe": ("methods/__init__.py", "pydantic ruamel"),
    "run": ("__init__.py recipe training evaluation export methods models data losses diffusion parallel.py",
            "diffusers safetensors"),
    "api.py": (EVERYTHING, "diffusers transformers rich PIL"),
    "cli": (f"cli proofs {EVERYTHING} __init__.py", "typer rich"),
    "demo.py": (f"cli {EVERYTHING}", "typer rich"),
    "proofs": (EVERYTHING, "diffusers matplotlib numpy safetensors"),
    "__init__.py": ("api.py proofs", ""),
    "__main__.py": ("cli", ""),
    "files": ("", ""),
    "errors.py": ("", ""),
    "resources.py": ("", ""),
}
ONLY = {                                         # module -> the one place that imports it
    "peft": ("models/adapters.py",),
    "accelerate": ("training/launch.py",),
    "torch.distributed": ("parallel.py",),
    "stepdistill.api": ("cli/__init__.py", "demo.py", "__init__.py", "proofs/run.py", "proofs/contract.py",
                        "proofs/convergence.py"),
    "pydantic": ("recipe/schema.py", "recipe/entries.py"),
    "triton": ("models/triton_attention.py",),
    "typer": ("cli/__init__.py", "cli/options.py"),
    "matplotlib": ("evaluation/curve.py", "evaluation/clouds.py", "evaluation/vitals.py", "proofs/convergence.py"),
}
BUILDS = {"setup": ("run/setup.py", "run/plan.py", "api.py", "proofs")}      # who calls the one place that builds a run
LOOSE = 8                                        # files at the package's top, at most
# Where a file or a function is longer, the reader is better served so; each with its reason.
LONGER: dict[str, str] = {}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


@cache
def _typing_only(name: str) -> set[ast.AST]:
    blocks = [node for node in ast.walk(tree(name)) if isinstance(node, ast.If)
              and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@cache
def imports(name: str) -> list[str]:
    """Absolute names of all that a file imports when it runs, inside functions too: stepdistill.diffusion.draws.key."""
    package, found, skipped = ("stepdistill", *Path(name).parts[:-1]), [], _typing_only(name)
    for node in ast.walk(tree(name)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            found += [".".join((*base, *filter(None, (node.module, alias.name)))) for alias in node.names]
    return found


@cache
def part_of(dotted: str) -> str:
    """The file of ours that an import names, as in NAMES."""
    parts = dotted.split(".")[1:]
    for length in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return "/".join(parts[:length]) + ".py"
        if path.is_dir():
            return "/".join(parts[:length]) + "/__init__.py"
    return "__init__.py"


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downward(name):
    own = Path(name).parts[0]
    ours, others = MAY[own]
    for dotted in imports(name):
        top = dotted.split(".")[0]
        if top == "stepdistill":
            part = part_of(dotted)
            allowed = (*ours.split(), "errors.py", "resources.py", "files", *(() if own == "methods" else (own,)))
            assert any(part == a or part.startswith(f"{a}/") for a in allowed), f"{name} imports {dotted}"
        else:
            assert top in (*others.split(), "torch") or top in sys.stdlib_module_names, f"{name} imports {dotted}"


@pytest.mark.parametrize("module", ONLY)
def test_one_place_imports(module):
    places = [name for name in NAMES if any(f"{i}.".startswith(f"{module}.") for i in imports(name))]
    assert set(places) <= set(ONLY[module]), f"{module} is imported in {places}"


def test_diffusers_is_known_to_the_sampler_only_as_a_type():
    assert not [name for name in NAMES if name.startswith("diffusion/")
                and any("diffusers" in i for i in imports(name))]


def test_the_top_holds_few_files():
    assert len([name for name in NAMES if "/" not in name]) <= LOOSE


@pytest.mark.parametrize("function", BUILDS)
def test_one_place_builds(function):
    places = [name for name in NAMES for call in _calls(name) if isinstance(call.func, ast.Name)
              and call.func.id == function]
    assert all(any(place == may or place.startswith(f"{may}/") for may in BUILDS[function]) for place in places), places


def _calls(name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree(name)) if isinstance(node, ast.Call))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_guessed(name):
    """No hasattr, no getattr with a default: what an object has is known."""
    for call in _calls(name):
        if isinstance(call.func, ast.Name):
            assert call.func.id != "hasattr", f"{name}:{call.lineno} hasattr"
            assert call.func.id != "getattr" or len(call.args) == 2, f"{name}:{call.lineno} getattr with a default"


def test_forward_hooks_stand_in_one_file():
    hooks = {"register_forward_hook", "register_forward_pre_hook"}
    places = {name for name in NAMES for call in _calls(name) if isinstance(call.func, ast.Attribute)
              and call.func.attr in hooks}
    assert places <= {"models/discriminator.py"}


def test_a_step_counter_meets_modulo_in_one_place():
    """`due` decides what a step does: a bug of one off is then one bug."""
    found = set()
    for name in NAMES:
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and not isinstance(node.left, ast.Constant):
                words = ast.unparse(node.left).replace("self.", "").split(".")
                if {"step", "index", "done", "updates"} & set(words):
                    found.add(name)
    assert found <= {"methods/base.py"}, found


@pytest.mark.parametrize("name", NAMES)
def test_files_and_functions_stay_short(name):
    lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
    is_method = name.startswith("methods/") and name.count("/") == 2
    assert name in LONGER or lines <= (150 if is_method else 400), f"{name} has {lines} lines"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            where = f"{name}:{node.name}"
            assert where in LONGER or length <= 40, f"{where} has {length} lines"


@pytest.mark.parametrize("name", NAMES)
def test_inheritance_is_one_deep(name):
    classes = {node.name: node for node in tree(name).body if isinstance(node, ast.ClassDef)}
    abstract = {"BaseModel", "ABC", "Protocol", "TypedDict"}

    def depth(base: ast.expr) -> int:
        parent = classes.get(ast.unparse(base).split("[")[0])
        return (1 if parent is None
                else 1 + max([0, *(depth(b) for b in parent.bases if ast.unparse(b) not in abstract)]))
    for node in classes.values():
        assert all(depth(base) <= 1 for base in node.bases), f"{name}:{node.name}"


def test_no_method_imports_a_method_and_no_family_a_family():
    for name in NAMES:
        folder = Path(name).parts
        if len(folder) == 3 and folder[0] == "methods" or folder[:2] == ("models", "families"):
            siblings = [part_of(i) for i in imports(name) if i.startswith("stepdistill.")]
            kind = "methods/" if folder[0] == "methods" else "models/families/"
            shared = (name, f"{kind}__init__.py", "methods/base.py", "models/families/shared.py")
            assert not [s for s in siblings if s.startswith(kind) and s not in shared], name
