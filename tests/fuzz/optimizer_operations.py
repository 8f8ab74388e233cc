"""What users do to an optimizer and its parameters: each operation is done to both sides in the same way.

An operation is a function of a side and of plain data, and returns what a user would see. An argument is drawn from a
list of choices whose first is the simplest one (shrinking tries it), or by a function of (rng, kind of optimizer).
"""

from __future__ import annotations

import copy
import io
import pickle
import random
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fuzz.optimizer_world import (
    ENTRIES,
    FLOATING,
    LAYOUTS,
    RARE,
    SIXTEEN_BITS,
    Side,
    draw_entries,
    draw_spec,
    dtype_of,
    laid_out,
    resolve,
    resolved,
    values,
)


class Operation:
    def __init__(self, run: Callable[..., Any], weight: float, choices: dict[str, Any], options: set[str]) -> None:
        self.run, self.name, self.weight, self.choices = run, run.__name__, weight, choices
        self.steps = "steps" in options  # runs optimizer steps: values are compared within a bound
        self.plain = "plain" in options  # has no meaning to the oracle of dlkit's own options
        self.own = "own" in options  # needs dlkit's own options

    def draw(self, rng: random.Random, kind: str) -> dict[str, Any]:
        return {
            key: choice(rng, kind) if callable(choice) else rng.choice(choice) for key, choice in self.choices.items()
        }


OPERATIONS: dict[str, Operation] = {}


def operation(weight: float, *options: str, **choices: Any) -> Callable[..., Any]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS[run.__name__] = Operation(run, weight, choices, set(options))
        return run

    return register


def often(simple: Any, times: int, *others: Any) -> list[Any]:
    return [simple] * times + list(others)


SEED = list(range(500))
INDEX = list(range(6))
MASK = [0] * 5 + [1, 2, 3, 5, 6, 255]
GRADIENTS = often(
    "plain", 14, "zero", "huge", "tiny", "nan", "inf", "expanded", "transposed", "strided", "conj", "shared",
    "constant", "keep", "sparse", "wide",
)  # fmt: skip


# Gradients.


def give_gradients(params: list[Tensor], seed: int, leave: int, how: str, factor: float = 1.0) -> None:
    shared: dict[Any, Tensor] = {}
    for i, param in enumerate(params):
        if not param.requires_grad or how == "keep":
            continue
        if leave >> (i % 8) & 1:
            param.grad = None
            continue
        param.grad = None
        if how == "wide" and param.dtype in SIXTEEN_BITS and hasattr(param, "grad_dtype"):
            param.grad_dtype = None  # a gradient of any dtype
            param.grad = values(seed + i, param.shape, torch.float32) * factor
            continue
        grad = values(seed + i, param.shape, param.dtype) * factor
        if how == "shared":
            grad = shared.setdefault((param.shape, param.dtype), grad)
        param.grad = _gradient(grad, how)


