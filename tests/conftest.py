"""Settings for every test."""

import torch

# The models are so small that a second thread costs more than it gives, and tests run side by side.
torch.set_num_threads(1)
