"""transformers.Trainer with dlkit's optimizers: two layers, 32 wide, from a configuration."""

import math

import pytest
import torch
from support.models import make
from support.runs import (
    EXACT,
    OURS,
    ROUNDED,
    THEIRS,
    Run,
    assert_equal_run,
    assert_same_run,
    from_one_to_the_other,
    make_optimizer,
)

import dlkit

pytest.importorskip("accelerate", reason="accelerate is not installed (make test-integration)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-integration)")

STEPS = 8


def make_language_model():
    """Has no biases: a key's gradient is only rounding, which Adam turns into whole, random steps."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=0.1,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def make_texts(count=64):
    """Texts of every third token of a ring, from random starts."""
    starts = torch.randint(32, (count,), generator=torch.Generator().manual_seed(3))
    texts = (starts[:, None] + 3 * torch.arange(12)) % 32
    return [{"input_ids": text, "labels": text} for text in texts]


class Recorder(transformers.TrainerCallback):
    """Records skipped steps, norms and learning rates."""

    def __init__(self, run):
        self.run = run

    def on_optimizer_step(self, args, state, control, optimizer=None, **others):
        norm = getattr(optimizer.optimizer, "grad_norm", None)
        self.run.skipped.append(optimizer.step_was_skipped)
        if norm is not None and args.max_grad_norm == 0 and not self.run.skipped[-1]:
            self.run.norms.append(float(norm))

    def on_log(self, args, state, control, logs=None, **others):
        if "grad_norm" in logs:
            self.run.rates.append(logs["learning_rate"])
            if args.max_grad_norm > 0 and math.isfinite(logs["grad_norm"]):
                self.run.norms.append(logs["grad_norm"])


class Trainer(transformers.Trainer):
    """Keeps each batch's loss. With fp16=True there is a scaler, which Accelerate makes for accelerators only."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fp16:
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.run.losses.append(loss.item())
        return loss


def make_trainer(folder, optimizer=None, model=None, callbacks=(), trainer_options=None, **arguments):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "cosine",
        "learning_rate": 0.01,
        "weight_decay": 0.1,
    }
    options = trainer_options or {"optimizers": (optimizer, None)}
    run = Run()
    trainer = Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**defaults, **arguments}),
        train_dataset=make_texts(),
        callbacks=[Recorder(run), *callbacks],
        **options,
    )
    trainer.run = run
    return trainer