def _gradient(grad: Tensor, how: str) -> Tensor:
    if how == "zero":
        return torch.zeros_like(grad)
    if how in ("huge", "tiny"):
        power = {"huge": 1.0, "tiny": -1.0}[how] * (3 if grad.dtype == torch.float16 else 15)
        return grad * 10.0**power
    if how in ("nan", "inf") and grad.numel():
        grad = grad.clone()
        grad.view(-1)[grad.numel() // 2] = float(how)
        return grad
    if how == "constant":
        return torch.full_like(grad, 0.5)
    if how == "expanded" and grad.dim():
        return grad[:1].expand(grad.shape) if grad.shape[0] else grad
    if how == "transposed":
        return laid_out(grad, "transposed")
    if how == "strided":
        return laid_out(grad, "strided")
    if how == "conj" and grad.is_complex():
        return grad.conj()
    if how == "sparse" and grad.dim() == 2 and grad.dtype == torch.float32:
        rows = torch.tensor([[0, grad.shape[0] - 1]])
        return torch.sparse_coo_tensor(rows, grad[rows[0]], grad.shape)
    return grad


def quadratic(side: Side) -> Callable[[], Tensor]:
    """A closure: half of the sum of squares of all parameters."""

    def closure() -> Tensor:
        side.optimizer.zero_grad()
        assert torch.is_grad_enabled()
        loss = torch.zeros((), dtype=torch.float64, requires_grad=True) + 1.0
        for param in side.trained():
            if param.requires_grad and (param.is_complex() or param.dtype in FLOATING):
                square = (param * param.conj()).real if param.is_complex() else param * param
                loss = loss + 0.5 * square.sum().double()
        loss.backward()
        return loss.detach()

    return closure


CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "float64": lambda: _DefaultDtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


class _DefaultDtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


# Steps.


@operation(
    30,
    "steps",
    seed=SEED,
    leave=MASK,
    grads=GRADIENTS,
    closure=often(False, 9, True),
    context=often("none", 20, "no_grad", "float64", "meta"),
)
def step(side: Side, seed: int, leave: int, grads: str, closure: bool, context: str) -> Any:
    if context == "meta" and (side.kind == "RMSprop" or closure):
        context = "none"  # torch's RMSprop makes its step counters there, the closure its loss
    give_gradients(side.trained(), seed, leave, grads)
    with CONTEXTS[context]():
        return side.optimizer.step(quadratic(side)) if closure else side.optimizer.step()


@operation(2, "steps", seed=SEED, leave=MASK, grads=GRADIENTS)
def step_second(side: Side, seed: int, leave: int, grads: str) -> Any:
    if len(side.optimizers) == 1:
        return None
    (params,) = (group["params"] for group in side.optimizers[1].param_groups)
    give_gradients(params, seed, leave, grads)
    return side.optimizers[1].step()


@operation(
    6,
    "steps",
    seed=SEED,
    leave=MASK,
    grads=often("plain", 10, "zero", "nan", "inf", "transposed", "conj", "shared", "sparse"),
    unscale=[False, True],
    clip=often(False, 3, True),
    second=often(False, 3, True),
    update=often(True, 3, False),
)
def step_scaled(
    side: Side, seed: int, leave: int, grads: str, unscale: bool, clip: bool, second: bool, update: bool
) -> Any:
    """As a training loop with a GradScaler does it; without an update another optimizer may follow."""
    scaler = side.scaler
    factor = float(scaler.scale(torch.ones(())))
    optimizer = side.optimizers[-1 if second else 0]
    params = list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values())
    give_gradients(params, seed, leave, grads, factor)
    if unscale:
        scaler.unscale_(optimizer)
    if clip:
        torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
    result = scaler.step(optimizer)
    return [result, update_scaler(side) if update else None]


@operation(1)
def update_scaler(side: Side) -> str | None:
    try:
        side.scaler.update()
    except Exception as error:
        return type(error).__name__  # the step before it has been taken
    return None


@operation(4, set_to_none=[True, False])
def zero_grad(side: Side, set_to_none: bool) -> Any:
    grads = [weakref.ref(p.grad) for p in side.trained() if p.grad is not None]
    side.optimizer.zero_grad(set_to_none=set_to_none)
    return [grad() is None for grad in grads]


@operation(2, seed=SEED, leave=MASK, grads=GRADIENTS)
def set_gradients(side: Side, seed: int, leave: int, grads: str) -> None:
    give_gradients(side.trained(), seed, leave, grads)


# Groups.


@operation(
    3, specs=lambda rng, kind: [draw_spec(rng) for _ in range(rng.choice([1, 1, 2, 0]))],
    entries=lambda rng, kind: draw_entries(rng, kind, 0.25),
)  # fmt: skip
def add_group(side: Side, specs: list[Any], entries: dict[str, Any]) -> None:
    side.optimizer.add_param_group({"params": side.new(specs), **resolved(entries)})


@operation(2, group=INDEX, spec=lambda rng, kind: draw_spec(rng), first=[False, True])
def add_parameter(side: Side, group: int, spec: list[Any], first: bool) -> None:
    params = side.group(group)["params"]
    params.insert(0 if first else len(params), *side.new([spec]))


