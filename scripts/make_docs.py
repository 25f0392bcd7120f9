"""Writes the pages of docs/ that are read off the code and the records: docs/recipes.md from the schema,
docs/methods.md from the methods, docs/gpu.md from assets/gpu/.

    python scripts/make_docs.py            # a test holds that the pages are as this would write them
"""
from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from stepdistill.methods import METHODS
from stepdistill.recipe import catalogue, editors, entries, schema

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TABLES = {"": schema.Recipe, "resolution": entries.Buckets, "teacher": entries.Teacher,
          "teacher.loras": entries.TeacherLora,
          "student": entries.RoleChoice,
          "student.lora, critic.lora": entries.Lora, "critic": entries.Critic, "discriminator": entries.Discriminator,
          "data": entries.Data, "data.samples": entries.Samples, "data.pairs": entries.Pairs, "train": entries.Train,
          "evaluate": entries.Evaluate, "negatives": entries.Negatives, "plugins": entries.Plugins}
WORDS = {"int": "whole number", "float": "number", "str": "text", "bool": "true | false", "dict": "table",
         "RoleChoice": "full | table",
         "Choice": "full | solver | table", "Lora": "table",
         "Critic": "full | table", "Discriminator": "table", "Data": "table",
         "Samples": "table", "Pairs": "table", "Train": "table", "Evaluate": "table", "Negatives": "table",
         "Prompts": "text | list",
         "Resolution": "whole number | list | buckets", "Guidance": "number | range", "Plugins": "text | table",
         "Trackers": "list of tensorboard, wandb",
         "TeacherLora": "text | table", "Teacher": "text | table", "tuple": "range", "Any": "value"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
RECIPES = """# Recipe reference

A recipe is a YAML file of choices. This page is written by `scripts/make_docs.py` from the schema that reads recipes. A
run's `recipe.yaml` shows every value that was used. Each entry can be changed on the command line: `--set
train.lr=1e-4`.

An editor with a YAML language server completes and checks recipes by their schema: `stepdistill recipes --schema >
recipe.schema.json`, and `# yaml-language-server: $schema=recipe.schema.json` as a recipe's first line.

`settings` are the method's own: see [methods](methods.md). `stages` is a list of small tables, each of which changes
entries for its stage; see [concepts](concepts.md#stages).
"""
METHOD_PAGE = """# Methods

One paper, one file in `stepdistill/methods/`. This page is written by `scripts/make_docs.py` from those files: the
algorithm as each file's docstring states it, and its settings with their defaults and sources. `stepdistill methods
NAME` prints the same.

What helps a finished student while it samples, and trains nothing, has [a page of its own](with_teacher.md).

| method | paper | family | best at steps | trains on |
|---|---|---|---|---|
"""

GPU = """# One card, eight cards, several nodes

The recipe stays the same. `data.batch` counts the samples of an optimizer step over all processes, so a run gives the
same gradients on one card and on eight.

```
stepdistill train recipe.yaml --out runs/mine                                    # one card
accelerate launch --num_processes 8 -m stepdistill train recipe.yaml --out runs/mine
torchrun --nproc-per-node 8 -m stepdistill train recipe.yaml --out runs/mine
torchrun --nnodes 4 --node-rank $RANK --nproc-per-node 8 --rdzv-endpoint $HOST:29500 \\
         -m stepdistill train recipe.yaml --out /shared/runs/mine               # on each of four nodes
```

`pairs`, `bench` and `sample` are launched alike, and share their work: pairs by batches, a bench its rows, or its
pictures where they are held against the teacher's own, `sample` its prompts.

A run folder and the cache (`$STEPDISTILL_CACHE`) must lie where all processes see them. `--resume` goes on with another
number of processes, too.

## What fits

`stepdistill plan recipe.yaml` forecasts memory by role and the peak, before anything is loaded. Training refuses a card
that is too small, and names the switches that help:

- LoRA roles share one frozen base: `student: {lora: {rank: 32}}`, and the same for `critic`;
- `train.precision: bf16` halves the base. A card without bfloat16 takes `fp16`, with a loss scale;
- `train.gradient_checkpointing: true` computes activations again in backward;
- `train.accumulate: 4` cuts a batch into four, with the same gradients;
- `train.fsdp: true` shards the frozen base over the processes (FSDP2). Adapters stay whole on each. Each process still
  loads the base once before it is sharded. Roles that train all their weights are not sharded, and figures
  (`evaluate.reference`) are left to `bench`.

`train.compile: true` compiles the repeated blocks of the networks. It wants torch 2.11 or newer.

## Measured

"""
MEMORY = """{device}, driver {driver}, torch {torch}, diffusers {diffusers}; random weights of the published configs,
batch 1, bf16. Repeat it with `{command}`.

| model and method | peak by torch | used on the card | forecast by `plan` | seconds an update |
|---|---|---|---|---|
"""
NOT_MEASURED = "\nNot measured yet: {}. Each has its command in [scripts/gpu](../scripts/gpu/README.md).\n"
CIFAR = """
CIFAR-10 on an {device}: a class-conditional teacher of {parameters:.1f} million parameters has FD {fd} in {nfe}
evaluations, and pictures that were held out have {real}. The features are those of a classifier with {accuracy:.1%} of
the held-out pictures right. Repeat it with `scripts/gpu/cifar.sh`, in pieces.

| method | evaluations | FD | its ratio to the teacher's | updates of {batch} | minutes |
|---|---|---|---|---|---|
"""
GPU_RECORDS = ("smoke", "memory", "throughput", "jvp", "world", "cifar")


def entries(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """(name, what it takes, default, what it means) of a table's entries; the meaning is the comment beside it in the
    schema."""
    said = editors.meanings(model)
    tree = ast.parse(inspect.cleandoc("\n" + "".join(inspect.getsourcelines(model)[0])))
    for node in tree.body[0].body:
        if isinstance(node, ast.AnnAssign) and not node.target.id.startswith("_"):
            field = model.model_fields[node.target.id]
            name = field.alias or node.target.id
            yield name, _takes(node.annotation, field.metadata), _default(field), said[name]


def _takes(annotation: ast.expr, bounds: list[Any]) -> str:
    """An annotation in plain words, with its bounds."""
    text = re.sub(r"Annotated\[(.+?), \w+\(.*?\)\]", r"\1", ast.unparse(annotation)).removesuffix(" | None")
    if text.startswith("Literal"):
        return " | ".join(ast.literal_eval(text.removeprefix("Literal")))
    for word, plain in WORDS.items():
        text = re.sub(rf"\b{word}\b", plain, text)
    limits = [f"{sign} {getattr(bound, name)}" for bound in bounds for name, sign in SIGNS.items()
              if name in dir(bound)]
    return ", ".join([text, *limits])


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if isinstance(field.default, BaseModel):
        return "see its table"
    return {"None": "none", "True": "true", "False": "false"}.get(str(field.default), str(field.default)) or "''"


def recipe_page() -> str:
    parts = [RECIPES]
    for name, model in TABLES.items():
        parts.append(f"## {name or 'The recipe'}\n")
        if model.__doc__ and model is not schema.Recipe:
            parts.append(inspect.cleandoc(model.__doc__) + "\n")
        parts.append("| entry | takes | default | |\n|---|---|---|---|")
        parts.append("".join(f"| `{entry}` | {_cell(takes)} | {default} | {_cell(meaning)} |\n"
                             for entry, takes, default, meaning in entries(model)))
    return "\n".join(parts)


def method_page() -> str:
    rows = [f"| [`{name}`](#{name}) | {entry.title}, [arXiv:{entry.arxiv}](https://arxiv.org/abs/{entry.arxiv}) | "
            f"{entry.family} "
            f"| {_span(entry.steps)} | {', '.join(entry.data)} |\n" for name, entry in METHODS.items()]
    parts = [f"\n## {name}\n\n```text\n{catalogue.algorithm(name)}\n```\n" for name in METHODS]
    return METHOD_PAGE + "".join(rows) + "".join(parts)


def _span(steps: tuple[int, int]) -> str:
    return str(steps[0]) if steps[0] == steps[1] else f"{steps[0]}–{steps[1]}"


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", text)


def gpu_page() -> str:
    records = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "assets" / "gpu").glob("*.json"))}
    parts = [GPU]
    if found := records.get("memory"):
        parts.append(MEMORY.format(**{key: found[key] for key in ("device", "driver", "command")}, **found["versions"]))
        parts += [f"| {name} | {row['peak_gb']:.2f} GB | {row['card_used_gb']:.2f} GB | {row['forecast_gb']:.2f} GB "
                  f"| {row['seconds_an_update']:.2f} |\n" for name, row in found["figures"].items()]
    if found := records.get("throughput"):
        parts += [_paragraph(f"{name} at batch {row['batch']} on an {found['device']}: {row['updates_per_second']:.2f} "
                             f"updates a second, {row['ratio']:.2f} × a hand-written loop of the same passes "
                             f"(`{found['command']}`).")
                  for name, row in found["figures"].items()]
    if found := records.get("jvp"):
        parts += [_paragraph(f"Attention with its derivative forward, {key.replace(' ', ', ')} tokens, on an "
                             f"{found['device']}: {row['jvp_ms']:.2f} ms, {row['ratio']:.2f} × the forward alone, "
                             f"{row['added_mb']:.0f} MB beside arguments and results (`scripts/gpu/jvp.sh`).")
                  for key, row in found["figures"].items()]
    if found := records.get("smoke"):
        outcomes = [test["outcome"] for test in found["figures"].values()]
        parts.append(_paragraph(f"{outcomes.count('passed')} of {len(outcomes)} tests of a card pass on an "
                                f"{found['device']} (`scripts/gpu/smoke.sh`)."))
    if (found := records.get("cifar")) and "teacher" in found["figures"]:
        parts.append(cifar_table(found["figures"]))
    if missing := [name for name in GPU_RECORDS if name not in records]:
        parts.append(NOT_MEASURED.format(", ".join(missing)))
    return "".join(parts)