def train(folder, library, name="AdamW", resume=False, extras=None, dtype=torch.float32, **arguments):
    """A run with an optimizer made by the user."""
    model = make_language_model().to(dtype)
    extras = extras if library is OURS and extras else {}
    trainer = make_trainer(folder, make_optimizer(library, name, model.parameters(), **extras), model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer.run.keep_weights(model)


def train_by_class(folder, library, resume=False, extras=None, **arguments):
    """A run with an optimizer made by Trainer, with its groups."""
    model = make_language_model()
    given = (library.AdamW, {"lr": 0.02, "betas": (0.9, 0.95), **(extras or {})})
    options = {"optimizer_cls_and_kwargs": given}
    trainer = make_trainer(folder, model=model, trainer_options=options, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    assert type(trainer.optimizer.optimizer) is library.AdamW
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    assert len(set(trainer.get_learning_rates())) == 1
    return trainer.run.keep_weights(model)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_fp32(name, tmp_path):
    """With Trainer's own clipping, at a norm of 1."""
    ours, theirs = (train(tmp_path, library, name, max_grad_norm=1.0) for library in (OURS, THEIRS))
    assert max(theirs.norms) > 1.0, "nothing was clipped"
    assert_same_run(ours, theirs, **EXACT)


def test_unclipped(tmp_path):
    assert_same_run(*(train(tmp_path, library, max_grad_norm=0.0) for library in (OURS, THEIRS)), **EXACT)


def test_an_optimizer_of_trainers_making(tmp_path):
    assert_same_run(*(train_by_class(tmp_path, library) for library in (OURS, THEIRS)), **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_bf16(name, tmp_path):
    assert_same_run(*(train(tmp_path, library, name, bf16=True) for library in (OURS, THEIRS)), **ROUNDED)


def test_accumulation(tmp_path):
    arguments = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "max_grad_norm": 0.5}
    ours, theirs = (train(tmp_path, library, **arguments) for library in (OURS, THEIRS))
    assert len(theirs.losses) > 2 * STEPS
    assert_same_run(ours, theirs, **EXACT)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_max_norm_in_place_of_trainers_clipping(name, tmp_path):
    ours = train(tmp_path, OURS, name, extras={"max_norm": 0.5}, max_grad_norm=0.0)
    theirs = train(tmp_path, THEIRS, name, max_grad_norm=0.5)
    assert min(theirs.norms) > 0.5
    assert_same_run(ours, theirs, **EXACT)


def test_max_norm_of_an_optimizer_of_trainers_making(tmp_path):
    ours = train_by_class(tmp_path, OURS, extras={"max_norm": 0.5, "ema_decay": 0.9}, max_grad_norm=0.0)
    assert_same_run(ours, train_by_class(tmp_path, THEIRS, max_grad_norm=0.5), **EXACT)


# The scaler.


@pytest.mark.parametrize(("name", "clip"), [("AdamW", 0.0), ("AdamW", 0.5), ("SGD", 0.5)])
def test_fp16_with_a_scaler(name, clip, tmp_path):
    """Trainer's schedule waits at a skipped step."""
    ours, theirs = (train(tmp_path, library, name, fp16=True, max_grad_norm=clip) for library in (OURS, THEIRS))
    assert any(theirs.skipped)
    assert_same_run(ours, theirs, **ROUNDED)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_max_norm_under_a_scaler(name, tmp_path):
    """Trainer needs the norm, and for it unscaled gradients, even where it does not clip."""
    ours = train(tmp_path, OURS, name, extras={"max_norm": 0.5}, fp16=True, max_grad_norm=0.0)
    theirs = train(tmp_path, THEIRS, name, fp16=True, max_grad_norm=0.5)
    assert any(theirs.skipped)
    assert_same_run(ours, theirs, **ROUNDED)


# Checkpoints.


SAVES = {"save_strategy": "steps", "save_steps": STEPS // 2, "save_total_limit": 3}


def last_half(run):
    """The steps of a run that a resumed one has too."""
    half = len(run.losses) // 2
    return Run(losses=run.losses[half:], rates=run.rates[len(run.rates) // 2 :], weights=run.weights)


@pytest.mark.parametrize("extras", [{}, {"ema_decay": 0.9}, {"state_dtype": "int8"}], ids=str)
def test_a_resumed_run_is_the_unbroken_one(extras, tmp_path):
    unbroken = train(tmp_path, OURS, extras=extras, **SAVES)
    resumed = train(tmp_path, OURS, extras=extras, resume=f"{tmp_path}/checkpoint-{STEPS // 2}")
    assert_equal_run(resumed, last_half(unbroken))


@pytest.mark.parametrize("extras", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_a_resumed_run_of_a_bf16_model(extras, tmp_path):
    """Stochastic rounding goes on with the same bits, since Trainer saves the generator's state."""
    unbroken = train(tmp_path, OURS, extras=extras, dtype=torch.bfloat16, **SAVES)
    resume = f"{tmp_path}/checkpoint-{STEPS // 2}"
    assert_equal_run(train(tmp_path, OURS, extras=extras, dtype=torch.bfloat16, resume=resume), last_half(unbroken))


def test_a_resumed_run_of_trainers_making_under_a_scaler(tmp_path):
    unbroken = train_by_class(tmp_path, OURS, fp16=True, **SAVES)
    resumed = train_by_class(tmp_path, OURS, fp16=True, resume=f"{tmp_path}/checkpoint-{STEPS // 2}")
    assert_equal_run(resumed, last_half(unbroken))


@from_one_to_the_other
def test_a_checkpoint_of_the_other_class(libraries, tmp_path):
    unbroken = train(tmp_path, libraries[0], **SAVES)
    resumed = train(tmp_path, libraries[1], resume=f"{tmp_path}/checkpoint-{STEPS // 2}")
    unbroken = last_half(unbroken)
    torch.testing.assert_close(resumed.losses, unbroken.losses, **EXACT)
    for a, b in zip(resumed.weights, unbroken.weights, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# Layers.


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_layers(checkpointing, tmp_path):
    """BERT with dlkit's norms and dropouts; p is 0, since torch draws other masks."""
    arguments = {"learning_rate": 0.05, "gradient_checkpointing": checkpointing}
    runs = []
    for library in (OURS, THEIRS):
        model = make("bert", 0.0).float()
        model = dlkit.fuse(dlkit.replace(model)) if library is OURS else model
        trainer = make_trainer(tmp_path, make_optimizer(library, "SGD", model.parameters()), model, **arguments)
        trainer.train()
        runs.append(trainer.run.keep_weights(model))
    assert_same_run(*runs, **EXACT)


# Other uses of Trainer's optimizer.


class Meddler(transformers.TrainerCallback):
    """Reads and writes the optimizer between steps, as callbacks do that warm up, freeze or log."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **others):
        moments = [values["exp_avg"] for values in optimizer.state.values()]
        assert len(moments) == sum(1 for param in model.parameters() if param.requires_grad)
        if state.global_step == 2:
            for group in optimizer.param_groups:
                group["betas"] = (0.8, 0.9)
        if state.global_step == 4:
            optimizer.state[model.lm_head.weight]["exp_avg"].zero_()
        if state.global_step == 5:
            layer = model.model.layers[0]
            for param in layer.parameters():
                param.requires_grad_(False)
            for param in layer.parameters():
                optimizer.state.pop(param)


def test_a_callback_that_changes_the_optimizer(tmp_path):
    runs = [train(tmp_path, library, callbacks=[Meddler()]) for library in (OURS, THEIRS)]
    assert_same_run(*runs, **EXACT)


def test_training_goes_on_in_a_second_call(tmp_path):
    """Trainer wraps the optimizer again and loads its own state into it."""
    runs = []
    for library in (OURS, THEIRS):
        model = make_language_model()
        optimizer = make_optimizer(library, "AdamW", model.parameters())
        trainer = make_trainer(tmp_path, optimizer, model, max_steps=4, lr_scheduler_type="constant")
        trainer.train()
        trainer.train()
        assert float(optimizer.state[model.lm_head.weight]["step"]) == 8
        runs.append(trainer.run.keep_weights(model))
    assert_same_run(*runs, **EXACT)


def test_the_best_model_is_loaded(tmp_path):
    runs = []
    for library in (OURS, THEIRS):
        model = make_language_model()
        optimizer = make_optimizer(library, "AdamW", model.parameters())
        steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        options = {"optimizers": (optimizer, None), "eval_dataset": make_texts(16)}
        trainer = make_trainer(
            tmp_path / library.__name__, None, model, (), options, load_best_model_at_end=True, **steps
        )
        trainer.train()
        runs.append(trainer.run.keep_weights(model))
    assert_same_run(*runs, **EXACT)


def test_gradient_checkpointing_and_another_schedule(tmp_path):
    arguments = {"gradient_checkpointing": True, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    assert_same_run(*(train(tmp_path, library, **arguments) for library in (OURS, THEIRS)), **EXACT)


def test_parameter_groups_of_dlkit(tmp_path):
    """dlkit.optim.param_groups leaves out what Trainer's own groups leave out."""
    runs = []
    for library in (OURS, THEIRS):
        if library is THEIRS:
            runs.append(train_by_class(tmp_path, library))
            continue
        model = make_language_model()
        groups = OURS.param_groups(model, weight_decay=0.1)
        trainer = make_trainer(tmp_path, OURS.AdamW(groups, lr=0.02, betas=(0.9, 0.95)), model)
        trainer.train()
        runs.append(trainer.run.keep_weights(model))
    assert_same_run(*runs, **EXACT)