@operation(4, source=INDEX, target=INDEX, last=[True, False])
def move_parameter(side: Side, source: int, target: int, last: bool) -> None:
    """From the end of one group to the start of another, or the other way."""
    params, others = side.group(source)["params"], side.group(target)["params"]
    if not params:
        return
    if last:
        others.insert(0, params.pop())
    else:
        others.append(params.pop(0))


@operation(2, group=INDEX, position=INDEX)
def remove_parameter(side: Side, group: int, position: int) -> None:
    params = side.group(group)["params"]
    if params:
        param = params.pop(position % len(params))
        side.optimizer.state.pop(param, None)
        _forget(side, param)


@operation(0.5, group=INDEX, position=INDEX)
def repeat_parameter(side: Side, group: int, position: int) -> None:
    params = side.group(group)["params"]
    if params:
        params.append(params[position % len(params)])


@operation(2, group=INDEX, position=INDEX, state=["none", "moved"])
def replace_parameter(side: Side, group: int, position: int, state: str) -> None:
    """Another parameter in the same place, with or without the old one's state."""
    params = side.group(group)["params"]
    if not params:
        return
    position %= len(params)
    old = params[position]
    new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    side.names[id(new)] = len(side.params)
    side.params.append(new)
    params[position] = new
    if side.index(old) in side.writes:
        side.writes.add(side.index(new))
    if state == "moved" and old in side.optimizer.state:
        side.optimizer.state[new] = side.optimizer.state.pop(old)
    elif side.extras:
        side.optimizer.state.pop(old, None)  # a state dict cannot be made with states of unknown parameters
    _forget(side, old, new if state == "moved" else None)


def _forget(side: Side, param: Tensor, heir: Tensor | None = None) -> None:
    if hasattr(side.optimizer, "forget"):
        side.optimizer.forget(param, heir)


@operation(1, source=INDEX, target=INDEX)
def swap_groups(side: Side, source: int, target: int) -> None:
    groups = side.optimizer.param_groups
    a, b = source % len(groups), target % len(groups)
    groups[a], groups[b] = groups[b], groups[a]


@operation(0.7, group=INDEX, state=["dropped", "kept"])
def remove_group(side: Side, group: int, state: str) -> None:
    groups = side.optimizer.param_groups
    if len(groups) == 1:
        return
    for param in groups.pop(group % len(groups))["params"]:
        if state == "dropped" or side.extras:  # a state dict cannot be made with states of unknown parameters
            side.optimizer.state.pop(param, None)
            _forget(side, param)


def _draw_entry(rng: random.Random, kind: str) -> list[Any]:
    while True:
        key = rng.choice(list(ENTRIES[kind]))
        if rng.random() < RARE.get(key, 1.0) * 3:
            return [key, rng.choice(ENTRIES[kind][key])]


@operation(8, group=INDEX, entry=_draw_entry)
def set_entry(side: Side, group: int, entry: list[Any]) -> None:
    key, value = entry
    side.group(group)[key] = resolve(value)


@operation(1.5, group=INDEX, factor=[0.5, 0.0])
def scale_rate(side: Side, group: int, factor: float) -> None:
    """In place where the rate is a tensor."""
    lr = side.group(group)["lr"]
    if isinstance(lr, Tensor):
        lr.mul_(factor)
    else:
        side.group(group)["lr"] = lr * factor


# Weights.


@operation(
    5,
    index=INDEX,
    how=["zero_", "mask", "clamp_", "fill_", "element", "copy_", "neg_", "nan"],
    data=[False, True],
    seed=SEED,
)
def write_weights(side: Side, index: int, how: str, data: bool, seed: int) -> None:
    """In place, through the parameter or through `.data`."""
    param = side.pick(index)
    if param is None or not (param.is_complex() or param.dtype in FLOATING):
        return
    side.writes.add(side.index(param))
    with torch.no_grad():
        tensor = param.data if data else param
        if how == "zero_":
            tensor.zero_()
        elif how == "mask":
            tensor.mul_(values(seed, param.shape, torch.float32) > 0)
        elif how == "clamp_" and not param.is_complex():
            tensor.clamp_(-0.5, 0.5)
        elif how == "fill_":
            tensor.fill_(0.75)
        elif how == "element" and param.numel():
            tensor[(0,) * param.dim()] = 1.5
        elif how == "copy_":
            tensor.copy_(values(seed, param.shape, param.dtype))
        elif how == "neg_":
            tensor.neg_()
        elif how == "nan" and param.numel():
            tensor[(0,) * param.dim()] = float("nan")


