"""Lightning Fabric with dlkit's optimizers: precision plugins, clipping, accumulation, save and load."""

import pytest
import torch
from support.runs import (
    EXACT,
    EXTRAS,
    OURS,
    ROUNDED,
    SKIPS,
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

fabrics = pytest.importorskip("lightning.fabric", reason="lightning is not installed (make test-integration)")

STEPS = 10


class Training:
    def __init__(self, library, name="AdamW", precision="32-true", accumulate=1, **extras):
        self.scaler = None
        arguments = {"precision": precision}
        if precision == "16-mixed":
            self.scaler = make_scaler()
            plugin = fabrics.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=self.scaler)
            arguments = {"plugins": [plugin]}
        self.fabric = fabrics.Fabric(accelerator="cpu", devices=1, **arguments)
        self.library, self.accumulate = library, accumulate
        model = make_model()
        self.model, self.optimizer = self.fabric.setup(
            model, make_optimizer(library, name, model.parameters(), **extras)
        )
        assert isinstance(self.optimizer, getattr(library, name))
        self.scheduler = make_scheduler(self.optimizer)
        self.run = Run()

    def train(self, batches=None, clip=None, by_value=None):
        for i, batch in enumerate(make_batches(STEPS) if batches is None else batches):
            self.step(batch, (i + 1) % self.accumulate == 0, clip, by_value)
        return self.run.keep_weights(self.model)

    def step(self, batch, last, clip, by_value):
        run = self.run
        torch.manual_seed(len(run.losses))  # bf16 states draw random bits, and Fabric keeps no generator's state
        with self.fabric.no_backward_sync(self.model, enabled=not last):
            loss = loss_of(self.model, batch)
            self.fabric.backward(loss)
        run.losses.append(loss.item())
        if not last:
            return
        norm = None
        if clip is not None:
            norm = self.fabric.clip_gradients(self.model, self.optimizer, max_norm=clip, error_if_nonfinite=False)
        if by_value is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, clip_val=by_value)
        before = None if self.scaler is None else self.scaler.get_scale()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        run.rates.append(self.optimizer.param_groups[0]["lr"])
        if self.scaler is not None:
            run.scales.append(self.scaler.get_scale())
            if run.scales[-1] < before:
                return  # skipped: the norm is then undefined
        norm = getattr(self.optimizer, "grad_norm", None) if norm is None else norm
        if norm is not None:
            run.norms.append(float(norm))


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fp32(name):
    assert_same_run(*(Training(library, name).train() for library in (OURS, THEIRS)), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bf16_mixed(name):
    assert_same_run(*(Training(library, name, "bf16-mixed").train(clip=0.5) for library in (OURS, THEIRS)), **ROUNDED)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_accumulation_and_clipping(name):
    ours, theirs = (Training(library, name, accumulate=2).train(clip=0.1) for library in (OURS, THEIRS))
    assert min(theirs.norms) > 0.1, "nothing was clipped"
    assert_same_run(ours, theirs, **EXACT)


def test_clipping_by_value():
    assert_same_run(*(Training(library).train(by_value=0.01) for library in (OURS, THEIRS)), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_max_norm_in_place_of_fabrics_clipping(name):
    """optimizer.grad_norm is read through Fabric's wrapper."""
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
def test_16_mixed(name, clip):
    ours, theirs = (Training(library, name, "16-mixed").train(clip=clip) for library in (OURS, THEIRS))
    assert min(theirs.scales) < SKIPS, "no step was skipped"
    assert_same_run(ours, theirs, **ROUNDED)


@pytest.mark.parametrize(("name", "fused"), [("AdamW", None), ("SGD", None), ("AdamW", True), ("SGD", True)])
def test_max_norm_under_a_scaler(name, fused):
    """The norm is that of unscaled gradients, whoever unscales them."""
    ours = Training(OURS, name, "16-mixed", fused=fused, max_norm=0.1).train()
    theirs = Training(THEIRS, name, "16-mixed").train(clip=0.1)
    assert_same_run(ours, theirs, **ROUNDED)


def test_fused_under_a_scaler():
    ours, theirs = (Training(library, precision="16-mixed", fused=True).train() for library in (OURS, THEIRS))
    assert_same_run(ours, theirs, **ROUNDED)


@with_either_library
def test_fused_and_fabrics_clipping_under_a_scaler(library):
    """Fabric refuses to clip gradients that the step unscales."""
    with pytest.raises(NotImplementedError, match="optimizers handling the unscaling"):
        Training(library, precision="16-mixed", fused=True).train(clip=0.1)


# Checkpoints.


def resumed(path, first, second, name="AdamW", precision="32-true", extras=None):
    extras = extras or {}
    half, batches = STEPS // 2, make_batches(STEPS)
    training = Training(first, name, precision, **(extras if first is OURS else {}))
    training.train(batches[:half])
    kept = {"model": training.model, "optimizer": training.optimizer, "scheduler": training.scheduler.state_dict()}
    training.fabric.save(path, kept)
    run, scaler = training.run, training.scaler
    training = Training(second, name, precision, **(extras if second is OURS else {}))
    with torch.no_grad():
        for param in training.model.parameters():
            param.zero_()
    loaded = {"model": training.model, "optimizer": training.optimizer}
    rest = training.fabric.load(path, loaded, strict=False)
    training.scheduler.load_state_dict(rest["scheduler"])
    if scaler is not None:
        training.scaler.load_state_dict(scaler.state_dict())
    training.run = run
    return training.train(batches[half:])


@pytest.mark.parametrize("extras", [*EXTRAS.values(), {"max_norm": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_resumed_run_is_the_unbroken_one(name, extras, tmp_path):
    unbroken = Training(OURS, name, **extras).train()
    assert_equal_run(resumed(tmp_path / "state.ckpt", OURS, OURS, name, extras=extras), unbroken)


def test_a_resumed_run_under_a_scaler(tmp_path):
    unbroken = Training(OURS, precision="16-mixed").train()
    run = resumed(tmp_path / "state.ckpt", OURS, OURS, precision="16-mixed")
    assert run.scales == unbroken.scales
    assert_equal_run(run, unbroken)


@from_one_to_the_other
def test_a_checkpoint_of_the_other_class(libraries, tmp_path):
    assert_same_run(resumed(tmp_path / "state.ckpt", *libraries), Training(THEIRS).train(), **EXACT)


# Uses of the wrapped optimizer in loops.


def test_closures_and_state():
    """Fabric steps with a closure; state and groups are read and written through its wrapper."""
    runs = []
    for library in (OURS, THEIRS):
        training = Training(library)
        for i, batch in enumerate(make_batches(STEPS)):

            def closure(training=training, batch=batch):
                training.optimizer.zero_grad()
                loss = loss_of(training.model, batch)
                training.fabric.backward(loss)
                return loss

            training.run.losses.append(training.optimizer.step(closure).item())
            state = training.optimizer.state[training.model.module[0].weight]
            assert float(state["step"]) == i + 1
            if i == 3:
                state["exp_avg_sq"].mul_(4)
            if i == 5:
                training.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        runs.append(training.run.keep_weights(training.model))
    assert_same_run(*runs, **EXACT)


def test_averages_are_swapped_through_fabrics_wrapper():
    training = Training(OURS, ema_decay=0.9)
    training.train(make_batches(3))
    trained = [param.detach().clone() for param in training.model.parameters()]
    training.optimizer.swap_ema()
    assert all(map(torch.equal, training.model.parameters(), training.optimizer.ema_parameters()))
    with pytest.raises(RuntimeError, match="averaged weights are swapped in"):
        training.optimizer.step()
    training.optimizer.swap_ema()
    assert all(map(torch.equal, training.model.parameters(), trained))


def test_averages_swapped_by_the_wrapper_are_put_back_by_the_optimizer():
    """A callback may have the wrapper and the loop the optimizer."""
    for wrapper_first in (True, False):
        training = Training(OURS, ema_decay=0.9)
        training.train(make_batches(3))
        holders = [training.optimizer, training.optimizer.optimizer]
        trained = [param.detach().clone() for param in training.model.parameters()]
        for holder in holders if wrapper_first else reversed(holders):
            holder.swap_ema()
        assert all(map(torch.equal, training.model.parameters(), trained))
