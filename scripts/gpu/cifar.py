"""Distillation on CIFAR-10: a classifier, a class-conditional teacher, and students of it, in calls of a few minutes.

Every distance is between features of that classifier, of 10,000 samples to the 45,000 pictures that all were trained
on. What counts is a student's distance divided by its teacher's, with the interval of that ratio. A call takes what
comes next: the classifier, the teacher (several calls, each with an optimizer of its own), its distance, a student.
Between machines the folder `carried` of the work folder is what has to be kept, and the record.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cifar_measure as measure
import cifar_students as students
import cifar_train as training
import internals
import numpy as np
import torch
from cifar_data import CLASSES, load, scaled, split, write_folder
from common import ROOT, Clock, Record, device_of, parser
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

DATA, WORK, SAMPLES = ROOT.parent / "shared/data/cifar10-train.parquet", ROOT / "runs/gpu/cifar", 10_000
STEPS = 18                            # of Heun, by which the teacher is measured: 35 evaluations
MEASURING = 40.0                      # seconds that a row takes
LEAST = 60.0                          # seconds that are worth beginning a training for
RATE = 0.3 * 400e12                   # FLOP/s that --plan counts on
TINY = training.Sizes(side=16, classifier=(4, 8), teacher=(8, 16, 16), layers=1, groups=8, batch=16, epochs=1,
                      teacher_images=32, warmup=2)
TINY_STUDENTS = ("scm", "dmd2-1")
TINY_RECIPE = {"data.batch": 4, "train.updates": 2, "train.warmup": 0, "train.checkpoint_every": None,
               "train.precision": "fp32"}


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(seconds=440.0)
    made.add_argument("--data", type=Path, help="the pictures: .parquet or .npz; ../shared/data/cifar10-train.parquet "
                      "unless given")
    made.add_argument("--work", type=Path, help=f"where all lies that is made; {WORK.relative_to(ROOT)} unless given")
    made.add_argument("--students", nargs="*", choices=students.STUDENTS, help="which, in this order; all unless given")
    made.add_argument("--teacher-images", type=int, help="pictures that the teacher sees in all")
    made.add_argument("--samples", type=int, default=SAMPLES, help="of a row")
    made.add_argument("--compile", action="store_true", help="torch.compile in the teacher's training")
    made.add_argument("--whole", action="store_true", help="no student is cut short: it takes as many calls on "
                      "this machine as it needs")
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                      help="an entry of the students' recipes")
    made.add_argument("--plan", action="store_true", help="say how large the networks are and how long they "
                      "take, and stop")
    args = made.parse_args()
    if args.plan:
        print(plan(training.Sizes()))
        return
    clock, device = Clock(args.seconds), device_of(args)
    internals.quiet()
    try:
        Bench(args, clock, device).run()
    except internals.RequestError as error:
        sys.exit(str(error))


@dataclass(frozen=True)
class Measured:
    """Of the teacher: how many pictures it had seen, its features (n, D), its distance."""

    images: int
    features: Tensor
    fd: dict[str, float]


class Bench:
    """The pieces, in their order, and what they share."""

    def __init__(self, args: argparse.Namespace, clock: Clock, device: torch.device) -> None:
        self.args, self.clock, self.device = args, clock, device
        self.work = args.work or (Path(tempfile.mkdtemp(prefix="cifar-tiny-")) if args.tiny else WORK)
        self.carried, self.record = self.work / "carried", Record("cifar", args, device, any_card=True)
        self.overrides = internals.parse_set(args.set)
        self.begun = 0                                 # students in this call
        torch.backends.cudnn.benchmark = True          # shapes hardly change
        self.sizes = TINY if args.tiny else training.Sizes()
        if args.teacher_images:
            self.sizes = replace(self.sizes, teacher_images=args.teacher_images)
        self.samples = 5 * CLASSES if args.tiny else args.samples
        os.environ.setdefault("STEPDISTILL_CACHE", str(self.work / "cache"))
        pictures = load(args.data or (generated(self.work / "shapes.npz") if args.tiny else DATA))
        self.data, self.apart = (part.to(device) for part in split(pictures))

    def run(self) -> None:
        self.classifier = self.classify()
        self.real = measure.features(self.classifier, self.data.pixels)
        progress = self.teach()
        if progress.images >= self.sizes.teacher_images and self.room(MEASURING, "the teacher's distance"):
            teacher = self.measure_teacher(progress)
            for name in self.args.students or (TINY_STUDENTS if self.args.tiny else students.STUDENTS):
                if not self.student(name, teacher):
                    break
        self.keep()
        self.record.close()

    def keep(self) -> None:
        """What the next machine needs, to $OUT."""
        if out := os.environ.get("OUT"):
            shutil.copytree(self.carried, Path(out) / "carried", dirs_exist_ok=True)

    def room(self, seconds: float, what: str) -> bool:
        if self.args.tiny or self.clock.left > seconds:
            return True
        print(f"{what}: {max(0, self.clock.left):.0f} s are left, and {seconds:.0f} are wanted: call again")
        return False

    # -- the pieces ----------------------------------------------------------------------------------------------------

    def classify(self) -> training.Classifier:
        file, begun = self.carried / "classifier.safetensors", time.monotonic()
        if not file.is_file():
            training.train_classifier(self.data, file, self.sizes)
        network = training.load_classifier(file, self.sizes, self.device)
        if not self.record.has("classifier"):
            held_out, own = (training.accuracy(network, part) for part in (self.apart, self.data))
            self.record.add("classifier", {"accuracy": held_out, "accuracy_in_training": own,
                                           "parameters": parameters(network),
                                           "features": self.sizes.classifier[-1], "seconds": time.monotonic() - begun})
            print(f"classifier: {held_out:.1%} of the held-out pictures, {own:.1%} of its own")
        return network

    def teach(self) -> training.Progress:
        folder = self.carried / "teacher"
        progress = training.Progress.of(folder)
        if progress.images < self.sizes.teacher_images and self.room(LEAST, "the teacher"):
            progress = training.train_teacher(self.data, folder, self.sizes, self.clock, self.args.compile)
            self.keep()
            print(f"teacher: {progress.images:,} of {self.sizes.teacher_images:,} pictures in {progress.seconds:.0f} "
                  f"s and {progress.calls} calls; {folder} and {self.carried / 'classifier.safetensors'} are "
                  "to be kept")
        return progress

    def measure_teacher(self, progress: training.Progress) -> Measured:
        """Drawn anew on another machine, where its features are not at hand."""
        file = self.work / "measured" / f"teacher-{progress.images}-{self.samples}.safetensors"
        if not file.is_file():
            pixels = measure.drawn(internals.teacher_draws(self.carried / "teacher", STEPS, self.device), self.samples)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": measure.features(self.classifier, pixels), "shown": pixels[:measure.SHOWN]}, file)
        found = load_file(file)
        self.show("teacher", found["shown"])
        if not self.known("teacher", progress.images):
            held_out = measure.features(self.classifier, self.apart.pixels)
            fd = measure.distance(found["features"], self.real)
            self.record.add("real", {"fd": measure.distance(held_out, self.real), "samples": len(held_out)})
            self.record.add("teacher", {"fd": fd, "nfe": 2 * STEPS - 1, "samples": self.samples,
                                        "parameters": parameters(
                training.teacher_network(self.sizes)), "teacher_images": progress.images, "seconds": progress.seconds,
                "calls": progress.calls,
                "device": self.record.head["device"]})
            print(f"teacher: FD {said(fd)} in {2 * STEPS - 1} evaluations; held-out pictures "
                  f"{said(self.record.figures['real']['fd'])}")
        return Measured(progress.images, found["features"], self.record.figures["teacher"]["fd"])

    def student(self, name: str, teacher: Measured) -> bool:
        """Whether the next may begin. Trains what is left to train, and adds a row for each number of steps."""
        asked = students.STUDENTS[name].asked
        left = [steps for steps in asked if not self.known(row(name, steps), teacher.images)]
        if not left:
            return True
        run = self.work / "students" / f"{name}-{teacher.images}"
        if (self.record.again and len(left) == len(asked) and internals.is_run(run)
            and internals.finished(run, internals.recipe_of(run))):
            shutil.rmtree(run)
        until = Clock(self.clock.left - MEASURING * len(left))
        recipe = internals.recipe_of(run) if internals.is_run(run) else self.recipe(name, until)
        if recipe is None or not students.train(recipe, run, Clock(math.inf) if self.args.tiny else until):
            return False
        for steps in left:
            self.add_row(name, steps, run, recipe, teacher)
        return True

    def recipe(self, name: str, until: Clock) -> internals.Recipe | None:
        """Of a student that is begun now; None where another call should begin it: only the first of a call may be cut
        short, and with --whole none."""
        images = write_folder(self.data, self.work / "images")
        asked = students.recipe(name, self.carried / "teacher", images, (TINY_RECIPE if self.args.tiny else {})
                                | self.overrides)
        if self.args.tiny or self.args.whole:
            return asked
        if until.left < LEAST + students.NOTICE:
            return self.later(name)
        recipe = students.paced(asked, self.device, until.left)
        if recipe.train.updates < asked.train.updates and self.begun:
            return self.later(name)
        self.begun += 1
        print(f"{name}: {recipe.train.updates} of {asked.train.updates} updates", flush=True)
        return recipe

    def later(self, name: str) -> None:
        print(f"{name}: {max(0, self.clock.left):.0f} s are left, too few for it: call again")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def add_row(self, name: str, steps: int, run: Path, recipe: internals.Recipe, teacher: Measured) -> None:
        pixels = measure.drawn(internals.student_draws(run, steps, self.device), self.samples)
        found = measure.features(self.classifier, pixels)
        fd = measure.distance(found, self.real)
        ratio = measure.ratio(found, teacher.features, self.real, (fd["value"], teacher.fd["value"]), self.device)
        timing = json.loads((run / "timings.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        self.show(row(name, steps), pixels[:measure.SHOWN])
        self.record.add(row(name, steps), {
            "method": recipe.method, "nfe": steps, "trained_steps": recipe.steps, "fd": fd, "ratio": asdict(ratio),
            "samples": self.samples,
            "updates": recipe.train.updates, "batch": recipe.data.batch, "seconds": timing["seconds"],
            "teacher_images": teacher.images,
            "device": self.record.head["device"], "set": self.args.set})
        print(f"{row(name, steps)}: FD {said(fd)}, {said(asdict(ratio))} x the teacher's", flush=True)

    def known(self, key: str, images: int) -> bool:
        """Whether a row is recorded, of the teacher as it is."""
        return self.record.has(key) and self.record.figures[key]["teacher_images"] == images

    def show(self, name: str, pixels: Tensor) -> None:
        """A sheet of samples, ten classes a row, in the work folder and in $OUT."""
        file = self.work / "sheets" / f"cifar-{name.replace(' ', '-')}.png"
        internals.sheet(list(scaled(pixels).split(CLASSES)), file)
        if out := os.environ.get("OUT"):
            shutil.copy(file, out)


def row(name: str, steps: int) -> str:
    return f"{students.STUDENTS[name].method} {steps}"


def said(found: dict[str, Any]) -> str:
    held = "of no interval" if found["low"] is None else f"({found['low']:.3f} to {found['high']:.3f})"
    return f"{found['value']:.3f} {held}"


def parameters(network: torch.nn.Module) -> int:
    return sum(value.numel() for value in network.parameters())


def generated(file: Path) -> Path:
    """Pictures of Shapes in the place of CIFAR-10's."""
    images = internals.shapes(300, TINY.side)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), labels=np.arange(len(images)) % CLASSES)
    return file


def plan(sizes: training.Sizes) -> str:
    """Parameters, bytes between calls, and at RATE the seconds that passes take; a training pass is three forward
    ones."""
    lines, total = [], 0
    for name, make, call in (("classifier", lambda: training.Classifier(sizes.classifier),
                              lambda network, x: network(x)),
                             ("teacher", lambda: training.teacher_network(sizes),
                              lambda network, x: network(x, torch.zeros(1), torch.zeros(1, dtype=torch.long)))):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            network = make()
            call(network, torch.empty(1, 3, sizes.side, sizes.side))
        flops, count = counter.get_total_flops(), parameters(network)
        total += sum(2 * value.numel() for value in network.state_dict().values())
        lines.append(f"{name}: {count:,} parameters, {flops / 1e9:.3f} GFLOP forward, trained on "
                     f"{RATE / (3 * flops):,.0f} pictures a second")
    return "\n".join([*lines, f"carried: {total / 1e6:.2f} MB"])


if __name__ == "__main__":
    main()