@operation(5, index=INDEX, layout=list(LAYOUTS), grads=["dropped", "kept"])
def change_layout(side: Side, index: int, layout: str, grads: str) -> None:
    """`.data` is another tensor of the same values: a clone, channels_last, a part of a bigger one, ..."""
    param = side.pick(index)
    if param is None:
        return
    if grads == "dropped":
        param.grad = None
    if not side.still:
        param.data = laid_out(param.data, layout)


@operation(1.5, a=INDEX, b=INDEX, how=["same", "overlapping", "reversed order"])
def share_storage(side: Side, a: int, b: int, how: str) -> None:
    """Two parameters in one memory, by `.data`."""
    first = side.pick(a)
    if first is None or not (first.is_complex() or first.dtype in FLOATING):
        return
    fits = [p for p in side.trained() if p is not first and p.shape == first.shape and p.dtype == first.dtype]
    if not fits or side.extras.get("master_weights"):
        return  # which of two masters a shared value has is anyone's guess
    second = fits[b % len(fits)]
    side.writes |= {side.index(first), side.index(second)}
    count = first.numel()
    if how == "same":
        second.data = first.data
    elif how == "overlapping" and count > 1:
        both = torch.cat([first.data.reshape(-1), second.data.reshape(-1)[-1:]])
        first.data, second.data = both[:-1].view(first.shape), both[1:].view(first.shape)
    elif how == "reversed order" and first.dim() == 2 and first.shape[0] == first.shape[1]:
        second.data = first.data.t()


