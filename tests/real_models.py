"""Folders of pipelines that people have, with their published configs and no weights: what a plan is made from."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"
NAMES = tuple(sorted(path.stem for path in CONFIGS.glob("*.json")))


def described(name: str) -> dict[str, Any]:
    """{pipeline: its class, source: its Hub id, parameters: of its denoiser, index: more entries of model_index.json,
    components: name -> (library, class, config)}."""
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def write(name: str, folder: Path) -> Path:
    """The folder, as `save_pretrained` lays it out, without weights and tokenizers."""
    found = described(name)
    index = {"_class_name": found["pipeline"], "_diffusers_version": "0.42.1", **found["index"]}
    for part, (library, cls, config) in found["components"].items():
        index[part] = [library, cls]
        (folder / part).mkdir(parents=True)
        if part == "scheduler":
            text, named = json.dumps({"_class_name": cls, **config}), "scheduler_config.json"
        elif library == "diffusers":
            text, named = json.dumps({"_class_name": cls, **config}), "config.json"
        else:
            text, named = json.dumps({"architectures": [cls], **config}), "config.json"
        (folder / part / named).write_text(text, encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder
