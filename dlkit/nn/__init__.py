"""torch.nn modules on fused kernels: same arguments, parameters and state_dict; only forward() differs."""

from dlkit.nn.layer_norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm

__all__ = ["AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm"]
