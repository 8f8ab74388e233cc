"""Lightning's Trainer with dlkit's optimizers: precision plugins, clipping, accumulation, checkpoints, callbacks."""

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

L = pytest.importorskip("lightning", reason="lightning is not installed (make test-integration)")

BATCHES = 6
EPOCHS = 2


class Module(L.LightningModule):
    """Records what Trainer does; the learning rate falls at each step."""

    def __init__(self, library, name="AdamW", **extras):
        super().__init__()
        self.model = make_model()
        self.make = lambda params: make_optimizer(library, name, params, **extras)
        self.run = Run()

    def configure_optimizers(self):
        optimizer = self.make(self.model.parameters())
        scheduler = make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(make_batches(BATCHES), batch_size=None)

    def training_step(self, batch, index):
        torch.manual_seed(self.global_step)  # bf16 states draw random bits, and Lightning keeps no generator's state
        loss = loss_of(self.model, batch)
        self.run.losses.append(loss.item())
        self.log("loss", loss.detach(), prog_bar=False)
        return loss

    def on_train_batch_end(self, *arguments):
        self.run.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.run.scales.append(scaler.get_scale())


def fp16():
    return L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=make_scaler())


def make_trainer(folder, **arguments):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**defaults, **arguments})


def train(folder, module, checkpoint=None, **arguments):
    make_trainer(folder, **arguments).fit(module, ckpt_path=checkpoint)
    return module.run.keep_weights(module)


def made(arguments):
    """Makes plugins and callbacks from functions, since they belong to one Trainer."""
    return {key: value() if callable(value) else value for key, value in arguments.items()}


