"""The experiments: each runs to its figure in a small form, and its own computations beside the training are right."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

for package in (
    "captum",
    "kornia",
    "lightning",
    "matplotlib",
    "optuna",
    "pooch",
    "sklearn",
    "tensorboard",
    "torchmetrics",
):
    pytest.importorskip(package, reason="the lab's packages are not installed: pip install 'dlkit[lab]'")

import dlkit  # noqa: E402  (after the skips above)
from dlkit.lab import augment, course, experiment, models, report, training  # noqa: E402
from dlkit.lab.data import Dataset, load  # noqa: E402
from dlkit.lab.experiment import Configuration, Setting  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def data() -> Dataset:
    whole = load("digits")
    return dataclasses.replace(
        whole.first(200), test_images=whole.test_images[:100], test_labels=whole.test_labels[:100]
    )


def setting(data: Dataset, output: Path, **options) -> Setting:
    return Setting(data=data, output=output, quick=True, **{"epochs": 1, "seeds": 0, **options})


def runs(name: str, setting: Setting, *wanted: str) -> list[training.Run]:
    """Trains the configurations `wanted`, or all."""
    found = course.runs_of(name, experiment.load(name), setting)
    found = [run for run in found if not wanted or run.configuration.name in wanted]
    training.train(found, lambda line: None)
    return found


@pytest.mark.parametrize("name", experiment.names())
def test_every_experiment_runs_to_its_figure(data, tmp_path, monkeypatch, name):
    if name == "timeseries":
        monkeypatch.setattr(experiment.load(name), "TRAIN", 100)
    if name == "gradient-flow":
        monkeypatch.setattr(experiment.load(name), "DEPTHS", (2, 3))
    if name == "compiled":
        monkeypatch.setattr(experiment.load(name), "BACKEND", "eager")
    if name == "search":
        monkeypatch.setattr(experiment.load(name), "QUICK_TRIALS", 3)
    course.do(name, setting(data, tmp_path))
    assert (tmp_path / name / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / name / "table.txt").read_text()
    assert f"Look at: {experiment.load(name).LOOK_AT}" in text


# Augmentations


def dark_squares(count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright squares off the middle, on a background of -0.8; the class is the row of the square."""
    images = torch.full((count, 16, 16), -0.8)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[3 * label + 2 : 3 * label + 6, 3:7] = 2.0
    return images, labels


def test_flip_mirrors_about_half():
    images, labels = dark_squares()
    changed, same = augment.flip(images, labels)
    assert same is labels
    mirrored = (changed == images.flip(2)).flatten(1).all(1)
    assert (mirrored | (changed == images).flatten(1).all(1)).all()
    assert 15 < mirrored.sum() < 49


@pytest.mark.parametrize("change", [augment.shake, augment.erase])
def test_what_is_moved_in_or_erased_is_background(change):
    images, labels = dark_squares()
    changed, same = change(images, labels)
    assert same is labels
    assert changed.shape == images.shape
    assert not torch.equal(changed, images)
    torch.testing.assert_close(changed.amin(), images.amin())
    torch.testing.assert_close(changed[:, 0, 0], images[:, 0, 0])


def test_mixup_mixes_images_and_classes_alike():
    images, labels = dark_squares()
    changed, weights = augment.mixup(images, labels, classes=4)
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    assert (weights > 0).sum(1).max() == 2
    # A square of class c covers only its own rows: the brightness there is the share of class c.
    prototypes = dark_squares(4)[0] + 0.8
    torch.testing.assert_close(changed + 0.8, torch.einsum("bc,chw->bhw", weights, prototypes), rtol=0, atol=1e-5)


def test_cutmix_mixes_classes_by_area():
    # Each image has one brightness: its class.
    labels = torch.arange(32) % 4
    images = labels.float()[:, None, None].expand(32, 16, 16).contiguous()
    changed, weights = augment.cutmix(images, labels, classes=4)
    share = torch.stack([(changed == c).float().mean((1, 2)) for c in range(4)], 1)
    torch.testing.assert_close(weights, share)
    assert (weights.max(1).values < 1).any()


def test_augmentations_follow_torchs_seed():
    images, labels = dark_squares()
    for change in (augment.flip, augment.shake, augment.erase, functools.partial(augment.everything, classes=4)):
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(change(images, labels)[0])
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])


# Computations of single experiments


