"""What every tuning's tests need before anything else is imported: one thread, since the models are tiny."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