def both(folder, name="AdamW", kind=Module, extras=None, **arguments):
    """Returns (dlkit's run, torch's)."""
    modules = (kind(library, name, **(extras or {})) for library in (OURS, THEIRS))
    return [train(folder, module, **made(arguments)) for module in modules]


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fp32(name, tmp_path):
    assert_same_run(*both(tmp_path, name), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bf16_mixed(name, tmp_path):
    assert_same_run(*both(tmp_path, name, precision="bf16-mixed", gradient_clip_val=0.5), **ROUNDED)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_and_accumulation(algorithm, tmp_path):
    arguments = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    assert_same_run(*both(tmp_path, max_epochs=3, **arguments), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_max_norm_in_place_of_lightnings_clipping(name, tmp_path):
    ours = train(tmp_path, Module(OURS, name, max_norm=0.1), accumulate_grad_batches=2)
    theirs = train(tmp_path, Module(THEIRS, name), accumulate_grad_batches=2, gradient_clip_val=0.1)
    unclipped = train(tmp_path, Module(THEIRS, name), accumulate_grad_batches=2)
    assert max(abs(a - b) for a, b in zip(unclipped.losses, theirs.losses, strict=True)) > 1e-3, "nothing was clipped"
    assert_same_run(ours, theirs, **EXACT)


class WithLayers(Module):
    def __init__(self, library, name="AdamW", **extras):
        super().__init__(library, name, **extras)
        if library is OURS:
            self.model = dlkit.fuse(dlkit.replace(self.model))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_layers(precision, tmp_path):
    tolerance = EXACT if precision == "32-true" else ROUNDED
    assert_same_run(*both(tmp_path, kind=WithLayers, precision=precision), **tolerance)


# The scaler.


@pytest.mark.parametrize("clip", [None, 0.1], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_16_mixed(name, clip, tmp_path):
    ours, theirs = both(tmp_path, name, plugins=fp16, gradient_clip_val=clip)
    assert min(theirs.scales) < SKIPS, "no step was skipped"
    assert_same_run(ours, theirs, **ROUNDED)


def test_16_mixed_clipped_by_value_and_accumulated(tmp_path):
    arguments = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2}
    assert_same_run(*both(tmp_path, plugins=fp16, max_epochs=3, **arguments), **ROUNDED)


@pytest.mark.parametrize(("name", "fused"), [("AdamW", None), ("SGD", None), ("AdamW", True), ("SGD", True)])
def test_max_norm_under_a_scaler(name, fused, tmp_path):
    """The norm is that of unscaled gradients, whoever unscales them."""
    ours = train(tmp_path, Module(OURS, name, max_norm=0.1, fused=fused), plugins=fp16())
    theirs = train(tmp_path, Module(THEIRS, name), plugins=fp16(), gradient_clip_val=0.1)
    assert_same_run(ours, theirs, **ROUNDED)


def test_fused_under_a_scaler(tmp_path):
    assert_same_run(*both(tmp_path, extras={"fused": True}, plugins=fp16), **ROUNDED)


@with_either_library
def test_fused_and_lightnings_clipping_under_a_scaler(library, tmp_path):
    """Lightning refuses to clip gradients that the step unscales."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        train(tmp_path, Module(library, fused=True), plugins=fp16(), gradient_clip_val=0.1)


class WatchesGradients(Module):
    """on_before_optimizer_step is where norms are logged: Lightning promises unscaled gradients there."""

    def on_before_optimizer_step(self, optimizer):
        norm = torch.nn.utils.get_total_norm([param.grad for param in self.parameters()])
        self.run.norms.append(float(norm) if norm.isfinite() else 0.0)


def test_gradients_are_unscaled_before_the_step(tmp_path):
    ours, theirs = both(tmp_path, kind=WatchesGradients, plugins=fp16)
    assert max(theirs.norms) < 100
    assert_same_run(ours, theirs, **ROUNDED)


class ClipsByHand(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


class ClipsWithDlkit(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        OURS.clip_grad_norm_(self.parameters(), 0.1)


@pytest.mark.parametrize("plugins", [None, fp16], ids=["fp32", "16-mixed"])
def test_configure_gradient_clipping(plugins, tmp_path):
    tolerance = ROUNDED if plugins else EXACT
    ours, theirs = both(tmp_path, kind=ClipsByHand, plugins=plugins)
    assert_same_run(ours, theirs, **tolerance)
    with_dlkit = train(tmp_path, ClipsWithDlkit(THEIRS), plugins=plugins and plugins())
    assert_same_run(with_dlkit, theirs, **tolerance)


# Checkpoints.


def saving(folder):
    return {
        "enable_checkpointing": True,
        "callbacks": [L.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_last=True)],
    }


def resumed(folder, first, second, name="AdamW", extras=None, **arguments):
    """The last epoch of a run that was stopped before it."""
    extras = extras or {}
    module = Module(first, name, **(extras if first is OURS else {}))
    train(folder, module, max_epochs=EPOCHS - 1, **saving(folder), **made(arguments))
    following = Module(second, name, **(extras if second is OURS else {}))
    with torch.no_grad():
        for param in following.parameters():
            param.zero_()
    train(folder, following, checkpoint=folder / "last.ckpt", **made(arguments))
    following.run.losses[:0] = module.run.losses
    following.run.rates[:0] = module.run.rates
    following.run.scales[:0] = module.run.scales
    return following.run


@pytest.mark.parametrize("extras", [*EXTRAS.values(), {"max_norm": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_resumed_run_is_the_unbroken_one(name, extras, tmp_path):
    unbroken = train(tmp_path, Module(OURS, name, **extras))
    assert_equal_run(resumed(tmp_path, OURS, OURS, name, extras), unbroken)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_resumed_run_with_master_weights(name, tmp_path):
    extras = {"master_weights": True}
    unbroken = train(tmp_path, Module(OURS, name, **extras), precision="bf16-true")
    assert_equal_run(resumed(tmp_path, OURS, OURS, name, extras, precision="bf16-true"), unbroken)


def test_a_resumed_run_under_a_scaler(tmp_path):
    unbroken = train(tmp_path, Module(OURS), plugins=fp16())
    run = resumed(tmp_path, OURS, OURS, plugins=fp16)
    assert run.scales == unbroken.scales
    assert_equal_run(run, unbroken)


@from_one_to_the_other
def test_a_checkpoint_of_the_other_class(libraries, tmp_path):
    assert_same_run(resumed(tmp_path, *libraries), train(tmp_path, Module(THEIRS)), **EXACT)


# Uses of the optimizer in modules and callbacks.


class TwoOptimizers(Module):
    """Manual optimization: two optimizers step in turns, one of them is toggled, and groups change during training."""

    def __init__(self, library, name="AdamW", **extras):
        super().__init__(library, name, **extras)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second = self.make(self.model[:2].parameters()), self.make(self.model[2:].parameters())
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, 3, 0.5)]

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            with optimizer.toggle_model():
                loss = loss_of(self.model, batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
        self.run.losses.append(loss.item())
        self.lr_schedulers().step()
        if index == 2:
            optimizer.param_groups[0]["weight_decay"] = 0.5


@pytest.mark.parametrize("plugins", [None, fp16], ids=["fp32", "16-mixed"])
def test_manual_optimization(plugins, tmp_path):
    assert_same_run(*both(tmp_path, kind=TwoOptimizers, plugins=plugins), **(ROUNDED if plugins else EXACT))


class Unfreeze(L.pytorch.callbacks.BaseFinetuning):
    """The first layer joins the optimizer, in a group of its own, with the second epoch."""

    def freeze_before_training(self, module):
        self.freeze(module.model[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.model[0], optimizer, lr=0.01)


class Finetuned(Module):
    def configure_optimizers(self):
        return self.make(param for param in self.parameters() if param.requires_grad)


def test_a_group_added_by_a_callback(tmp_path):
    callbacks = lambda: [Unfreeze()]  # noqa: E731
    assert_same_run(*both(tmp_path, kind=Finetuned, callbacks=callbacks, max_epochs=3), **EXACT)


class OneCycle(Module):
    def configure_optimizers(self):
        optimizer = self.make(self.model.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=BATCHES * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_schedule_of_rates_and_momentum(name, tmp_path):
    assert_same_run(*both(tmp_path, name, kind=OneCycle), **EXACT)


def test_accumulation_that_changes_and_averaged_weights(tmp_path):
    """GradientAccumulationScheduler, and stochastic weight averaging, which takes over the rate."""

    def callbacks():
        return [
            L.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
            L.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1),
        ]

    assert_same_run(*both(tmp_path, callbacks=callbacks, max_epochs=3), **EXACT)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_true_precision(precision, tmp_path):
    """With fused=True: torch's other steps round bf16 after each operation, this one only once, as dlkit's does."""
    ours, theirs = both(tmp_path, precision=precision, extras={"fused": True})
    wanted = torch.bfloat16 if precision == "bf16-true" else torch.float64
    assert {weight.dtype for weight in ours.weights} == {wanted}
    assert_same_run(ours, theirs, **(ROUNDED if precision == "bf16-true" else EXACT))


class LeavesBatchesOut(Module):
    """training_step may return None: Lightning then steps without gradients."""

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return None if index in (0, 3) else loss


@pytest.mark.parametrize("plugins", [None, fp16], ids=["fp32", "16-mixed"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_batches_that_are_left_out(name, plugins, tmp_path):
    tolerance = ROUNDED if plugins else EXACT
    assert_same_run(*both(tmp_path, name, kind=LeavesBatchesOut, plugins=plugins), **tolerance)


class SwapsAverages(Module):
    """Looks at averaged weights after a step, by the optimizer that Lightning hands out."""

    def on_train_batch_end(self, outputs, batch, index):
        if index == 3:
            optimizer = self.optimizers()
            trained = [param.detach().clone() for param in self.parameters()]
            optimizer.swap_ema()
            averages = list(optimizer.ema_parameters())
            assert all(map(torch.equal, self.parameters(), averages))
            with pytest.raises(RuntimeError, match="averaged weights are swapped in"):
                self.trainer.optimizers[0].step()
            optimizer.swap_ema()
            assert all(map(torch.equal, self.parameters(), trained))


def test_averages_are_swapped_through_lightnings_wrapper(tmp_path):
    train(tmp_path, SwapsAverages(OURS, ema_decay=0.9), max_epochs=1)


class ReadsNorms(Module):
    def on_train_batch_end(self, *arguments):
        self.run.norms.append(float(self.optimizers().grad_norm))


def test_the_norm_is_read_through_lightnings_wrapper(tmp_path):
    ours = train(tmp_path, ReadsNorms(OURS, max_norm=0.1))
    theirs = train(tmp_path, WatchesGradients(THEIRS), gradient_clip_val=0.1)
    torch.testing.assert_close(ours.norms, theirs.norms, **EXACT)
