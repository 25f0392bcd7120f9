"""The commands. Nothing that imports torch is imported before a command needs it."""
from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import __version__
from .errors import RequestError, Stopped, of_the_system, printable

app = typer.Typer(name="stepdistill", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Turns a diffusers pipeline into a 1-8 step generator, and shows its quality against network "
                       "evaluations.")
say = Console()
complain = Console(stderr=True)
WIDE = 1000                         # columns of a pipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE",
                                           help="A YAML file, or a built-in name such as shapes/lcm.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE",
                                                help="Change one entry, such as train.lr=1e-4.")]
Out = Annotated[Path | None, typer.Option(help="Where to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.",
                                                callback=lambda scale: _scale("--guidance", scale))]
RESUME_AUTO = "--resume-auto"          # how `--resume auto` is handed on: an option cannot be both a switch and a choice
MANY = 10_000_000                      # of anything that is counted: beyond it a number is a slip
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
Target = "A run folder, an export folder, or a diffusers pipeline (folder or Hub id)."


@app.command()
def train(recipe: RecipeName, set_: Sets = None, out: Out = None,
          resume: Annotated[bool, typer.Option("--resume",
                                               help="Go on from the last checkpoint in --out; `--resume auto`: begin where "
                                                    "there is none.")] = False,
          resume_auto: Annotated[bool, typer.Option(RESUME_AUTO, hidden=True)] = False, as_json: Json = False) -> None:
    """Distil a student as a recipe says."""
    from .recipe import Recipe
    from .recipe.yaml import parse_set
    chosen = Recipe.load(recipe, parse_set(set_ or []))
    api = working()
    run = api.train(chosen, out=out, resume="auto" if resume_auto else resume)
    from .parallel import rank
    if rank() == 0:
        from .run.teacher_checks import family
        to = None if family(chosen).no_pipeline else "pipeline" if chosen.student.lora is None else "lora"
        after = None if to is None else f"stepdistill export {quote(str(run))} --to {to}"
        _emit({"run": str(run), "samples": str(run / "samples"), "log": str(run / "train.log"), "next": after}, as_json,
              lambda: tell(f"trained: {run}\n" + (f"its pictures: {run / 'samples'}" if after is None else f"next: {after}")))


@app.command()
def pairs(recipe: RecipeName, set_: Sets = None, out: Out = None) -> None:
    """Make and keep the teacher's pairs of noise and picture that a recipe trains on."""
    from .recipe import Recipe
    from .recipe.yaml import parse_set
    chosen = Recipe.load(recipe, parse_set(set_ or []))
    found = working().pairs(chosen, out=out)
    from .parallel import rank
    if rank() == 0:
        news = f"{found.made} of {found.count} pairs made in {found.seconds:.0f} s" if found.made else f"{found.count} pairs are there already"
        tell(f"{news}: {found.folder}")
        tell(f"next: stepdistill train {chosen.arguments}" + (f" --set {quote(f'data.pairs.path={out}')}" if out else ""))


@app.command()
def sample(target: Annotated[str, typer.Argument(metavar="TARGET", help=Target)],
           prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
           steps: Annotated[int | None, typer.Option(min=1, max=MANY, help="Steps; a student's own number unless given.")] = None,
           seed: Seed = 0, guidance: Guidance = None,
           out: Annotated[Path, typer.Option(metavar="PNG",
                                             help="The picture, or a sheet of them.")] = Path("sample.png"),
           as_json: Json = False) -> None:
    """Draw pictures with a student or a teacher."""
    api = working()
    drawn = api.sample(target, prompt, steps=steps, seed=seed, guidance=guidance, out=out)
    first = drawn[0][0] if isinstance(drawn[0], list) else drawn[0]                # of a video its first frame
    _emit({"picture": str(out), "prompts": prompt, "size": list(first.size), "seed": seed}, as_json, lambda: tell(f"wrote {out}"))