def _paragraph(text: str) -> str:
    return f"\n{textwrap.fill(text, 120, break_on_hyphens=False)}\n"


def cifar_table(figures: dict[str, Any]) -> str:
    """A row for each student of the teacher as it was measured last."""
    teacher, own = figures["teacher"], figures["classifier"]
    rows = [row for row in figures.values() if "ratio" in row and row["teacher_images"] == teacher["teacher_images"]]
    head = CIFAR.format(device=teacher["device"], parameters=teacher["parameters"] / 1e6, fd=_interval(teacher["fd"]),
                        nfe=teacher["nfe"],
                        real=_interval(figures["real"]["fd"]), accuracy=own["accuracy"],
                        batch=" or ".join(map(str, sorted({row["batch"] for row in rows}))))
    return head + "".join(f"| `{row['method']}` | {row['nfe']} | {_interval(row['fd'])} | {_interval(row['ratio'])} "
                          f"| {row['updates']:,} | {row['seconds'] / 60:.1f} |\n" for row in rows)


def _interval(found: dict[str, float | None]) -> str:
    return f"{found['value']:.2f}" + ("" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})")


PAGES = {"recipes.md": recipe_page, "methods.md": method_page, "gpu.md": gpu_page}

if __name__ == "__main__":
    for page, write in PAGES.items():
        (DOCS / page).write_text(write().rstrip() + "\n", encoding="utf-8")
        print(f"wrote docs/{page}")