class Bag(nn.Module):
    """A module of given parameters."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for i, param in enumerate(params):
            self.register_parameter(f"p{i}", param)


@operation(
    3,
    "plain",
    dtype=["float64", "float32", "bfloat16", "float16"],
    how=often("data", 3, "module", "module", "swap"),
    state=often("loaded", 3, "left"),
    grads=often("dropped", 3, "kept"),
)
def cast(side: Side, dtype: str, how: str, state: str, grads: str) -> None:
    """A model goes to another dtype; its optimizer follows where state_dict is loaded."""
    params = [p for p in side.trained() if p.dtype in FLOATING]
    if grads == "dropped":
        for param in params:
            param.grad = None
    if how == "data":
        for param in params:
            param.data = param.data.to(dtype_of(dtype))
    else:
        torch.__future__.set_swap_module_params_on_conversion(how == "swap")
        try:
            Bag(params).to(dtype_of(dtype))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
    if state == "loaded":
        side.optimizer.load_state_dict(side.optimizer.state_dict())


@operation(1.5, index=INDEX, value=[False, True])
def freeze(side: Side, index: int, value: bool) -> None:
    param = side.pick(index)
    if param is not None and (param.is_complex() or param.dtype in FLOATING):
        param.requires_grad_(value)


# States.


@operation(2.5, index=INDEX, how=["clones", "all clones", "other layout"])
def replace_state(side: Side, index: int, how: str) -> bool:
    """By equal tensors, as offloading does; the old ones must be free."""
    if side.still:
        return True
    params = [side.pick(index)] if how != "all clones" else side.trained()
    old = []
    for param in params:
        if param is None or not side.optimizer.state.get(param):
            continue
        state = side.optimizer.state[param]
        old += [weakref.ref(value) for value in state.values() if isinstance(value, Tensor)]
        layout = "transposed" if how == "other layout" else None
        for key, value in list(state.items()):
            if isinstance(value, Tensor):
                fresh = laid_out(value, layout) if layout and value.layout == torch.strided else value.clone()
                state[key] = fresh
        del value, state, fresh
    return all(tensor() is None for tensor in old)


@operation(1.5, index=INDEX, how=["one", "all", "emptied", "keys"])
def clear_state(side: Side, index: int, how: str) -> None:
    state, param = side.optimizer.state, side.pick(index)
    if param is not None:
        for gone in side.trained() if how == "all" else [param]:
            _forget(side, gone)
    if how == "all":
        state.clear()
    elif param is not None and param in state:
        if how == "one":
            del state[param]
        elif how == "emptied":
            state[param] = {}
        else:
            state[param].clear()


@operation(1.5, index=INDEX, how=["halved", "zeroed", "steps"])
def write_state(side: Side, index: int, how: str) -> None:
    param = side.pick(index)
    for key, value in side.optimizer.state.get(param, {}).items() if param is not None else ():
        if not isinstance(value, Tensor) or key not in TORCH_STATES:
            continue
        if (key == "step") == (how == "steps"):
            value.fill_(3.0) if key == "step" else value.mul_(0.5 if how == "halved" else 0.0)


TORCH_STATES = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg")


# Checkpoints and copies.


def _groups(side: Side) -> list[dict[str, Any]]:
    return [{"params": list(group["params"])} for group in side.optimizer.param_groups]


def _new_optimizer(side: Side, state_dict: dict[str, Any]) -> None:
    side.forget_helpers()
    fresh = side.build(_groups(side))
    fresh.load_state_dict(state_dict)
    side.old.append(side.optimizers[0])
    side.optimizers[0] = fresh


@operation(4, how=["itself", "new", "file", "torch", "torch steps"])
def save_and_load(side: Side, how: str) -> Any:
    """Into itself, into a new optimizer, through a file, through torch's class."""
    if side.oracle:
        if how in ("new", "file"):
            side.forget_helpers()
        return None
    saved = side.optimizer.state_dict()
    if how == "itself":
        side.optimizer.load_state_dict(saved)
    elif how == "new":
        _new_optimizer(side, copy.deepcopy(saved))
    elif how == "file":
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        _new_optimizer(side, torch.load(file, weights_only=True))
    elif not side.extras:
        other = side.torch_class(_groups(side), **resolved(side.setup["options"]))
        other.load_state_dict(copy.deepcopy(saved))
        if how == "torch steps":
            other.step()
        _new_optimizer(side, copy.deepcopy(other.state_dict()))
    return None


@operation(1, "plain")
def keep_state_dict(side: Side) -> None:
    side.kept = copy.deepcopy(side.optimizer.state_dict())


@operation(1.5, "plain")
def load_kept_state_dict(side: Side) -> None:
    if side.kept is not None:
        side.optimizer.load_state_dict(side.kept)


@operation(0.5, "plain", "steps", flat=[False, True], new=[False, True])
def through_distributed_checkpoint(side: Side, flat: bool, new: bool) -> Any:
    """torch.distributed.checkpoint.state_dict on one process; makes missing states by a step with a rate of 0."""
    from torch.distributed.checkpoint import state_dict as dcp

    module = Bag(side.trained())
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(module, side.optimizer, options=options))
    if new:
        side.forget_helpers()
        side.old.append(side.optimizers[0])
        side.optimizers[0] = side.build(_groups(side))
    dcp.set_optimizer_state_dict(module, side.optimizer, saved, options=options)
    return sorted(saved)


@operation(2, how=["deepcopy", "pickle"])
def copy_everything(side: Side, how: str) -> None:
    """Parameters and optimizers together; gradients stay behind."""
    side.forget_helpers()
    for param in side.params:
        param.grad = None
    both = (side.params, [] if side.oracle else side.optimizers)
    params, optimizers = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    if side.oracle:
        for param, copied in zip(side.params, params, strict=True):
            param.data = copied.data
    else:
        side.old.append(side.optimizers)
        side.renamed(params)
        side.optimizers = optimizers


# Hooks and schedulers.


def _floats(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.dtype in FLOATING]


def _halve_gradients(optimizer: Any, *_: Any) -> None:
    for param in _floats(optimizer):
        if param.grad is not None and param.grad.layout == torch.strided:
            param.grad = param.grad * 0.5


