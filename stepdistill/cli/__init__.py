"""The commands. Nothing that imports torch is imported before a command needs it."""
from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape

from .. import __version__
from ..errors import RequestError, Stopped, of_the_system, printable
from .options import (
    MANY,
    RESUME_AUTO,
    X0,
    Checkpoint,
    Guidance,
    Json,
    Out,
    Plugins,
    RecipeName,
    Seed,
    Sets,
    Target,
    Weights,
    WithTeacher,
    completions,
    numbers,
    size_in_bytes,
)
from .printing import (
    complain,
    emit,
    first,
    show,
    show_checked,
    show_extracted,
    show_plan,
    show_progress,
    show_proofs,
    show_results,
    table,
    tell,
)

app = typer.Typer(name="stepdistill", no_args_is_help=True, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="Turns a diffusers pipeline into a 1-8 step generator, and shows its quality against network "
                       "evaluations.")


@app.command()
def train(recipe: RecipeName, set_: Sets = None, out: Out = None,
          resume: Annotated[bool, typer.Option("--resume",
                                               help="Go on from the last checkpoint in --out; `--resume auto`: "
                                                    "begin where there is none.")] = False,
          resume_auto: Annotated[bool, typer.Option(RESUME_AUTO, hidden=True)] = False, plugins: Plugins = None,
          as_json: Json = False) -> None:
    """Distil a student as a recipe says."""
    chosen = _chosen(recipe, set_, plugins)
    api = working()
    run = api.train(chosen, out=out, resume="auto" if resume_auto else resume)
    if first():
        from ..run.teacher_checks import family
        to, place = "pipeline" if chosen.student.lora is None else "lora", quote(str(run))
        after = (None if family(chosen).no_pipeline else
                 f"stepdistill bench {place} --nfe {chosen.steps * (1 + (chosen.guidance > 1))} --out {place}/bench"
                 if chosen.trains_solver else f"stepdistill export {place} --to {to}")
        emit({"run": str(run), "samples": str(run / "samples"), "log": str(run / "train.log"), "next": after}, as_json,
              lambda: tell(f"trained: {run}\n" + (f"its pictures: {run / 'samples'}" if after is None
                                                  else f"next: {after}")))


@app.command()
def pairs(recipe: RecipeName, set_: Sets = None, out: Out = None, plugins: Plugins = None) -> None:
    """Make and keep the teacher's pairs of noise and picture that a recipe trains on."""
    chosen = _chosen(recipe, set_, plugins)
    found = working().pairs(chosen, out=out)
    if first():
        news = (f"{found.made} of {found.count} pairs made in {found.seconds:.0f} s" if found.made
                else f"{found.count} pairs are there already")
        tell(f"{news}: {found.folder}")
        tell(f"next: stepdistill train {chosen.arguments}" + (f" --set {quote(f'data.pairs.path={out}')}"
                                                              if out else ""))


@app.command()
def sample(target: Annotated[str, typer.Argument(metavar="TARGET", help=Target)],
           prompt: Annotated[list[str], typer.Option(help="May be given several times.")],
           steps: Annotated[int | None,
                            typer.Option(min=1, max=MANY, help="Steps; a student's own number unless given.")] = None,
           seed: Seed = 0, guidance: Guidance = None,
           out: Annotated[Path, typer.Option(metavar="PNG", help="The picture, or a sheet.")] = Path("sample.png"),
           negative: Annotated[str | None, typer.Option(help="A negative prompt, where the call is guided.")] = None,
           checkpoint: Checkpoint = None, weights: Weights = None, plugins: Plugins = None,
           with_teacher: WithTeacher = None, x0: X0 = None,
           as_json: Json = False) -> None:
    """Draw pictures with a student or a teacher."""
    api = working()
    drawn = api.sample(target, prompt, steps=steps, seed=seed, guidance=guidance, out=out, checkpoint=checkpoint,
                       weights=weights, plugins=plugins, negative=negative, with_teacher=with_teacher, x0=x0)
    if first():
        shown = drawn[0][0] if isinstance(drawn[0], list) else drawn[0]            # of a video its first frame
        emit({"picture": str(out), "prompts": prompt, "size": list(shown.size), "seed": seed}, as_json,
             lambda: tell(f"wrote {out}"))


