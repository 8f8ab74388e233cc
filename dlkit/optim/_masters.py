"""fp32 masters of 16-bit parameters: join and split of csrc/optim/math.h in torch's ops, for checkpoints and averages.

A master is two halves. The parameter itself is one. The other, 16 bits, is `state["remainder"]`: the bits of an int16,
viewed in the parameter's dtype, because not all tools that move checkpoints know int16. The user may write to the
parameter: such elements are found before the halves are joined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dlkit.optim._state import StatefulOptimizer
from dlkit.optim._tensors import SIXTEEN_BITS, like, local


def bits(tensor: Tensor) -> Tensor:
    """The same memory as int16."""
    return tensor if tensor.dtype == torch.int16 else tensor.view(torch.int16)


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master of a 16-bit parameter."""
    high, rest = param.detach(), bits(remainder).to(torch.int32)
    wide = high.float()
    if high.dtype == torch.bfloat16:
        joined = ((bits(high).to(torch.int32) << 16) + rest).view(torch.float32)
        return torch.where((high == 0) | ~wide.isfinite(), wide, joined)
    joined = (wide.double() + rest.double() * _unit(wide)).float()
    return torch.where((rest == 0) | (bits(high) == 0) | ~wide.isfinite(), wide, joined)


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the 16-bit parameter, its remainder) of an fp32 master."""
    if dtype == torch.bfloat16:
        whole = master.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
        high = (whole + 0x8000) >> 16
        rest = whole - (high << 16)
        param = torch.where(master.isnan(), 0x7FC0, high).to(torch.int32).to(torch.int16).view(dtype)
        rest = torch.where((param == 0) | ~param.isfinite(), 0, rest).to(torch.int16)
    else:
        param = master.to(dtype)
        wide = param.float()
        rest = ((master.double() - wide.double()) / _unit(wide)).round().clamp(max=32767)
        rest = torch.where(wide.isfinite(), rest, 0.0).to(torch.int16)
        # A parameter of +0 means that the user wrote it; a value too small for fp16 is kept with -0.
        param = torch.where((param == 0) & (rest != 0), -0.0, param)
    return param, rest.view(dtype)


def _unit(wide: Tensor) -> Tensor:
    """The value of 1 in an fp16 remainder: 2^-16 of the last place of the parameter."""
    _, exponent = torch.frexp(torch.where(wide.isfinite(), wide, 1.0).double().abs().clamp(min=2.0**-14))
    return torch.ldexp(torch.ones_like(wide, dtype=torch.float64), exponent - 27)


class MasterOptimizer(StatefulOptimizer):
    """The part of OnePass that keeps masters. The user may write to one half of each, the parameter."""

    _versions: Any  # torch.classes.dlkit.OptimVersions: which parameters were written since a step

    def _has_master(self, param: Tensor) -> bool:
        """A parameter that was cast to fp32 in the meantime has none, whatever its state still holds."""
        return param.dtype in SIXTEEN_BITS and param in self.state and "remainder" in self.state[param]

    def _exact(self, param: Tensor) -> Tensor:
        if self._has_master(param):
            return like(param, join(local(param), local(self.state[param]["remainder"])))
        whole = param.detach()
        return whole.float() if param.dtype in SIXTEEN_BITS else whole.clone()

    def master_parameters(self) -> Iterator[Tensor]:
        """The parameters at full precision, in the order of the groups: fp32 masters where there are any.

        Yields:
            Copies of the parameters' shapes: fp32 for 16-bit parameters, else in the parameter's dtype.

        Raises:
            RuntimeError: averaged weights are swapped in.
        """
        self._refuse_if_swapped("master_parameters")
        self._restart_written_masters()
        return (self._exact(param) for _, param in self._params())

    def _restart_remainder(self, param: Tensor, written: bool) -> bool:
        """A remainder starts again at 0 where its parameter was written. True if the state got a copy to compare."""
        state = self.state[param]
        remainder, copy = bits(local(state["remainder"])), state.get("param_copy")
        if copy is not None:
            remainder.masked_fill_(bits(local(param.detach())) != bits(local(copy)), 0)
        elif written:  # what was written and what was not cannot be told apart yet
            remainder.zero_()
            state["param_copy"] = param.detach().clone()
            return True
        return False

    @torch.no_grad()
    def _restart_written_masters(self) -> None:
        """Remainders of what was written since the last step start again at 0."""
        params = [param for _, param in self._params() if self._has_master(param)]
        if not params:
            return
        for param, changed in zip(params, self._versions.changed([*map(local, params)]), strict=True):
            self._restart_remainder(param, changed)
            if "param_copy" in self.state[param]:
                self.state[param]["param_copy"].copy_(param)

    def _trust_params(self, params: list[Tensor]) -> None:
        """Takes the parameters' present values for those that the last step left."""
        self._versions.trust([local(param) for param in params if self._has_master(param)])
