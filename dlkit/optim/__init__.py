"""torch.optim's optimizers with the whole step in one pass over memory, clipping included.

optimizer = dlkit.optim.AdamW(dlkit.optim.param_groups(model, weight_decay=0.01), lr=1e-3, max_norm=1.0)
"""

from dlkit.optim._clip import clip_grad_norm_
from dlkit.optim._groups import param_groups
from dlkit.optim.adam import Adam, AdamW
from dlkit.optim.rmsprop import RMSprop
from dlkit.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop", "clip_grad_norm_", "param_groups"]
