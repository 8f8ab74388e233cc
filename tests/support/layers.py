"""Every layer of dlkit.nn, and inputs for it."""

from typing import Any, NamedTuple

import torch

import dlkit
from support import of_ops


class Case(NamedTuple):
    cls: type
    arguments: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...]  # of the inputs

    @property
    def name(self) -> str:
        return self.cls.__name__

    def make(self) -> Any:
        """The layer with weights and statistics that change the result if they are left out."""
        layer = self.cls(*self.arguments)
        with torch.no_grad():
            for name, tensor in layer.state_dict().items():
                if tensor.is_floating_point():
                    tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.normal_()
        return layer

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape) for shape in self.shapes)


_IMAGES, _ROWS = (4, 6, 5, 5), (4, 3, 8)
_NN = dlkit.nn
CASES = {
    case.name: case
    for case in (
        Case(_NN.LayerNorm, (8,), (_ROWS,)),
        Case(_NN.RMSNorm, (8,), (_ROWS,)),
        Case(_NN.AddLayerNorm, (8,), (_ROWS, _ROWS)),
        Case(_NN.AddRMSNorm, (8,), (_ROWS, _ROWS)),
        Case(_NN.BatchNorm1d, (6,), ((4, 6, 5),)),
        Case(_NN.BatchNorm2d, (6,), (_IMAGES,)),
        Case(_NN.BatchNorm3d, (6,), ((4, 6, 2, 3, 4),)),
        Case(_NN.BatchNormReLU1d, (6,), ((4, 6, 5),)),
        Case(_NN.BatchNormReLU2d, (6,), (_IMAGES, _IMAGES)),
        Case(_NN.BatchNormReLU3d, (6,), ((4, 6, 2, 3, 4),)),
        Case(_NN.BatchNormAct1d, (6,), ((4, 6, 5),)),
        Case(_NN.BatchNormAct2d, (6,), (_IMAGES, _IMAGES)),
        Case(_NN.BatchNormAct3d, (6,), ((4, 6, 2, 3, 4),)),
        Case(_NN.SyncBatchNorm, (6,), (_IMAGES,)),
        Case(_NN.SyncBatchNormReLU, (6,), (_IMAGES, _IMAGES)),
        Case(_NN.SyncBatchNormAct, (6,), (_IMAGES, _IMAGES)),
        Case(_NN.GroupNorm, (2, 6), (_IMAGES,)),
        Case(_NN.GroupNormAct, (2, 6), (_IMAGES, _IMAGES)),
        Case(_NN.InstanceNorm1d, (6, 1e-5, 0.1, True), ((4, 6, 5),)),
        Case(_NN.InstanceNorm2d, (6, 1e-5, 0.1, True, True), (_IMAGES,)),
        Case(_NN.InstanceNorm3d, (6,), ((4, 6, 2, 3, 4),)),
        Case(_NN.Dropout, (0.4,), (_ROWS,)),
        Case(_NN.Dropout1d, (0.4,), ((4, 6, 5),)),
        Case(_NN.Dropout2d, (0.4,), (_IMAGES,)),
        Case(_NN.Dropout3d, (0.4,), ((4, 6, 2, 3, 4),)),
        Case(_NN.AlphaDropout, (0.4,), (_ROWS,)),
        Case(_NN.FeatureAlphaDropout, (0.4,), (_IMAGES,)),
        Case(_NN.DropPath, (0.4,), (_ROWS,)),
        Case(_NN.DropConnectLinear, (8, 5), (_ROWS,)),
        Case(_NN.DropoutAdd, (0.4,), (_ROWS, _ROWS)),
        Case(_NN.DropoutAddLayerNorm, (8, 0.4), (_ROWS, _ROWS)),
        Case(_NN.DropoutAddRMSNorm, (8, 0.4), (_ROWS, _ROWS)),
        Case(_NN.CrossEntropyLoss, (), (_ROWS, _ROWS)),  # targets of the input's shape are probabilities
        Case(_NN.LinearCrossEntropyLoss, (8, 5), ((4, 8), (4, 5))),
        Case(_NN.MultiheadAttention, (8, 2, 0.4), (_ROWS,) * 3),
        Case(_NN.TransformerEncoderLayer, (8, 2, 16, 0.4), (_ROWS,)),
        Case(_NN.TransformerDecoderLayer, (8, 2, 16, 0.4), (_ROWS, _ROWS)),
    )
}
OF_OPS = {name: Case(getattr(_NN, name), *row) for name, row in of_ops.table("OP_LAYERS").items()}
CASES |= OF_OPS
assert set(CASES) == set(_NN.__all__)