def test_confusion_counts_every_image(data, tmp_path):
    from dlkit.lab.experiments import cnn

    (run,) = runs("cnn", setting(data, tmp_path))
    counts = cnn.confusion(run)
    assert counts.sum(1).tolist() == torch.bincount(data.test_labels, minlength=10).tolist()
    assert counts.diagonal().sum() / 100 == pytest.approx(run.best())
    assert run.value("val_top5") >= run.value("val_accuracy")


def test_forecasts_are_of_numbers_not_seen_in_training(data):
    from dlkit.lab.experiments import timeseries

    made, series = timeseries.windows(data), timeseries.series()
    assert made.train_images.shape == (2_000, 50)
    assert torch.equal(made.train_images[7], series[7:57])
    assert made.train_labels[7] == series[57]
    assert made.test_labels[0] == series[2_100]
    assert made.test_images[0, 0] == series[2_050] != made.train_labels[-1]
    assert len(made.test_images) == 400
    known = timeseries.baselines()
    assert known["the noise itself"] < known["the last number again"]


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_forecaster_sees_no_trend(data, kind):
    model = models.Forecaster(data, kind, layers=2, norm=True)
    series = torch.randn(5, 50)
    torch.testing.assert_close(model(series + 10) - 10, model(series), rtol=0, atol=1e-4)


def test_transfer_keeps_what_is_frozen(data, tmp_path):
    from dlkit.lab.experiments import transfer

    first, frozen, later = runs(
        "transfer", setting(data, tmp_path, epochs=2), transfer.FIRST, "5-9, frozen", "5-9, unfrozen later"
    )
    learnt, kept, moved = first.model("best"), frozen.model("last"), later.model("last")
    assert frozen.data.classes == 5
    last = {id(value) for layer in transfer.last_block(learnt) for value in layer.state_dict(keep_vars=True).values()}
    names = {name for name, value in learnt.state_dict(keep_vars=True).items() if id(value) in last}
    heads = {id(value) for layer in transfer.head(learnt) for value in layer.parameters()}
    for name, value in learnt.state_dict(keep_vars=True).items():
        head = id(value) in heads
        assert torch.equal(value, kept.state_dict()[name]) == (not head), name
        assert torch.equal(value, moved.state_dict()[name]) == (not head and name not in names), name


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:1_000])])
def test_a_checkpoint_that_is_missing_or_cut_is_named(data, tmp_path, damage):
    (run,) = runs("cnn", setting(data, tmp_path))
    damage(run.folder / "best.ckpt")
    with pytest.raises(training.Refused, match=r"best.ckpt: cannot be read .* delete .*seed0-dlkit to train again"):
        run.model("best")


def test_a_backbone_is_used_where_it_lies(data, tmp_path, monkeypatch):
    from dlkit.lab.experiments import transfer

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "not " in str(transfer.backbone())
    torchvision = pytest.importorskip("torchvision")
    path = tmp_path / "checkpoints" / transfer.BACKBONE
    path.parent.mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert transfer.backbone() == path
    (run,) = runs("transfer", setting(data, tmp_path / "out"), "5-9, ResNet-18 frozen")
    assert run.history


def test_an_ensemble_is_stacked_on_images_it_was_not_trained_on(data, tmp_path):
    from dlkit.lab.experiments import ensemble

    found = report.Results(runs("ensemble", setting(data, tmp_path)))
    run = found.first("cnn")
    assert len(run.data.train_images) == 160
    assert torch.equal(run.data.train_images, data.train_images[:160])
    known = ensemble.accuracies(found)
    assert list(known) == ["seed 0", "seed 1", "seed 2", "averaged", "voted", "stacked"]
    assert known["seed 1"] == pytest.approx(found.runs("cnn")[1].value())
    mean = sum(ensemble.probabilities(each, data.test_images) for each in found.runs("cnn"))
    assert known["averaged"] == pytest.approx(float((mean.argmax(1) == data.test_labels).float().mean()))


def test_memory_of_a_step(data, tmp_path):
    from dlkit.lab.experiments import mixed_precision

    def plain(data: Dataset) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    sizes = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        configuration = Configuration("plain", plain, precision=precision, batch_size=16)
        run = training.Run("memory", configuration, setting(data, tmp_path / precision), "dlkit", 0, course.METRIC)
        sizes[precision] = mixed_precision.memory(run)
    weights = 64 * 32 + 32 + 32 * 10 + 10
    assert sizes["32-true"]["weights"] == 4 * weights
    assert sizes["bf16-true"]["weights"] == 2 * weights
    assert sizes["32-true"]["optimizer"] >= 8 * weights
    # The images, tanh's result, and the loss's tensors: logits and labels at most.
    assert 4 * 16 * (64 + 32) <= sizes["32-true"]["saved for backward"] <= 4 * 16 * (64 + 32 + 10 + 10) + 8 * 16 + 64
    assert sizes["bf16-true"]["saved for backward"] < sizes["32-true"]["saved for backward"]