@app.command()
def bench(targets: Annotated[list[str], typer.Argument(metavar="TARGET...", help=Target)],
          nfe: Annotated[str | None, typer.Option(metavar="N,...", help="Network evaluations, 1,2,4,8 unless given; a "
                                                  "guided step is two.")] = None,
          samples: Annotated[int | None, typer.Option(min=2, max=MANY, help="Pictures a row; 2000, and 16 against "
                                                      "the teacher.")] = None,
          guidance: Annotated[str | None, typer.Option(metavar="W,...", help="Scales of the teacher; the student's own "
                                                                             "unless given.")] = None,
          solvers: Annotated[str, typer.Option(metavar="NAME,...",
                                               help="Of the teacher.")] = "ddim,euler,heun,dpmpp_2m",
          features: Annotated[list[str] | None, typer.Option(
              help="A CLIPModel's or Dinov2Model's folder, or inception; several times for distances in several. That "
                   "of Shapes unless given, and none against the teacher.")] = None,
          reference: Annotated[str | None, typer.Option(
              help="shapes, a folder of images, or teacher: its own pictures. Unless given, shapes for what ships and "
                   "teacher for your own.")] = None,
          prompts: Annotated[Path | None, typer.Option(help="One prompt a line; the reference's unless given.")] = None,
          few_step: Annotated[list[str] | None, typer.Option(metavar="TARGET", help="A few-step pipeline of others; "
                                                             "may be given several times.")] = None,
          out: Annotated[Path, typer.Option(help="Folder of results.json and curve.png.")] = Path("bench"),
          metric: Annotated[list[str] | None, typer.Option(
              metavar="NAME[=FOLDER]", help="What people prefer (pickscore, hpsv2=FOLDER), or a figure of a plugin; "
                                            "may be given several times.")] = None,
          compose: Annotated[list[str] | None, typer.Option(
              metavar="LORA", help="Does the student go with this LoRA? A bench of its own; may be given several "
                                   "times.")] = None,
          scales: Annotated[str | None, typer.Option(metavar="S,...", help="Strengths of --compose; 0.5,0.75,1 unless "
                                                     "given.")] = None,
          plugins: Plugins = None, with_teacher: WithTeacher = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Measure quality and latency against network evaluations, with the teacher on the same curve."""
    counts = nfe and numbers("--nfe", nfe, int, "1,2,4,8")
    guided = guidance and numbers("--guidance", guidance, float, "1,3")
    strengths = scales and numbers("--scales", scales, float, "0.5,1", least=0)
    api = working()
    from ..data.prompts import texts_of
    results = api.bench(*targets, nfe=counts, samples=samples, out=out, seed=seed, guidance=guided,
                        solvers=solvers.split(","), compose=compose or (), scales=strengths, plugins=plugins,
                        features=features or None, reference=reference, prompts=texts_of(prompts),
                        few_step=few_step or (), metrics=metric or (), with_teacher=with_teacher)
    if first():
        emit(results, as_json, lambda: show_results(results, out))


@app.command()
def export(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
           to: Annotated[str, typer.Option(help="lora, pipeline or comfyui.")] = "lora",
           guidance: Guidance = None, out: Out = None,
           dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32 of the weights; float16 unless "
                                                          "given, float32 of a pipeline.")] = None,
           checkpoint: Checkpoint = None, weights: Weights = None,
           push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to this repository of "
                                                    "the Hub, private if it is new.")] = None,
           public: Annotated[bool, typer.Option("--public", help="A new repository is for all to see.")] = False,
           as_json: Json = False) -> None:
    """Write a student for stock diffusers, and prove that it draws the same pictures there."""
    api = working()
    folder = api.export(run, to=to, guidance=guidance, out=out, dtype=dtype, checkpoint=checkpoint, weights=weights,
                        push=push, public=public)
    from ..export import read_settings
    settings = read_settings(folder)
    left = (f"\nwithout the teacher's {', '.join(settings['dropped'])}, which its card says too" if to == "pipeline"
            and settings["dropped"] else "")
    emit({"folder": str(folder), **settings}, as_json, lambda: tell(f"proved and written: {folder}{left}"))


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
    emit(plain, as_json, lambda: show_extracted(found))


@app.command()
def check(lora: Annotated[str, typer.Argument(metavar="LORA", help="A .safetensors file, or an export folder.")],
          base: Annotated[str, typer.Option(help="The pipeline that it is for: a folder or Hub id.")],
          out: Out = None, prompts: Annotated[Path | None, typer.Option(help="One prompt a line.")] = None,
          samples: Annotated[int, typer.Option(min=10, max=MANY, help="Pictures of the best calls.")] = 2000,
          seed: Seed = 0, guidance: Guidance = None,
          features: Annotated[str | None,
                              typer.Option(help="A CLIPModel's folder; that of Shapes unless given.")] = None,
          reference: Annotated[str | None, typer.Option(
              help="`shapes`, a folder of pictures, or `base`: its own; shapes for what ships.")] = None,
          as_json: Json = False) -> None:
    """Find how a few-step LoRA of anybody's is called best."""
    api = working()
    from ..data.prompts import texts_of
    found = api.check(lora, base, out=out, prompts=texts_of(prompts), samples=samples, seed=seed, guidance=guidance,
                      features=features, reference=reference)
    emit(found.plain, as_json, lambda: show_checked(found))


@app.command()
def undistil(turbo: Annotated[str, typer.Argument(metavar="PIPELINE", help="A few-step pipeline or an export folder.")],
             prompts: Annotated[str | None, typer.Option(help="Of its samples: a .txt file of one a line.")] = None,
             updates: Annotated[int, typer.Option(min=1, max=MANY, help="Training steps.")] = 2000,
             samples: Annotated[int, typer.Option(min=1, max=MANY, help="Its own pictures, to train on.")] = 1000,
             rank: Annotated[int, typer.Option(min=1, max=16_384, help="Of the adapter.")] = 32,
             steps: Annotated[int | None, typer.Option(min=1, max=MANY, help="Its own, where unrecorded.")] = None,
             to: Annotated[str, typer.Option(help="diffusers, kohya or ai-toolkit.")] = "diffusers", out: Out = None,
             resume: Annotated[bool, typer.Option("--resume", help="Go on in --out; `--resume auto`: begin.")] = False,
             resume_auto: Annotated[bool, typer.Option(RESUME_AUTO, hidden=True)] = False, set_: Sets = None,
             as_json: Json = False) -> None:
    """Make the adapter with which style LoRAs are trained on a few-step model."""
    from ..recipe.yaml import parse_set
    sets, api = parse_set(set_ or []), working()
    if own := [name for name in sets if name in signature(api.undistil).parameters]:
        raise RequestError(f"--set {own[0]}: undistil says that by an option of its own: see `stepdistill undistil "
                           "--help`")
    folder = api.undistil(turbo, prompts=prompts, updates=updates, samples=samples, rank=rank, steps=steps, to=to,
                                out=out, resume="auto" if resume_auto else resume, **sets)
    emit({"folder": str(folder)}, as_json, lambda: tell(f"proved and written: {folder}\nits card says how it is used: "
                                                        f"{folder / 'README.md'}"))


@app.command()
def verify(methods: Annotated[list[str] | None, typer.Argument(metavar="[METHOD...]",
                                                               help="All of them unless named.")] = None,
           seed: Annotated[int, typer.Option(min=0, help="Of the problems.")] = 0, plugins: Plugins = None,
           out: Annotated[Path, typer.Option(help="Folder of verify.json, of pictures and of logs.")] = Path("verify"),
           fast: Annotated[bool, typer.Option("--fast", help="Closed forms and contracts alone.")] = False,
           as_json: Json = False) -> None:
    """Prove methods: against closed forms, by training on a mixture of known law, and by their contract."""
    working()
    from ..proofs.run import verify as prove
    try:
        found = prove(*methods or (), seed=seed, out=out, fast=fast, done=show_progress, plugins=plugins)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written but logs", 1)
    emit(found, as_json, lambda: show_proofs(found, out))
    if not all(row["passed"] for row in found["rows"]):
        raise typer.Exit(1)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(
                help="One method in full.",
                autocompletion=lambda incomplete: completions("methods", incomplete))] = None,
            plugins: Plugins = None, as_json: Json = False) -> None:
    """List the methods, or show one with its algorithm, defaults and paper."""
    from ..recipe import catalogue
    rows = catalogue.methods(name, plugins)
    if name is None or as_json:
        emit(rows, as_json, lambda: show(table(rows, ("name", "title", "arxiv", "family", "data", "steps"))))
        return
    row = rows[0]
    paper = row["title"] + (f", https://arxiv.org/abs/{row['arxiv']}" if row["arxiv"] else "")
    tell(f"{name}  {paper}\n\n{catalogue.algorithm(name)}")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="One recipe in full.")] = None,
            plugins: Plugins = None,
            schema: Annotated[bool,
                              typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
            as_json: Json = False) -> None:
    """List the built-in recipes, or print one."""
    from ..recipe import catalogue
    if schema:
        from ..recipe import editors
        emit(editors.schema(), True, None)
        return
    rows = catalogue.recipes(name, plugins)
    if name is None or as_json:
        emit(rows, as_json, lambda: show(table(rows, ("name", "method", "teacher"))))
        return
    print(Path(rows[0]["path"]).read_text(encoding="utf-8"), end="")


