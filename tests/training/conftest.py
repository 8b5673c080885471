"""One thread: the networks here are tiny, and test machines are shared."""

import torch

torch.set_num_threads(1)
