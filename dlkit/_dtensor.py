"""How dlkit's ops run on DTensors: every op has shardings, a rule, or a refusal.

Norms and activations have shardings: torch.distributed.tensor picks the cheapest, moves what does not fit and runs the
op on each process's part. Random ops have rules, because a part does not tell which elements of the whole tensor it
holds: the mask is drawn for the whole tensor and cut as the input is. It is then the same on every mesh and in one
process. All processes of a mesh take the seed of its first one. Ops that do more than dropout are computed in several
steps then: in 16 bits they round once more than in one pass.

dlkit._ops imports this file at the first call on tensors of a subclass, if torch.distributed.tensor is loaded then.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from dlkit import functional

_ops = torch.ops.dlkit

# The ops that have shardings, and those that have a rule.
_sharded: set[str] = set()
_ruled: set[str] = set()

# Placements along one dimension of the mesh: of the results, then by name of the arguments that are tensors.
Sharding = tuple[Sequence[Any], dict[str, Any]]


def _sharding(name: str) -> Callable[[Callable[..., Iterator[Sharding]]], None]:
    """Registers a function of the op's arguments that yields the placements on which the op can run unchanged."""
    overload = getattr(_ops, name).default
    arguments = [argument.name for argument in overload._schema.arguments]

    def register(shardings: Callable[..., Iterator[Sharding]]) -> None:
        _sharded.add(name)

        @register_sharding(overload)
        def _(*args: Any, **kwargs: Any) -> list[tuple[list[Any], list[Any]]]:
            given = dict(zip(arguments, args, strict=False)) | kwargs
            return [
                (list(results), [None if given[key] is None else inputs.get(key) for key in given])
                for results, inputs in shardings(given)
            ]

    return register


