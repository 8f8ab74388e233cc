"""The names and signatures of torch.nn.functional, and the fused operations beside them."""

import torch.fx

from dlkit.functional._batch_norm import (
    batch_norm,
    batch_norm_act,
    batch_norm_relu,
    group_norm,
    group_norm_act,
    instance_norm,
)
from dlkit.functional._bias_act_dropout import bias_gelu_dropout, bias_relu_dropout
from dlkit.functional._cross_entropy import cross_entropy
from dlkit.functional._dropblock2d import dropblock2d
from dlkit.functional._dropout import (
    alpha_dropout,
    drop_path,
    dropout,
    dropout1d,
    dropout2d,
    dropout3d,
    dropout_add,
    feature_alpha_dropout,
)
from dlkit.functional._layer_norm import (
    add_layer_norm,
    add_rms_norm,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm,
    rms_norm,
)
from dlkit.functional._linear_cross_entropy import linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "alpha_dropout",
    "batch_norm",
    "batch_norm_act",
    "batch_norm_relu",
    "bias_gelu_dropout",
    "bias_relu_dropout",
    "cross_entropy",
    "drop_path",
    "dropblock2d",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "feature_alpha_dropout",
    "group_norm",
    "group_norm_act",
    "instance_norm",
    "layer_norm",
    "linear_cross_entropy",
    "rms_norm",
]

for _name in ("dropout1d", "dropout2d", "dropout3d", "dropblock2d"):
    torch.fx.wrap(_name)  # they read their input's shape, which torch.fx does not know

# Pickles and traced programs keep this name of the module, not that of the file that defines the function.
for _name in __all__:
    globals()[_name].__module__ = __name__
