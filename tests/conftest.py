"""Settings of the whole test run: one thread per test process, as workers on a shared machine have."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