def _set_rate(optimizer: Any, *_: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.02


def _write_weights(optimizer: Any, *_: Any) -> None:
    for param in _floats(optimizer)[:1]:
        param.data.mul_(0.5)


def _new_weights(optimizer: Any, *_: Any) -> None:
    for param in _floats(optimizer)[:1]:
        param.data = param.data * 0.5


def _drop_closure(optimizer: Any, args: Any, kwargs: Any) -> Any:
    return (optimizer,), {}


def _replace_states(optimizer: Any, *_: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if key in TORCH_STATES and key != "step" and isinstance(value, Tensor):
                state[key] = value * 0.5


def _halve_loaded_rate(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "lr": group["lr"] * 0.5} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def _halve_loaded_states(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """In place of the dictionary's entries."""
    state_dict["state"] = {
        index: {k: v * 0.5 if isinstance(v, Tensor) and k != "step" else v for k, v in state.items()}
        for index, state in state_dict["state"].items()
    }


def _tag_groups(optimizer: Any, state_dict: dict[str, Any]) -> None:
    for group in state_dict["param_groups"]:
        group["tag"] = 1


HOOKS: dict[str, tuple[str, Callable[..., Any]]] = {
    "halve gradients": ("register_step_pre_hook", _halve_gradients),
    "set rate": ("register_step_pre_hook", _set_rate),
    "write weights": ("register_step_pre_hook", _write_weights),
    "new weights": ("register_step_pre_hook", _new_weights),
    "drop closure": ("register_step_pre_hook", _drop_closure),
    "write weights after": ("register_step_post_hook", _write_weights),
    "new weights after": ("register_step_post_hook", _new_weights),
    "replace states after": ("register_step_post_hook", _replace_states),
    "set rate after": ("register_step_post_hook", _set_rate),
    "halve loaded rate": ("register_load_state_dict_pre_hook", _halve_loaded_rate),
    "halve loaded states": ("register_load_state_dict_pre_hook", _halve_loaded_states),
    "replace loaded states": ("register_load_state_dict_post_hook", _replace_states),
    "set rate when loaded": ("register_load_state_dict_post_hook", _set_rate),
    "tag saved groups": ("register_state_dict_post_hook", _tag_groups),
}


@operation(2, "plain", which=list(HOOKS))
def add_hook(side: Side, which: str) -> None:
    register, hook = HOOKS[which]
    handle = getattr(side.optimizer, register)(hook)
    handle.changes = which not in ("halve gradients", "set rate", "drop closure") and "loaded" not in which
    side.hooks.append(handle)


@operation(0.7, "plain")
def remove_hooks(side: Side) -> None:
    for handle in side.hooks:
        handle.remove()
    side.hooks = []


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    "LambdaLR": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (i + 1)),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
}


@operation(1, which=list(SCHEDULERS))
def add_scheduler(side: Side, which: str) -> None:
    side.schedulers.append(SCHEDULERS[which](side.optimizer))


@operation(2)
def step_scheduler(side: Side) -> list[Any]:
    for scheduler in side.schedulers:
        scheduler.step()
    return [[float(rate) for rate in scheduler.get_last_lr()] for scheduler in side.schedulers]


# dlkit's own options.


@operation(1.5, "own", group=INDEX, value=[0.9, 0.5, 0.0, None, 1.0])
def set_average(side: Side, group: int, value: float | None) -> None:
    side.group(group)["ema_decay"] = value


@operation(2, "own", step_between=[False, True])
def swap_averages(side: Side, step_between: bool) -> Any:
    """The averages into the parameters and back; no step may be taken in between."""
    optimizer = side.optimizer
    groups = [group for group in optimizer.param_groups if group.get("ema_decay") is not None and group["params"]]
    if not groups:
        return None
    optimizer.swap_ema()
    swapped = [param.detach().clone() for param in side.trained()]
    error = None
    if step_between:
        try:
            optimizer.step()
        except RuntimeError:
            error = "RuntimeError"
    optimizer.swap_ema()
    return [swapped, error]