@_sharding("layer_norm_forward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    stats, rms = given["stats"], given["rms"]
    for rows in (Replicate(), *map(Shard, range(given["input"].ndim - given["normalized_ndim"]))):
        total, mean = given["residual"] is not None, stats and not rms
        results = [rows, rows if total else None, rows if mean else None, rows if stats else None]
        yield results, {"input": rows, "residual": rows, "weight": Replicate(), "bias": Replicate()}


@_sharding("layer_norm_backward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    for rows in (Replicate(), *map(Shard, range(given["input"].ndim - given["normalized_ndim"]))):
        inputs = dict.fromkeys(("grad_output", "grad_sum", "input", "mean", "rstd"), rows)
        yield _wanted([rows, *[_sum_over(rows)] * 2], given), inputs | {"weight": Replicate(), "bias": Replicate()}


@_sharding("batch_norm_forward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    for data, statistics, channels in _batch_norm_placements(given):
        running = channels if given["groups"] == 0 else statistics
        vectors = dict.fromkeys(("weight", "bias"), channels) | dict.fromkeys(("running_mean", "running_var"), running)
        inputs = {"input": data, "residual": data, "num_batches_tracked": Replicate()}
        yield [data, statistics, statistics], inputs | vectors


@_sharding("batch_norm_backward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    for data, statistics, channels in _batch_norm_placements(given):
        inputs = dict.fromkeys(("grad_output", "input", "y_or_residual"), data) | dict.fromkeys(
            ("mean", "rstd"), statistics
        )
        summed = channels if channels.is_shard() else _sum_over(data)
        yield _wanted([data, data, summed, summed], given), inputs | {"weight": channels, "bias": channels}


def _batch_norm_placements(given: dict[str, Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Placements of data, of statistics, and of tensors with one element per channel."""
    yield Replicate(), Replicate(), Replicate()
    if given["groups"] > 0:  # statistics are [N, groups]
        yield Shard(0), Shard(0), Replicate()
        return
    yield Shard(1), Shard(0), Shard(0)
    if not given["training"]:
        for dim in range(given["input"].ndim):
            if dim != 1:
                yield Shard(dim), Replicate(), Replicate()


@_sharding("bias_act_dropout_forward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    for data, bias in _bias_placements(given):
        yield [data, Replicate()], {"input": data, "bias": bias, "rng_state": Replicate()}


@_sharding("bias_act_dropout_backward")
def _(given: dict[str, Any]) -> Iterator[Sharding]:
    for data, bias in _bias_placements(given):
        grad_bias = bias if bias.is_shard() else _sum_over(data)
        results = [data, grad_bias if given["needs_bias"] and given["bias"] is not None else None]
        yield results, {"grad_output": data, "input": data, "bias": bias, "rng_state": Replicate()}


def _bias_placements(given: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield Replicate(), Replicate()
    last = given["input"].ndim - 1
    for dim in range(last + 1):
        yield Shard(dim), Shard(0) if dim == last else Replicate()


def _sum_over(data: Any) -> Any:
    """The placement of a sum that each process takes over its part of the data."""
    return Partial() if data.is_shard() else Replicate()


def _wanted(results: list[Any], given: dict[str, Any]) -> list[Any]:
    return [placement if wanted else None for placement, wanted in zip(results, given["output_mask"], strict=True)]


# An op may have its shardings in the file of its function: SHARDINGS, {kernel op: a function as those above}.
for _file in list(vars(functional).values()):
    for _name, _shardings in getattr(_file, "SHARDINGS", {}).items():
        _sharding(_name)(_shardings)


# Rules.


def _rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function of (op, *arguments) for calls on DTensors. NotImplemented stands for the op's shardings."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def rule(cls: type, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch.no_grad():
                return function(op, *args, **(kwargs or {}))

        for name in names:
            torch.library.register_torch_dispatch(f"dlkit::{name}", DTensor, rule)
            _ruled.add(name)
        return function

    return register


def _cut(*inputs: DTensor) -> list[DTensor]:
    """The inputs in one placement: where the first of them is sharded, else the next; sums are added up."""
    meshes = [tensor.device_mesh if isinstance(tensor, DTensor) else None for tensor in inputs]
    if any(mesh is None or mesh != meshes[0] for mesh in meshes):
        raise RuntimeError(f"dropout: expected DTensors on one mesh, got {meshes}; None is a plain tensor")
    placements = [
        next((placement for placement in along if type(placement) is Shard), Replicate())
        for along in zip(*(tensor.placements for tensor in inputs), strict=True)
    ]
    return [_moved(tensor, placements) for tensor in inputs]


def _moved(tensor: Any, placements: Sequence[Any]) -> Any:
    """The tensor with these placements: itself where it has them already, or is no DTensor."""
    if not isinstance(tensor, DTensor) or tensor.placements == tuple(placements):
        return tensor
    detached: Any = tensor.detach()  # torch 2.10 fails over a tensor that requires a gradient
    return detached.redistribute(placements=placements)


def _like(part: Tensor, whole: DTensor) -> DTensor:
    kept: dict[str, Any] = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(part, whole.device_mesh, whole.placements, **kept)


def _part_of(whole: Tensor, input: DTensor) -> Tensor:
    """This process's part of a tensor that every process has, cut as the input. Dimensions of size 1 stay."""
    placements = [
        placement if isinstance(placement, Shard) and whole.size(placement.dim) > 1 else Replicate()
        for placement in input.placements
    ]
    mesh = input.device_mesh
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(placements=placements).to_local()


def _is_whole(input: DTensor) -> bool:
    return all(placement.is_replicate() for placement in input.placements)


def _agreed(rng_state: Tensor, input: DTensor) -> Tensor:
    """The random state that the first process of the mesh drew."""
    mesh = input.device_mesh
    coordinate = mesh.get_coordinate()
    for dim in range(mesh.ndim):
        if mesh.size(dim) > 1 and coordinate is not None:
            placements: list[Any] = [Replicate()] * mesh.ndim
            placements[dim] = Partial()
            own = rng_state if coordinate[dim] == 0 else torch.zeros_like(rng_state)
            rng_state = DTensor.from_local(own, mesh, placements, run_check=False).full_tensor()
    return rng_state


def _state_for(input: DTensor, p: float, generator: Any) -> Tensor:
    """Seed and offset of a call. Every process draws, also one without a part of the input: generators stay in step."""
    one = torch.ones(1, dtype=input.dtype, device=input.to_local().device)
    if p == 1 or input.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=one.device)
    return _agreed(_ops.dropout_forward.default(one, 0.5, 1, 1.0, 0.0, 0.0, generator)[1], input)


def _kept(input: DTensor, rng_state: Tensor, p: float, inner: int) -> Tensor:
    """True where elements of this process's part stay; broadcasts against it. One value per `inner` elements."""
    shape, size, dim = list(input.shape), 1, input.ndim
    while size != inner:
        dim -= 1
        size, shape[dim] = size * shape[dim], 1
    # The narrowest type that the op takes.
    ones = torch.ones(shape, dtype=torch.bfloat16, device=rng_state.device)
    return _part_of(_ops.dropout_apply.default(ones, rng_state, p, 1, 1.0, 0.0, 0.0), input) != 0


@_rule("dropout_apply")
def _dropout_apply(
    op: Any, input: DTensor, rng_state: Tensor, p: float, inner: int, scale: float, shift: float, dropped: float
) -> DTensor:
    (x,) = _cut(input)
    part = x.to_local()
    if _is_whole(x):
        return _like(_ops.dropout_apply.default(part, rng_state, p, inner, scale, shift, dropped), x)
    if x.numel() == 0:
        return _like(torch.empty_like(part), x)
    kept = _ops.dropout_apply.default(part, rng_state, 0.0, 1, scale, shift, dropped)
    return _like(torch.where(_kept(x, rng_state.to(part.device), p, inner), kept, dropped), x)


@_rule("dropout_forward")
def _dropout_forward(
    op: Any, input: DTensor, p: float, inner: int, scale: float, shift: float, dropped: float, generator: Any = None
) -> tuple[DTensor, Tensor]:
    rng_state = _state_for(input, p, generator)
    return _dropout_apply(op, input, rng_state, p, inner, scale, shift, dropped), rng_state


@_rule("dropout_forward_")
def _dropout_forward_(
    op: Any,
    input: DTensor,
    rng_state: Tensor | None,
    p: float,
    inner: int,
    scale: float,
    shift: float,
    dropped: float,
    generator: Any = None,
) -> Tensor:
    _check_written(op, input)
    rng_state = _state_for(input, p, generator) if rng_state is None else rng_state.clone()
    input.to_local().copy_(_dropout_apply(op, input, rng_state, p, inner, scale, shift, dropped).to_local())
    return rng_state


def _check_written(op: Any, input: DTensor) -> None:
    if any(type(placement) is not Shard and not placement.is_replicate() for placement in input.placements):
        name = op.name().removeprefix("dlkit::").removesuffix("_forward_")
        raise RuntimeError(
            f"{name}(): expected a DTensor of placements Shard and Replicate to change in place, got "
            f"{input.placements}; leave out inplace, or redistribute() it first"
        )


@_rule("dropout_add_forward")
def _dropout_add_forward(
    op: Any, input: DTensor, residual: DTensor, rng_state: Tensor | None, p: float, generator: Any = None
) -> tuple[DTensor, Tensor]:
    x, added = _cut(input, residual)
    rng_state = _state_for(x, p, generator) if rng_state is None else rng_state.clone()
    part, rest = x.to_local(), added.to_local()
    if _is_whole(x) or x.numel() == 0:
        return _like(_ops.dropout_add_forward.default(part, rest, rng_state, p)[0], x), rng_state
    scale = 1 / (1 - p) if p < 1 else 0.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = torch.add(rest.to(wide), part.to(wide), alpha=scale).to(x.dtype)
    return _like(torch.where(_kept(x, rng_state.to(part.device), p, 1), total, rest), x), rng_state


@_rule("dropout_layer_norm_forward")
def _(
    op: Any,
    input: DTensor,
    residual: DTensor,
    rng_state: Tensor | None,
    p: float,
    normalized_ndim: int,
    weight: DTensor | None,
    bias: DTensor | None,
    eps: float,
    rms: bool,
    stats: bool,
    generator: Any = None,
) -> tuple[Any, ...]:
    total, drawn = _dropout_add_forward(op, input, residual, rng_state, p, generator)
    norm = _ops.layer_norm_forward.default
    y, _, mean, rstd = norm(total, None, normalized_ndim, weight, bias, eps, rms, stats)
    return y, total, mean, rstd, drawn


@_rule("dropout_layer_norm_backward")
def _(
    op: Any,
    grad_output: DTensor,
    grad_sum: DTensor | None,
    input: DTensor,
    mean: DTensor | None,
    rstd: DTensor,
    weight: DTensor | None,
    bias: DTensor | None,
    rng_state: Tensor,
    p: float,
    normalized_ndim: int,
    output_mask: Sequence[bool],
) -> tuple[Any, ...]:
    needs_input, needs_residual, *needs_parameters = output_mask
    wanted = [needs_input or needs_residual, *needs_parameters]
    norm = _ops.layer_norm_backward.default
    grad, *parameters = norm(grad_output, grad_sum, input, mean, rstd, weight, bias, normalized_ndim, wanted)
    grad_input = _dropped(op, grad, rng_state, p) if needs_input else None
    return grad_input, grad if needs_residual else None, *parameters


def _dropped(op: Any, input: DTensor, rng_state: Tensor, p: float) -> DTensor:
    return _dropout_apply(op, input, rng_state, p, 1, 1 / (1 - p) if p < 1 else 0.0, 0.0, 0.0)


@_rule("bias_act_dropout_forward")
def _(
    op: Any,
    input: DTensor,
    bias: DTensor | None,
    rng_state: Tensor | None,
    activation: int,
    p: float,
    generator: Any = None,
) -> Any:
    if p == 0:
        return NotImplemented
    drawn = _state_for(input, p, generator) if rng_state is None else rng_state.clone()
    return _dropped(op, op(input, bias, None, activation, 0.0)[0], drawn, p), drawn


@_rule("bias_act_dropout_backward")
def _(
    op: Any,
    grad_output: DTensor,
    input: DTensor,
    bias: DTensor | None,
    rng_state: Tensor,
    activation: int,
    p: float,
    needs_bias: bool,
) -> Any:
    if p == 0 and isinstance(rng_state, DTensor):
        return NotImplemented
    mesh = input.device_mesh
    unused = DTensor.from_local(rng_state, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return op(_dropped(op, grad_output, rng_state, p), input, bias, unused, activation, 0.0, needs_bias)


@_rule("dropblock2d_apply")
def _dropblock2d_apply(op: Any, input: DTensor, rng_state: Tensor, p: float, block_size: int) -> DTensor:
    (x,) = _cut(input)
    part = x.to_local()
    factors = _part_of(_ops.dropblock2d_apply.default(_ones(x), rng_state, p, block_size), x)
    return _like(torch.where(factors != 0, part * factors, 0.0).to(x.dtype), x)


def _ones(input: DTensor) -> Tensor:
    """A tensor of ones: DropBlock of it gives the factor of each element."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return torch.ones(input.shape, dtype=wide, device=input.to_local().device)


@_rule("dropblock2d_forward")
def _dropblock2d_forward(
    op: Any, input: DTensor, rng_state: Tensor | None, p: float, block_size: int, generator: Any = None
) -> tuple[DTensor, Tensor]:
    drawn = _ops.dropblock2d_forward.default(_ones(input), rng_state, p, block_size, generator)[1]
    if rng_state is None:
        drawn = _agreed(drawn, input)
    return _dropblock2d_apply(op, input, drawn, p, block_size), drawn


@_rule("dropblock2d_forward_")
def _(op: Any, input: DTensor, rng_state: Tensor | None, p: float, block_size: int, generator: Any = None) -> Tensor:
    _check_written(op, input)
    y, drawn = _dropblock2d_forward(op, input, rng_state, p, block_size, generator)
    input.to_local().copy_(y.to_local())
    return drawn


@_rule("batch_norm_forward")
def _(
    op: Any,
    input: DTensor,
    residual: DTensor | None,
    weight: DTensor | None,
    bias: DTensor | None,
    running_mean: DTensor | None,
    running_var: DTensor | None,
    num_batches_tracked: DTensor | None,
    groups: int,
    training: bool,
    *others: Any,
) -> Any:
    """Running statistics are written to where they lie, so the shardings must not have to move them."""
    if not training or running_mean is None or running_var is None:
        return NotImplemented
    mesh = input.device_mesh
    along = 0 if groups > 0 else 1  # groups have running statistics for each sample, [N, groups]
    stays = [type(placement) is Shard and placement.dim == along for placement in input.placements]
    parts = 1
    for dim, sharded in enumerate(stays):
        parts *= mesh.size(dim) if sharded else 1
    if input.size(along) < parts:  # torch has no sharding with empty parts
        stays = [False] * mesh.ndim
    data = [Shard(along) if sharded else Replicate() for sharded in stays]
    running = [Shard(0) if sharded else Replicate() for sharded in stays]
    channels = running if groups == 0 else [Replicate()] * mesh.ndim
    moved = [_moved(tensor, data) for tensor in (input, residual)]
    moved += [_moved(tensor, channels) for tensor in (weight, bias)]
    moved += [_moved(tensor, running) for tensor in (running_mean, running_var)]
    own = (input, residual, weight, bias, running_mean, running_var)
    if all(one is other for one, other in zip(moved, own, strict=True)):
        return NotImplemented
    outputs = op(*moved, num_batches_tracked, groups, training, *others)
    for written, found in ((running_mean, moved[4]), (running_var, moved[5])):
        if found is not None and written is not found:
            written.copy_(found)
    return outputs


@_rule("batch_norm_statistics", "batch_norm_apply", "batch_norm_backward_sums", "batch_norm_backward_apply")
def _(op: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "SyncBatchNorm: expected plain tensors, got a DTensor; take BatchNorm, which normalizes a DTensor over all of "
        "its batch, or call the layer on to_local()"
    )


def _row_cut(*tensors: Any) -> tuple[list[Any], list[Any]]:
    """(the parts of logits, targets and the like that belong to this process's rows, the placements): cut along the
    batch where the first of them is, else whole."""
    first = tensors[0]
    for tensor in tensors:
        if isinstance(tensor, Tensor) and not (isinstance(tensor, DTensor) and tensor.device_mesh == first.device_mesh):
            raise RuntimeError(
                "cross_entropy: expected DTensors on one mesh, got a plain tensor: distribute_tensor() it"
            )
    batched = first.ndim > 1
    rows = [p if type(p) is Shard and p.dim == 0 and batched else Replicate() for p in first.placements]
    return [t if t is None else _moved(t, rows).to_local() for t in tensors], rows


def _everywhere(tensor: Any) -> Any:
    """The whole tensor, on every process: for weights and scalars."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sum_of_parts(parts: Sequence[Any], like: DTensor, rows: Sequence[Any]) -> list[Tensor]:
    """Sums over the processes that hold different rows."""
    own = torch.stack([torch.as_tensor(part, dtype=torch.float64) for part in parts])
    summed = [_sum_over(placement) for placement in rows]
    return list(DTensor.from_local(own, like.device_mesh, summed, run_check=False).full_tensor())


def _counted(target: Tensor, weight: Tensor | None, probabilities: bool, ignore_index: int) -> tuple[Any, Any]:
    """The divisors of the means of the loss and of the z-loss, summed over these rows."""
    if probabilities:
        rows = target.numel() // target.shape[0 if target.ndim == 1 else 1] if target.numel() else 0
        return rows, rows
    kept = target != ignore_index
    if weight is None:
        return kept.sum(), kept.sum()
    return (weight.double()[torch.where(kept, target, 0)] * kept).sum(), kept.sum()


def _as_loss(value: Tensor, dtype: torch.dtype, like: DTensor) -> DTensor:
    mesh = like.device_mesh
    return DTensor.from_local(value.to(dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)


def _of_rows(part: Tensor | None, like: DTensor, rows: Sequence[Any], dim: int = 0) -> Any:
    """A part with the rows along `dim` as a DTensor."""
    if part is None:
        return None
    placements = [Shard(dim) if placement.is_shard() else placement for placement in rows]
    shape = list(part.shape)
    if shape:
        per_sample = part.shape[dim] // max(1, _moved(like, rows).to_local().shape[0]) if like.ndim > 1 else 1
        shape[dim] = like.shape[0] * per_sample if any(p.is_shard() for p in rows) else part.shape[dim]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


@_rule("cross_entropy_forward")
def _cross_entropy_forward(
    op: Any, input: DTensor, target: DTensor, weight: DTensor | None, reduction: int, ignore_index: int,
    label_smoothing: float, z_scale: float, softcap: float, wide: bool,
) -> tuple[Any, ...]:  # fmt: skip
    (x, t), rows = _row_cut(input, target)
    w = _everywhere(weight)
    if x.numel() == 0:
        raise RuntimeError("cross_entropy: expected rows for every process of the mesh, got fewer")
    loss, z, stats, _ = op(x, t, w, 2 if reduction else 0, ignore_index, label_smoothing, z_scale, softcap, True)
    kept = _of_rows(stats, input, rows, 1)
    dtype = loss.dtype if wide else input.dtype
    if reduction == 0:
        narrow = [part if part is None else part.to(dtype) for part in (loss, z)]
        return _of_rows(narrow[0], input, rows), _of_rows(narrow[1], input, rows), kept, None
    counted = _counted(t, w, t.shape == x.shape, ignore_index)
    whole, z_whole, weights, count = _sum_of_parts([loss, 0.0 if z is None else z, *counted], input, rows)
    total = None
    if reduction == 1:
        total = _as_loss(torch.stack([weights, count]), loss.dtype, input)
        whole, z_whole = (
            (whole - z_whole) / weights + z_whole / count if z is not None else whole / weights,
            z_whole / count,
        )
    return _as_loss(whole, dtype, input), None if z is None else _as_loss(z_whole, dtype, input), kept, total


@_rule("cross_entropy_backward")
def _(
    op: Any, grad_loss: DTensor, input: DTensor, target: DTensor, weight: DTensor | None, stats: DTensor,
    total: DTensor | None, reduction: int, *options: Any,
) -> DTensor:  # fmt: skip
    (x, t), rows = _row_cut(input, target)
    grad = _moved(grad_loss, rows).to_local() if reduction == 0 else _everywhere(grad_loss)
    own = op(grad, x, t, _everywhere(weight), stats.to_local(), _everywhere(total), reduction, *options)
    return _like(own, _moved(input, rows))


@_rule("linear_cross_entropy_forward")
def _(
    op: Any, input: DTensor, linear_weight: DTensor, target: DTensor, linear_bias: DTensor | None,
    weight: DTensor | None, reduction: int, ignore_index: int, label_smoothing: float, z_scale: float, softcap: float,
    wide: bool, output_mask: Sequence[bool],
) -> tuple[Any, ...]:  # fmt: skip
    """The weight is gathered: rows are cut, classes are not."""
    (x, t), rows = _row_cut(input, target)
    parameters = [_everywhere(tensor) for tensor in (linear_weight, linear_bias, weight)]
    code = 2 if reduction else 0
    counted = _counted(t, parameters[2], t.ndim == 2, ignore_index)
    if weight is not None and z_scale and reduction == 1:
        # The sum below is divided by the weights, which the z-loss is not to be: it is multiplied with them first.
        weights, count = _sum_of_parts(counted, input, rows)
        z_scale *= float(weights / count) if weights != 0 else 1.0
    loss, z, *grads = op(
        x, parameters[0], t, *parameters[1:], code, ignore_index, label_smoothing, z_scale, softcap, True, output_mask
    )
    dtype = loss.dtype if wide else input.dtype
    if reduction == 0:
        narrow = [part if part is None else part.to(dtype) for part in (loss, z)]
        return _of_rows(narrow[0], input, rows), _of_rows(narrow[1], input, rows), None, None, None
    whole, z_whole, weights, _ = _sum_of_parts([loss, 0.0 if z is None else z, *counted], input, rows)
    if reduction == 1:
        whole, z_whole = whole / weights, z_whole / weights
        grads = [grad if grad is None else grad / weights.where(weights != 0, 1.0) for grad in grads]
    own = _placed_gradients([grad if grad is None else grad.to(loss.dtype) for grad in grads], input, rows)
    return _as_loss(whole, dtype, input), None if z is None else _as_loss(z_whole, dtype, input), *own


@_rule("linear_cross_entropy_backward")
def _(
    op: Any, grad_loss: DTensor, input: DTensor, linear_weight: DTensor, target: DTensor, linear_bias: DTensor | None,
    weight: DTensor | None, *options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    (x, t, grad), rows = _row_cut(input, target, grad_loss)
    grads = op(grad, x, _everywhere(linear_weight), t, _everywhere(linear_bias), _everywhere(weight), *options)
    return _placed_gradients(grads, input, rows)


def _placed_gradients(grads: Sequence[Tensor | None], input: DTensor, rows: Sequence[Any]) -> tuple[Any, ...]:
    """Gradients as DTensors: the input's is cut along its rows, the parameters' are sums over rows."""
    summed = [_sum_over(placement) for placement in rows]
    parameters = [
        grad if grad is None else DTensor.from_local(grad, input.device_mesh, summed, run_check=False)
        for grad in grads[1:]
    ]
    return (_of_rows(grads[0], input, rows), *parameters)


def _call_below_autograd(op: Any, *args: Any, **kwargs: Any) -> Any:
    """In inference mode the public op itself arrives here; its implementation then calls the kernel ops."""
    return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


def _refuse(op: Any, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{op.name()}: expected plain tensors, got a DTensor; call it on to_local()")


for _qualified in torch._C._dispatch_get_all_op_names():
    _name = _qualified.removeprefix("dlkit::")
    if _name == _qualified or _name in _ruled or _name in _sharded:
        continue
    _public = torch._C._dispatch_has_kernel_for_dispatch_key(_qualified, "CompositeExplicitAutograd")
    _rule(_name)(_call_below_autograd if _public else _refuse)
