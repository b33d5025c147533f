"""For every test: one thread, no denormals, no network, no dashboard."""

import os

# before torch and its libraries are imported, and for the processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["WANDB_SILENT"] = "true"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
torch.set_flush_denormal(True)
