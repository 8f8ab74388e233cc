"""Subclasses of torch.nn modules with fused kernels: same arguments, parameters and state_dict; forward() alone differs."""

from dlkit.nn.layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
