"""Accelerate's loop: prepare, accumulate, clip, skipped steps, save_state and load_state."""

import gc
import math
import weakref

import pytest
import torch
from support.runs import (
    EXACT,
    EXTRAS,
    OURS,
    ROUNDED,
    THEIRS,
    Run,
    assert_equal_run,
    assert_same_run,
    from_one_to_the_other,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    make_scaler,
    make_scheduler,
    with_either_library,
)

import dlkit

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed (make test-integration)")

STEPS = 10


def make_accelerator(precision="no", accumulate=1):
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate, step_scheduler_with_optimizer=True
    )
    if precision == "fp16":
        # Accelerate makes a scaler only for accelerators; autocast and the rest work on the CPU. The scale overflows
        # fp16 at first, and again after it has grown.
        accelerator.native_amp = True
        accelerator.scaler = make_scaler()
    return accelerator


class Training:
    """A model, its optimizer and scheduler, as in a script."""

    def __init__(self, library, name="AdamW", precision="no", accumulate=1, groups=False, **extras):
        self.accelerator = make_accelerator(precision, accumulate)
        model = make_model()
        params = [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[1:].parameters()}]
        optimizer = make_optimizer(library, name, params if groups else model.parameters(), **extras)
        scheduler = make_scheduler(optimizer)
        self.loader = torch.utils.data.DataLoader(make_batches(STEPS), batch_size=None)
        prepared = self.accelerator.prepare(model, optimizer, self.loader, scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.run = Run()

    def train(self, batches=None, clip=None):
        for batch in self.loader if batches is None else batches:
            self.step(batch, clip)
        return self.run.keep_weights(self.model)

    def step(self, batch, clip):
        accelerator, run = self.accelerator, self.run
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                loss = loss_of(self.model, batch)
            accelerator.backward(loss)
            norm = None
            if accelerator.sync_gradients and clip is not None:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.scheduler.step()
            if accelerator.sync_gradients:
                norm = getattr(self.optimizer.optimizer, "grad_norm", None) if norm is None else norm
                run.skipped.append(self.optimizer.step_was_skipped)
                if norm is not None and not run.skipped[-1] and math.isfinite(norm):
                    run.norms.append(float(norm))
                run.rates.append(self.scheduler.get_last_lr()[0])
                if accelerator.scaler is not None:
                    run.scales.append(accelerator.scaler.get_scale())
            self.optimizer.zero_grad()
        run.losses.append(loss.item())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fp32(name):
    assert_same_run(*(Training(library, name).train() for library in (OURS, THEIRS)), **EXACT)


def test_groups_with_rates_of_their_own():
    assert_same_run(*(Training(library, groups=True).train() for library in (OURS, THEIRS)), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bf16(name):
    assert_same_run(*(Training(library, name, "bf16").train() for library in (OURS, THEIRS)), **ROUNDED)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_accumulation_and_clipping(name):
    ours, theirs = (Training(library, name, accumulate=2).train(clip=0.1) for library in (OURS, THEIRS))
    assert min(theirs.norms) > 0.1, "nothing was clipped"
    assert len(theirs.norms) == STEPS // 2
    assert_same_run(ours, theirs, **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_max_norm_in_place_of_accelerates_clipping(name):
    ours = Training(OURS, name, accumulate=2, max_norm=0.1).train()
    theirs = Training(THEIRS, name, accumulate=2).train(clip=0.1)
    assert_same_run(ours, theirs, **EXACT)


def test_layers():
    ours, theirs = (Training(library) for library in (OURS, THEIRS))
    dlkit.replace(ours.model)
    assert any(isinstance(module, dlkit.nn.LayerNorm) for module in ours.model.modules())
    assert_same_run(ours.train(), theirs.train(), **EXACT)


# The scaler.


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fp16_with_a_scaler(name, clip):
    """Compares skipped steps, the scale, and the schedule, which waits at a skipped step."""
    ours, theirs = (Training(library, name, "fp16").train(clip=clip) for library in (OURS, THEIRS))
    assert any(theirs.skipped)
    assert_same_run(ours, theirs, **ROUNDED)


def test_fp16_accumulated():
    ours, theirs = (Training(library, precision="fp16", accumulate=2).train(clip=0.1) for library in (OURS, THEIRS))
    assert any(theirs.skipped)
    assert_same_run(ours, theirs, **ROUNDED)


@pytest.mark.parametrize(("name", "fused"), [("AdamW", None), ("SGD", None), ("AdamW", True)])
def test_max_norm_under_a_scaler(name, fused):
    """The norm is that of unscaled gradients. With fused=True the step unscales them, and a skipped one is not told."""
    ours = Training(OURS, name, "fp16", fused=fused, max_norm=0.1).train()
    theirs = Training(THEIRS, name, "fp16", fused=fused).train(clip=0.1)
    assert any(theirs.skipped) is not bool(fused)
    assert_same_run(ours, theirs, **ROUNDED)


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
def test_fused_under_a_scaler(clip):
    """Gradients that Accelerate has unscaled before it clips are not unscaled again.

    Not with SGD: if the first step is skipped, torch's fused one reads an uninitialized buffer.
    """
    ours, theirs = (Training(library, precision="fp16", fused=True).train(clip=clip) for library in (OURS, THEIRS))
    assert_same_run(ours, theirs, **ROUNDED)


@with_either_library
def test_step_was_skipped(library):
    make_accelerator()
    param = torch.nn.Parameter(torch.ones(3))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = accelerate.optimizer.AcceleratedOptimizer(library.AdamW([param]), False, scaler)
    for broken in (True, False, True):
        optimizer.zero_grad()
        scaler.scale(param.sum()).backward()
        if broken:
            param.grad[0] = float("inf")
        optimizer.step()
        assert optimizer.step_was_skipped is broken


# Checkpoints.


def resumed(folder, first, second, name="AdamW", precision="no", extras=None, **more):
    """Runs and saves the first half with one library; a new run with another library continues from there."""
    extras = extras or {}
    half = STEPS // 2
    batches = make_batches(STEPS)
    training = Training(first, name, precision, **(extras if first is OURS else {}), **more)
    training.train(batches[:half], clip=0.5)
    training.accelerator.save_state(folder)
    run = training.run
    training = Training(second, name, precision, **(extras if second is OURS else {}), **more)
    with torch.no_grad():
        for param in training.model.parameters():
            param.zero_()
    training.accelerator.load_state(folder)
    training.run = run
    return training.train(batches[half:], clip=0.5)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_resumed_run_is_the_unbroken_one(name, extras, tmp_path):
    unbroken = Training(OURS, name, **extras).train(make_batches(STEPS), clip=0.5)
    assert_equal_run(resumed(tmp_path, OURS, OURS, name, extras=extras), unbroken)


def test_a_resumed_run_under_a_scaler(tmp_path):
    unbroken = Training(OURS, precision="fp16").train(make_batches(STEPS), clip=0.5)
    run = resumed(tmp_path, OURS, OURS, precision="fp16")
    assert run.skipped == unbroken.skipped
    assert_equal_run(run, unbroken)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@from_one_to_the_other
def test_a_checkpoint_of_the_other_class(libraries, name, tmp_path):
    unbroken = Training(THEIRS, name).train(make_batches(STEPS), clip=0.5)
    assert_same_run(resumed(tmp_path, *libraries, name), unbroken, **EXACT)


# Other uses of the prepared optimizer in scripts.


def test_the_prepared_optimizer_is_looked_into():
    """State, groups and defaults are read and written through Accelerate's wrapper."""
    runs = []
    for library in (OURS, THEIRS):
        training = Training(library)
        batches = make_batches(STEPS)
        training.train(batches[:3])
        assert isinstance(training.optimizer.optimizer, library.AdamW)
        state = training.optimizer.state[training.model[0].weight]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert float(state["step"]) == 3
        for group in training.optimizer.param_groups:
            group["weight_decay"] = 0.5
            group["betas"] = (0.5, 0.9)
        training.train(batches[3:6])
        for values in training.optimizer.state.values():  # offloaded and brought back: new tensors
            for key, value in values.items():
                values[key] = value.to("cpu", copy=True)
        training.train(batches[6:7])
        state["exp_avg"].zero_()
        runs.append(training.train(batches[7:]))
    assert_same_run(*runs, **EXACT)


def test_parameters_are_switched():
    """As Accelerate does where preparing a model makes new parameters (FSDP2, fp8, XLA)."""
    runs = []
    for library in (OURS, THEIRS):
        training = Training(library)
        training.train(make_batches(STEPS)[:2])
        old = dict(training.model.named_parameters())
        for module in training.model.modules():
            for key, param in list(module.named_parameters(recurse=False)):
                setattr(module, key, torch.nn.Parameter(param.detach().clone()))
        new = dict(training.model.named_parameters())
        training.optimizer._switch_parameters({param: new[key] for key, param in old.items()})
        runs.append(training.train(make_batches(STEPS)[2:]))
    assert_same_run(*runs, **EXACT)


def test_a_group_added_later():
    runs = []
    for library in (OURS, THEIRS):
        training = Training(library)
        layer = torch.nn.Linear(4, 4)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
        training.train(make_batches(STEPS)[:2])
        training.model.append(layer)
        training.optimizer.add_param_group({"params": layer.parameters(), "lr": 0.001})
        training.scheduler.scheduler.base_lrs.append(0.001)
        training.scheduler.scheduler.lr_lambdas.append(lambda step: 1.0)
        runs.append(training.train(make_batches(STEPS)[2:]))
    assert_same_run(*runs, **EXACT)


@with_either_library
def test_memory_is_freed(library):
    training = Training(library)
    training.train(make_batches(2))
    weight = training.model[0].weight
    held = [weakref.ref(weight), weakref.ref(training.optimizer.state[weight]["exp_avg"])]
    del weight
    freed = training.accelerator.free_memory(training.model, training.optimizer, training.scheduler, training.loader)
    assert freed == [None] * 4
    del training
    gc.collect()
    assert [reference() for reference in held] == [None, None]
