"""Stable Diffusion by UNets."""
from tiny import tiny_pipeline

from .case import Case

CASES = {
    "sd": Case(tiny_pipeline, sizes=((16, 16), (16, 24))),
    "sd-v": Case(lambda: tiny_pipeline("v_prediction"), sizes=((16, 16), (24, 16))),
}
