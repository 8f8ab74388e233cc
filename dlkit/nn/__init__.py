"""Layers of torch.nn on fused kernels, with the same arguments, parameters and state_dict, and fused layers."""

from dlkit.nn.attention import MultiheadAttention
from dlkit.nn.batch_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)
from dlkit.nn.cross_entropy import CrossEntropyLoss, LinearCrossEntropyLoss
from dlkit.nn.dropout import (
    AlphaDropout,
    DropBlock2d,
    DropConnectLinear,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    DropoutAdd,
    DropoutAddLayerNorm,
    DropoutAddRMSNorm,
    DropPath,
    FeatureAlphaDropout,
)
from dlkit.nn.group_norm import GroupNorm, GroupNormAct, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from dlkit.nn.layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from dlkit.nn.sync_batch_norm import SyncBatchNorm, SyncBatchNormAct, SyncBatchNormReLU
from dlkit.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "CrossEntropyLoss",
    "DropBlock2d",
    "DropConnectLinear",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FeatureAlphaDropout",
    "GroupNorm",
    "GroupNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncBatchNormReLU",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