def test_fp16_on_a_cpu_is_fp16_with_a_scaler(data, tmp_path):
    (run,) = runs("mixed-precision", setting(data, tmp_path), "fp16, GradScaler")
    assert run.value("train_loss") < 3
    trainer = run.trainer(1)
    assert trainer.precision == "16-mixed"
    assert trainer.precision_plugin.scaler.is_enabled()


def test_the_recipes_average_is_what_is_validated_and_kept(data, tmp_path):
    (run,) = runs("recipe", setting(data, tmp_path, epochs=4))
    checkpoint = torch.load(run.last, weights_only=True)
    kept, trained = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert any(not torch.equal(kept[name], trained[name]) for name in kept)
    model = run.model("last")
    with torch.inference_mode():
        accuracy = float((model(data.test_images).argmax(1) == data.test_labels).float().mean())
    assert accuracy == pytest.approx(run.value())


def test_the_recipes_schedule_and_decay(data):
    from dlkit.lab.experiments import recipe

    model = models.ResidualNet(data)
    groups = recipe.decayed(model)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert all(param.dim() > 1 for param in groups[0]["params"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = recipe.warm_up_cosine(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == pytest.approx([0.01, 0.109, 0.208])
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] < 0.001


@pytest.mark.parametrize("options", [{"residual": False}, {"norm": False}, {"he": False}])
def test_each_ablation_takes_one_thing_away(data, options):
    torch.manual_seed(0)
    whole = models.ResidualNet(data)
    torch.manual_seed(0)
    model = models.ResidualNet(data, **options)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    shortcuts = sum(isinstance(layer, models.ResidualBlock) for layer in model.modules())
    assert norms == {"norm": 0, "residual": 5}.get(next(iter(options)), 7)
    assert shortcuts == (0 if "residual" in options else 2)
    images = data.train_images[:8]
    assert not torch.equal(whole(images), model(images))
    assert dlkit.fuse(dlkit.replace(model))(images).shape == (8, 10)


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_killed(data, tmp_path, monkeypatch):
    from dlkit.lab.experiments import search

    monkeypatch.setattr(search, "QUICK_TRIALS", 6)

    def study(output: Path) -> list[tuple[str, dict, list[float], bool]]:
        here = setting(data, output, epochs=3)
        make = functools.partial(training.Run, "search", setting=here, metric=course.METRIC)
        found = search.search(here, make, lambda line: None)
        return [(run.configuration.name, run.values, run.column("val_accuracy"), run.pruned) for run in found]

    whole = study(tmp_path / "whole")
    assert any(pruned for *_, pruned in whole)
    advance, left = training.Run.advance, [7]

    def killed(self, epochs=None):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        advance(self, epochs)

    monkeypatch.setattr(training.Run, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "killed")
    left[0] = 100
    assert study(tmp_path / "killed") == whole
    left[0] = 0  # nothing is trained again
    assert study(tmp_path / "killed") == whole


def test_attributions_of_a_linear_model(data):
    from dlkit.lab.experiments import explain

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, given = data.test_images[:3], torch.tensor([1, 4, 4])
    found = explain.attributions(model, images, given)
    weights = model[1].weight[given].view(3, 8, 8)
    exact = (weights * (images - images.min())).detach()
    torch.testing.assert_close(found["integrated gradients"], exact, rtol=0, atol=1e-4)
    patches = exact.view(3, 4, 2, 4, 2).sum((2, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(found["SHAP values"], patches, rtol=0, atol=1e-4)
    assert found["occlusion"].shape == images.shape


def test_a_compiler_that_fails_is_said(data):
    from dlkit.lab.experiments import compiled

    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    model = models.mlp(data, norm=nn.BatchNorm1d)
    assert "no C++ compiler here" in compiled.measured(model, data, 16, 1, backend)["failed"]


def test_the_four_ways_of_a_step_are_timed(data):
    from dlkit.lab.experiments import compiled

    times = compiled.step_times(models.mlp(data, norm=nn.BatchNorm1d), data, 32, 2, backend="eager")
    assert list(times) == list(compiled.WAYS)
    assert all(each["first"] > 0 and each["median"] > 0 for each in times.values())
