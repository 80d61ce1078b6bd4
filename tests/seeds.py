"""FUSED_LORA_TEST_SEED: another one draws other numbers in every random case; 0 always the same.

To be imported before anything is drawn, by what a test starts as well.
"""

import os

import torch

SEED = int(os.environ.get("FUSED_LORA_TEST_SEED", "0"))
# For a training whose end is known for one draw alone.
set_fixed_seed = torch.manual_seed
if SEED:
    APART = 1_000_003 * SEED
    torch.manual_seed = lambda seed: set_fixed_seed(seed + APART)

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            return super().manual_seed(seed + APART)

    torch.Generator = Generator
