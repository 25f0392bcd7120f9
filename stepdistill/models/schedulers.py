"""Stock schedulers under a teacher's noise: those that students leave with, and those that teachers are measured under."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import SchedulerMixin

NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
         "prediction_type", "shift", "use_dynamic_shifting")


def stock_scheduler(name: str, config: Mapping[str, Any], teacher: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler of class `name` on the teacher's config, changed by `config`. ValueError for unknown keys.

    `from_config` replaces values that were defaults of the teacher's class by those of the new class, and classes
    differ in their default betas: what defines the noise is therefore handed over explicitly.
    """
    cls = getattr(diffusers, name)
    accepted = cls._get_init_keys(cls)
    unknown = sorted(set(config) - accepted)
    if unknown:
        raise ValueError(f"{name} of diffusers {diffusers.__version__} has no setting {', '.join(unknown)}; "
                         f"it has {', '.join(sorted(accepted - {'self'}))}")
    noise = {key: teacher.config[key] for key in NOISE if key in teacher.config and key in accepted}
    return cls.from_config(teacher.config, **{**noise, **config})