@app.command()
def bench(targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help=Target)],
          nfe: Annotated[str, typer.Option(metavar="1,2,4,8",
                                           help="Network evaluations; a guided step is two.")] = "1,2,4,8",
          samples: Annotated[int | None, typer.Option(min=2, max=MANY, help="Pictures a row; 2000, and 16 against the teacher.")] = None,
          guidance: Annotated[str | None, typer.Option(metavar="W,...", help="Scales of the teacher; the student's own "
                                                                             "unless given.")] = None,
          solvers: Annotated[str, typer.Option(metavar="NAME,...",
                                               help="Of the teacher.")] = "ddim,euler,heun,dpmpp_2m",
          features: Annotated[list[str] | None, typer.Option(help="A CLIPModel's or Dinov2Model's folder, or inception; several times for "
                                                                  "distances in several. That of Shapes unless given, and none against the teacher.")] = None,
          reference: Annotated[str | None, typer.Option(help="shapes, a folder of images, or teacher: its own pictures. Unless "
                                                             "given, shapes for what ships and teacher for your own.")] = None,
          prompts: Annotated[Path | None, typer.Option(help="One prompt a line; the reference's unless given.")] = None,
          few_step: Annotated[list[str] | None, typer.Option(metavar="TARGET", help="A few-step pipeline of others; may be given several times.")] = None,
          out: Annotated[Path, typer.Option(help="Folder of results.json and curve.png.")] = Path("bench"),
          seed: Seed = 0, as_json: Json = False) -> None:
    """Measure quality and latency against network evaluations, with the teacher on the same curve."""
    counts, scales = _numbers("--nfe", nfe, int, "1,2,4,8"), guidance and _numbers("--guidance", guidance, float, "1,3")
    api = working()
    from .data.prompts import all_captions, open_prompts
    texts = None if prompts is None else all_captions(open_prompts(prompts))
    results = api.bench(*targets, nfe=counts, samples=samples, out=out, seed=seed, guidance=scales,
                        solvers=solvers.split(","),
                          features=features or None, reference=reference, prompts=texts, few_step=few_step or ())
    _emit(results, as_json, lambda: _show_results(results, out))


@app.command()
def export(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
           to: Annotated[str, typer.Option(help="lora, pipeline or comfyui.")] = "lora",
           guidance: Guidance = None, out: Out = None,
           dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32 of the weights; float16 unless "
                                                          "given, float32 of a pipeline.")] = None,
           as_json: Json = False) -> None:
    """Write a student for stock diffusers, and prove that it draws the same pictures there."""
    api = working()
    folder = api.export(run, to=to, guidance=guidance, out=out, dtype=dtype)
    from .export import read_settings
    settings = read_settings(folder)
    left = f"\nwithout the teacher's {', '.join(settings['dropped'])}, which its card says too" if to == "pipeline" and settings["dropped"] else ""
    _emit({"folder": str(folder), **settings}, as_json, lambda: tell(f"proved and written: {folder}{left}"))


@app.command()
def extract(turbo: Annotated[str, typer.Argument(metavar="TURBO",
                                                 help="A pipeline that few steps are enough for: a folder or Hub id.")],
            base: Annotated[str, typer.Option(help="The pipeline that it was made of.")],
            rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")],
            out: Annotated[Path, typer.Option(help="Where to write.")],
            dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32 of its weights; float16 "
                                                      "unless given.")] = None,
            as_json: Json = False) -> None:
    """Make a LoRA of what one pipeline differs from another by."""
    found = working().extract(turbo, base, rank, out, dtype)
    plain = {"folder": str(out), "rank": rank, "kept": found.kept, "reached": found.reached,
             "beyond": {kind: {"tensors": count, "norm": norm} for kind, (count, norm) in found.beyond.items()},
             "layers": [vars(layer) for layer in found.layers]}
    _emit(plain, as_json, lambda: _show_extracted(found))


@app.command()
def verify(methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD...]",
                                                               help="All of them unless named.")] = None,
           seed: Annotated[int, typer.Option(min=0, help="Of the problems.")] = 0,
           out: Annotated[Path, typer.Option(help="Folder of verify.json, of pictures and of logs.")] = Path("verify"),
           as_json: Json = False) -> None:
    """Prove methods: against closed forms, by training on a mixture of known law, and by their contract."""
    working()
    from .proofs.run import verify as prove
    try:
        found = prove(*methods or (), seed=seed, out=out, done=_show_progress)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written but logs", 1)
    _emit(found, as_json, lambda: _show_proofs(found, out))
    if not all(row["passed"] for row in found["rows"]):
        raise typer.Exit(1)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="One method in full.")] = None,
            as_json: Json = False) -> None:
    """List the methods, or show one with its algorithm, defaults and paper."""
    from .recipe import catalogue
    rows = catalogue.methods(name)
    if name is None or as_json:
        _emit(rows, as_json, lambda: show(_table(rows, ("name", "title", "arxiv", "family", "data", "steps"))))
        return
    row = rows[0]
    tell(f"{name}  {row['title']}, https://arxiv.org/abs/{row['arxiv']}\n\n{catalogue.algorithm(name)}")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe in full.")] = None,
            as_json: Json = False) -> None:
    """List the built-in recipes, or print one."""
    from .recipe import catalogue
    rows = catalogue.recipes(name)
    if name is None or as_json:
        _emit(rows, as_json, lambda: show(_table(rows, ("name", "method", "teacher"))))
        return
    print(Path(rows[0]["path"]).read_text(encoding="utf-8"), end="")


