"""Stable Diffusion 3, with T5 and without."""
from tiny import tiny_sd3

from .case import Case

CASES = {
    "sd3": Case(lambda: tiny_sd3(t5=True), sizes=((16, 16), (16, 32)), call={"max_sequence_length": 6},
                still=("blocks.2.attn.add_q_proj",)),
    "sd3-no-t5": Case(tiny_sd3, sizes=((16, 16), (32, 16)), call={"max_sequence_length": 0},
                      still=("blocks.2.attn.add_q_proj",)),
}