@app.command()
def plan(recipe: RecipeName, set_: Sets = None, as_json: Json = False, plugins: Plugins = None,
         gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a card, such as 16GB: does it "
                                                        "fit, and what makes it fit?")] = None) -> None:
    """Say what a run will cost, before anything is loaded."""
    memory = None if gpu_memory is None else size_in_bytes("--gpu-memory", gpu_memory)
    found = working().plan(_chosen(recipe, set_, plugins), memory)
    emit(found, as_json, lambda: show_plan(found))


@app.command()
def doctor(run: Annotated[Path,
                          typer.Argument(metavar="RUN", help="A run folder, of a training that is over or goes on.")],
           as_json: Json = False) -> None:
    """Say in words how a run is doing, and what helps. Exit status 1 where something ails it."""
    found = working().doctor(run)
    emit([one.plain for one in found], as_json, lambda: tell("\n".join(one.words for one in found)))
    if any(one.now for one in found):
        raise typer.Exit(1)


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
    """Runs a command and exits: 0 done, 2 a bad request (one message, no traceback), 1 anything else. What the
    terminal's encoding does not hold is printed as a question mark."""
    sys.stdout.reconfigure(errors="replace")
    # schedulers, containers and closed terminals end a command as Ctrl-C does
    for name in ("SIGTERM", "SIGHUP"):
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
    from .. import api
    api.quiet()
    return api


def _chosen(recipe: str, set_: list[str] | None, plugins: str | None) -> Any:
    """The recipe with what was --set, and its plugins."""
    from ..recipe import Recipe
    from ..recipe.yaml import parse_set
    return Recipe.load(recipe, parse_set(set_ or []) | ({} if plugins is None else {"plugins": plugins}))


def _fail(message: str, status: int) -> NoReturn:
    complain.print(f"[bold red]error:[/] {escape(printable(message))}", highlight=False, soft_wrap=True)
    sys.exit(status)