@app.command()
def plan(recipe: RecipeName, set_: Sets = None, as_json: Json = False,
         gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a card, such as 16GB: does it fit, and what makes it fit?")] = None) -> None:
    """Say what a run will cost, before anything is loaded."""
    memory = None if gpu_memory is None else _bytes("--gpu-memory", gpu_memory)
    api = working()
    from .recipe import Recipe
    from .recipe.yaml import parse_set
    found = api.plan(Recipe.load(recipe, parse_set(set_ or [])), memory)
    _emit(found, as_json, lambda: _show_plan(found))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


def main() -> NoReturn:
    answer(lambda: app(args=spelled(sys.argv[1:])))


def spelled(arguments: list[str]) -> list[str]:
    """`--resume auto` and `--resume=auto` as one switch."""
    found: list[str] = []
    for argument in arguments:
        if argument == "auto" and found[-1:] == ["--resume"]:
            found[-1] = RESUME_AUTO
        else:
            found.append(RESUME_AUTO if argument == "--resume=auto" else argument)
    return found


def answer(command: Callable[[], object]) -> NoReturn:
    """Runs a command and exits: 0 done, 2 a bad request (one message, no traceback), 1 anything else. What the terminal's
    encoding does not hold is printed as a question mark."""
    sys.stdout.reconfigure(errors="replace")
    for name in ("SIGTERM", "SIGHUP"):                # schedulers, containers and closed terminals end a command as Ctrl-C does
        if name in dir(signal) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        command()
    except RequestError as error:
        _fail(str(error), 2)
    except Stopped as error:
        _fail(str(error), 1)
    except (OSError, MemoryError, RuntimeError) as error:
        if (message := of_the_system(error)) is None:
            raise
        _fail(message, 1 if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    sys.exit(0)


def working() -> Any:
    """The functions that do the work, with torch and diffusers."""
    tell("loading torch and diffusers", complain)                  # which takes seconds, on a busy machine a minute
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")       # it speaks while it is being imported
    from . import api
    api.quiet()
    return api


def tell(text: str, console: Console = say) -> None:
    """As it stands: no markup is read in it, and no line is broken, so that paths and commands can be pasted."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def show(table: Table) -> None:
    """In a terminal as wide as it is, with cells on several lines where need be; in a pipe as wide as the table is."""
    (say if say.is_terminal else Console(width=WIDE)).print(table)


def _fail(message: str, status: int) -> NoReturn:
    complain.print(f"[bold red]error:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
    sys.exit(status)


def _scale(option: str, number: float | None) -> float | None:
    if number is not None and not 1 <= number < math.inf:
        raise RequestError(f"{option} {number}: should be a finite number, such as 3.0, and at least 1, which is none")
    return number


def _numbers(option: str, text: str, kind: type, example: str) -> list[Any]:
    """Numbers of at least 1 with commas between."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(1 <= number <= MANY for number in found):
        raise RequestError(f"{option} {text}: should be finite numbers of at least 1, and at most {MANY:,}, with commas between, such as "
                           f"{example}")
    return found


def _emit(data: Any, as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show()


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(printable(_cell(row[column]))) for column in columns))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _show_results(results: dict[str, Any], out: Path) -> None:
    if "dim" not in results["protocol"]:                       # against the teacher's own pictures
        show(_table([row | row["metrics"] for row in results["rows"]],
                         ("target", "nfe", "guidance", "to_teacher", "clip_score", "diversity", "latency_ms")))
        tell(f"wrote {out / 'results.json'}, {out / 'report.html'} and {out / 'samples' / 'together.png'}")
        return
    from .evaluation.report import table
    show(table(results))
    tell(f"wrote {out / 'results.json'}, {out / 'curve.png'} and {out / 'report.html'}")


def _show_extracted(found: Any) -> None:
    rows = [{"layer": layer.name, "kept": f"{layer.kept:.1%}", "norm": f"{layer.norm ** 0.5:.3g}"}
            for layer in found.worst()]
    tell(f"the {len(rows)} layers of {len(found.layers)} of which the least is kept:")
    show(_table(rows, ("layer", "kept", "norm")))
    tell(f"kept in all: {found.kept:.2%} of the squared difference of these layers")
    if found.beyond:
        tell(f"out of its reach: {', '.join(f'{count} {kind}' for kind, (count, _) in found.beyond.items())}, "
             f"{1 - found.reached:.2%} of the whole squared difference")
    tell(f"wrote {found.folder}; a student begins with it by student: {{from: {found.folder}}}")


def _show_progress(rows: list[Any]) -> None:
    passed = sum(row.passed for row in rows)
    tell(f"{rows[0].method} {rows[0].kind}: {passed} of {len(rows)} rows pass", complain)


def _show_proofs(found: dict[str, Any], out: Path) -> None:
    rows = [row | {"passed": "yes" if row["passed"] else "NO"} for row in found["rows"]]
    show(_table(rows, ("method", "kind", "check", "figure", "tolerance", "passed")))
    passed = sum(row["passed"] for row in found["rows"])
    tell(f"{passed} of {len(rows)} rows pass on seed {found['seed']}, in {found['seconds']:.0f} s; "
              f"wrote {out / 'verify.json'} and a picture of each method beside it")


def _show_plan(found: dict[str, Any]) -> None:
    rows = [{"role": role, "parameters": f"{row['parameters']:,}", "trained": f"{row['trained']:,}",
             "size": _size(row["bytes"])}
            for role, row in found["roles"].items()]
    show(_table(rows, ("role", "parameters", "trained", "size")))
    passes = found["passes"]
    if "stages" in found:
        rows = [{"stage": str(i + 1), "method": row["method"], "steps": row["steps"],
                 "updates": f"{row['passes']['updates']:,}",
                 "forward": row["passes"]["forward"], "backward": row["passes"]["backward"],
                 "batch": row["passes"]["batch"],
                 "peak": _size(row["peak"]), "disk": _size(row["disk"])} for i, row in enumerate(found["stages"])]
        show(_table(rows, tuple(rows[0])))
        tell("in all:")
    tell(f"peak memory, roughly {_size(found['peak'])}; disk {_size(found['disk'])}")
    tell(f"network evaluations a step: {passes['forward']} forward, {passes['backward']} backward, "
              f"of {passes['batch']} samples each; {passes['updates']:,} steps")
    tell("downloads: " + (", ".join(found["downloads"]) or "none"))
    if "fit" in found:
        fit = found["fit"]
        changed = " ".join(f"--set '{name}={value}'" for name, value in fit["switches"].items())
        verdict = f"fits with {changed}: then roughly {_size(fit['peak'])}" if changed else "fits"
        if not fit["fits"]:
            verdict = f"does not fit, not even with {changed}: then roughly {_size(fit['peak'])}" if changed else "does not fit, and no switch is left"
        tell(f"on a card of {_size(fit['memory'])} it {verdict}")


def _bytes(option: str, text: str) -> float:
    """A size such as 16GB or 24 GiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|MiB|GB|GiB)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise RequestError(f"{option} is {text}; expected a size such as 16GB or 24GiB")
    return float(found[1]) * {"mb": 1e6, "mib": 2**20, "gb": 1e9, "gib": 2**30}[found[2].lower()]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
