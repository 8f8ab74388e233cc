"""One run: a Configuration trained by Lightning, with one seed, on torch's layers and optimizer or on dlkit's.

A run has a folder, and can be killed at any moment: the same command goes on after the last finished epoch and ends
with the same numbers, because
- the order of the images and torch's random state at the start of an epoch depend only on (seed, epoch);
- last.ckpt holds the model, the optimizer, the schedule, the callbacks' state and the metrics of each epoch;
- every file is written beside its place and then put there in one move.

For --layers both, the two are trained in turns of one epoch: other load on the machine then affects both alike. Each
turn goes on from last.ckpt.
"""

import copy
import csv
import io
import json
import logging
import os
import pickle
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

import dlkit
from dlkit.lab import models
from dlkit.lab.data import Batches, Dataset
from dlkit.lab.experiment import QUICK_EPOCHS, QUICK_IMAGES, QUICK_STEPS, Configuration, Setting, describe

TRAIN_SAMPLE = 10_000  # training images of which the training accuracy is taken, in evaluation mode
EVALUATION_BATCH = 1_000
PARTS = ("val", "train")  # the data on which the metrics of an epoch are measured

for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Refused(Exception):
    """The user's request cannot be served. The message is one line with the reason."""


def write(path: Path, content: bytes | str) -> None:
    """Writes the whole file or, after an error, leaves the earlier one."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


class WholeCheckpoints(TorchCheckpointIO):
    """A checkpoint is there in whole or not at all. Lightning's own moves a file over from another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(Path(path), content.getvalue())


class _Yaml(yaml.SafeDumper):
    """Text of several lines, which a model is, as such."""


_Yaml.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, "|" if "\n" in text else None)
)


class EpochCheckpoint(ModelCheckpoint):
    """Lightning asks each callback for its key several times a step, and ModelCheckpoint's takes a while to make."""

    @property
    def state_key(self) -> str:
        return f"EpochCheckpoint {self.filename}"

    def on_train_batch_end(self, *args: Any) -> None:
        pass


def seed_of(seed: int, epoch: int, rank: int = 0) -> int:
    return (seed * 1_000 + rank) * 100_000 + epoch


def _with_dlkit(forward: Callable[..., Tensor]) -> Callable[[nn.Module], Callable[..., Tensor]]:
    return lambda module: forward


# dlkit's functions for the layers that models.py has in plain torch, because torch.nn lacks them.
dlkit.register(models.DropPath, _with_dlkit(lambda self, x: dlkit.functional.drop_path(x, self.p, self.training)))
dlkit.register(
    models.DropBlock2d,
    _with_dlkit(lambda self, x: dlkit.functional.dropblock2d(x, self.p, self.block_size, self.training)),
)
dlkit.register(
    models.DropConnectLinear,
    _with_dlkit(
        lambda self, x: nn.functional.linear(x, dlkit.functional.dropout(self.weight, self.p, self.training), self.bias)
    ),
)


def to_dlkit(model: nn.Module) -> nn.Module:
    """The model with dlkit's layers, each BatchNorm fused with the ReLU after it."""
    return dlkit.fuse(dlkit.replace(model))


def synchronised(model: nn.Module, layers: str, converted: bool) -> nn.Module:
    """The model with every BatchNorm over the batches of all processes."""
    if layers == "dlkit" and converted:
        return dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    has = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in model.modules())
    if has and not torch.cuda.is_available():
        raise Refused("torch's SyncBatchNorm needs a GPU: with --devices on CPU take --layers dlkit")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Task(lightning.LightningModule):
    """Lightning's module: model, criterion, optimizer, and the metrics of each epoch as `history`."""

    def __init__(
        self,
        configuration: Configuration,
        data: Dataset,
        layers: str,
        seed: int,
        devices: int = 1,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.configuration, self.data, self.layers, self.seed = configuration, data, layers, seed
        torch.manual_seed(seed)
        self.model = configuration.model(data)
        self.criterion = configuration.loss()
        if layers == "dlkit" and configuration.convert:
            self.model, self.criterion = to_dlkit(self.model), dlkit.replace(self.criterion)
        if devices > 1:
            self.model = synchronised(self.model, layers, configuration.convert)
        self.batch_size = min(configuration.batch_size, len(data.train_images))
        self.steps = configuration.epoch_steps or len(data.train_images) // self.batch_size
        self.lr = configuration.lr  # where Lightning's learning-rate finder looks
        make: Any = configuration.metrics or accuracy
        self.measures = nn.ModuleList([torchmetrics.MetricCollection(make(data)) for _ in PARTS])
        self.history: list[dict[str, float]] = []
        self.finished = configuration.epochs == 0
        self.row: dict[str, float] = {}
        self.seconds = 0.0
        self._sharded = False

    # Data

    def train_dataloader(self) -> Batches:
        images, labels = self.data.train_images, self.data.train_labels
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return Batches(images, labels, self.batch_size, self.steps, self._epoch_seed, rank, ranks)

    def _epoch_seed(self) -> int:
        return seed_of(self.seed, self.current_epoch)

    def val_dataloader(self) -> list[Batches]:
        sample = min(TRAIN_SAMPLE, len(self.data.train_images))
        train = self.data.train_images[:sample], self.data.train_labels[:sample]
        return [Batches(*pair, EVALUATION_BATCH) for pair in ((self.data.test_images, self.data.test_labels), train)]

    # Training

    def forward(self, inputs: Tensor) -> Any:
        return self.model(inputs)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            from torch.distributed.fsdp import fully_shard

            meshes: Any = self.device_mesh
            mesh = meshes["data_parallel"]
            for layer in self.model.children():
                if list(layer.parameters()):
                    fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            self._sharded = True

    def configure_optimizers(self) -> Any:
        configuration = self.configuration
        parameters = configuration.parameters(self.model) if configuration.parameters else self.model.parameters()
        options = dict(configuration.options)
        if self.layers == "dlkit":
            if configuration.max_norm is not None:
                options["max_norm"] = configuration.max_norm
            kind = getattr(dlkit.optim, configuration.optimizer)
        else:
            kind = getattr(torch.optim, configuration.optimizer)
            # torch's fastest: its default takes 2.6 times as long. RMSprop has none.
            if configuration.optimizer in ("SGD", "Adam", "AdamW"):
                options["fused"] = True
        optimizer = kind(parameters, lr=self.lr, **options)
        if configuration.schedule is None:
            return optimizer
        scheduler = configuration.schedule(optimizer, self.steps * configuration.epochs)
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        interval = "epoch" if plateau else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": "val_loss"},
        }

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(seed_of(self.seed, self.current_epoch, self.global_rank))
        self.losses: list[Tensor] = []
        self.start = self._now()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, targets = batch
        if self.configuration.augment is not None:
            inputs, targets = self.configuration.augment(inputs, targets)
        loss = self.criterion(self.model(inputs), targets)
        self.losses.append(loss.detach())
        return loss

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # Measuring

    def on_validation_start(self) -> None:
        self.seconds = self._now() - self.start
        self.val_loss = 0.0

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int, dataloader_idx: int) -> None:
        outputs = self.model(batch[0])
        measures: Any = self.measures[dataloader_idx]
        measures.update(outputs, batch[1])
        if PARTS[dataloader_idx] == "val":
            self.val_loss += float(self.criterion(outputs, batch[1])) * len(batch[0]) / len(self.data.test_images)

    def on_validation_epoch_end(self) -> None:
        row = {"val_loss": self.val_loss}
        each: Any
        for part, each in zip(PARTS, self.measures, strict=True):
            row |= {f"{part}_{name}": float(value) for name, value in each.compute().items()}
            each.reset()
        self.row = row
        # For callbacks that monitor a metric. The values are the same on every process.
        self.log_dict(row, logger=False)

    def on_train_epoch_end(self) -> None:
        loss = self.trainer.strategy.reduce(torch.stack(self.losses).mean(), reduce_op="mean")
        # The rate that the optimizer holds at the end of the epoch.
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        row = {"epoch": self.current_epoch + 1, "train_loss": float(loss), **self.row, "lr": float(lr)}
        self.history.append(row | {"seconds": self.seconds})
        if self.logger is not None:
            self.logger.log_metrics(row, step=self.current_epoch + 1)
        if self.folder is not None and self.trainer.is_global_zero:
            write(self.folder / "metrics.csv", _csv(self.history))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.finished = self.trainer.should_stop or len(self.history) >= self.configuration.epochs
        checkpoint["history"], checkpoint["finished"] = self.history, self.finished

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history, self.finished = list(checkpoint["history"]), checkpoint["finished"]


def accuracy(data: Dataset) -> dict[str, torchmetrics.Metric]:
    from torchmetrics.classification import MulticlassAccuracy

    return {"accuracy": MulticlassAccuracy(data.classes, average="micro", validate_args=False)}


def take_up(folder: Path, config: dict[str, Any]) -> None:
    """Makes a run's folder with its config.yaml. Raises Refused where there is one of something else."""
    path = folder / "config.yaml"
    remedy = "choose another --output or delete it"
    if path.is_file():
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict):
            raise Refused(f"{path}: is not the configuration of a run; {remedy}")
        changed = [name for name in {**config, **found} if found.get(name) != config.get(name)]
        if changed:
            what = "; ".join(
                f"{name}: {_short(found.get(name))}, now {_short(config.get(name))}" for name in changed[:3]
            )
            raise Refused(f"{folder}: has the results of another configuration ({what}); {remedy}")
    elif folder.is_dir() and any(folder.iterdir()):
        raise Refused(f"{folder}: is not empty and has no config.yaml; {remedy}")
    elif main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, yaml.dump(config, Dumper=_Yaml, sort_keys=False, width=100))


def fit(trainer: lightning.Trainer, task: lightning.LightningModule, **options: Any) -> None:
    """trainer.fit without its warnings. At Ctrl-C and SIGTERM Lightning ends the program mutely; this raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(task, **options)
        except SystemExit as error:
            raise KeyboardInterrupt from error


class Run:
    """A configuration, a seed and the layers, with the folder of the results."""

    def __init__(
        self, experiment: str, configuration: Configuration, setting: Setting, layers: str, seed: int, metric: Any
    ) -> None:
        configuration = shorten(configuration, setting)
        data = configuration.data(setting.data) if configuration.data else setting.data
        if configuration.images is not None:
            data = data.first(configuration.images)
        if configuration.batch_size % setting.devices:
            raise Refused(f"batches of {configuration.batch_size} cannot be divided among --devices {setting.devices}")
        self.experiment, self.configuration, self.setting = experiment, configuration, setting
        self.data, self.layers, self.seed, self.metric = data, layers, seed, metric
        self.folder = setting.output / experiment / folder_name(configuration.name) / f"seed{seed}-{layers}"
        self.history: list[dict[str, float]] = []
        self.probes: dict[str, Any] = {}
        self.finished = False
        self._task: Task | None = None
        self._open()

    def __repr__(self) -> str:
        return f"{self.configuration.name}, seed {self.seed}, {self.layers}"

    # The folder

    def _open(self) -> None:
        take_up(self.folder, self.config())
        results = self.folder / "results.json"
        if results.is_file():
            known = json.loads(results.read_text())
            self.history, self.probes, self.finished = known["history"], known["probes"], True
        elif self.last.is_file():
            self.history = read_checkpoint(self.folder, "last")["history"]

    def config(self) -> dict[str, Any]:
        """The content of config.yaml, which tells this run from others."""
        setting = self.setting
        known = {field: describe(value) for field, value in vars(self.configuration).items()}
        data = {"name": self.data.name, "made by": known["data"], "training": list(self.data.train_images.shape)}
        data["validation"] = list(self.data.test_images.shape)
        torch.manual_seed(self.seed)
        return {
            "experiment": self.experiment,
            **known,
            "model": f"{known['model']}: {self.configuration.model(self.data)}",
            "precision": self.configuration.precision or setting.precision,
            "layers": self.layers,
            "seed": self.seed,
            "data": data,
            "device": setting.device,
            "strategy": f"{setting.strategy} on {setting.devices}" if setting.devices > 1 else "one process",
        }

    # Training

    def task(self) -> Task:
        if self._task is None:
            devices = self.setting.devices
            self._task = Task(self.configuration, self.data, self.layers, self.seed, devices, self.folder)
            self._task.to(self.setting.device)
        return self._task

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def advance(self, epochs: int | None = None) -> None:
        """Trains on to the end, or for at most `epochs` epochs."""
        if self.finished:
            return
        task = self.task()
        if self.configuration.probe and "start" not in self.probes and not task.history:
            self.probes["start"] = self._probe()
        if not task.finished:
            if not task.history and self.last.is_file():
                task.on_load_checkpoint(read_checkpoint(self.folder, "last"))
            if not task.finished:
                total = self.configuration.epochs
                self._fit(task, total if epochs is None else min(total, len(task.history) + epochs))
            elif self.configuration.probe:
                task.model.load_state_dict(self.model().state_dict())
        self.history = task.history
        if task.finished:
            if self.configuration.probe and self.configuration.epochs:
                self.probes["end"] = self._probe()
            self.finished = True
            if main_process():
                content = {"history": self.history, "probes": self.probes}
                write(self.folder / "results.json", json.dumps(content, indent=1) + "\n")
            self._task = None

    def _probe(self) -> Any:
        torch.manual_seed(self.seed)
        assert self.configuration.probe is not None
        return self.configuration.probe(copy.deepcopy(self.task().model).train(), self.data)

    def _fit(self, task: Task, epochs: int) -> None:
        fit(self.trainer(epochs), task, ckpt_path=str(self.last) if self.last.is_file() else None, weights_only=True)
        task.to(self.setting.device)

    def trainer(self, epochs: int, **options: Any) -> lightning.Trainer:
        """Lightning's Trainer as all runs have it."""
        setting, configuration = self.setting, self.configuration
        score, mode = self.metric
        every_epoch: dict[str, Any] = {"dirpath": self.folder, "save_on_train_epoch_end": True}
        every_epoch["enable_version_counter"] = False
        callbacks: list[Any] = [] if configuration.callbacks is None else configuration.callbacks()
        if configuration.patience is not None:
            callbacks.append(EarlyStopping("val_loss", patience=configuration.patience, check_on_train_epoch_end=True))
        callbacks.append(
            ModelCheckpoint(filename="best", monitor=score, mode=mode, save_weights_only=True, **every_epoch)
        )
        best = EpochCheckpoint(filename="best", monitor=score, mode=mode, save_weights_only=True, **every_epoch)
        callbacks += [best, EpochCheckpoint(filename="last", **every_epoch)]
        if sys.stderr.isatty():
            callbacks.append(TQDMProgressBar(refresh_rate=20, leave=False))
        precision: Any = configuration.precision or setting.precision
        plugins: list[Any] = [WholeCheckpoints()]
        if precision == "16-mixed" and setting.device == "cpu":
            # On a CPU Lightning turns 16-mixed into bf16, though torch has fp16 and a GradScaler there too.
            plugins.append(MixedPrecision("16-mixed", "cpu"))
            precision = None
        clips_apart = self.layers == "torch" and configuration.max_norm is not None
        return lightning.Trainer(
            **{
                "accelerator": setting.device,
                "devices": setting.devices,
                "strategy": strategy(setting),
                "precision": precision,
                "max_epochs": epochs,
                "gradient_clip_val": configuration.max_norm if clips_apart else None,
                "logger": TensorBoardLogger(self.folder, name="tensorboard", version="", default_hp_metric=False),
                "callbacks": callbacks,
                "plugins": plugins,
                "default_root_dir": self.folder,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_progress_bar": sys.stderr.isatty(),
                "enable_model_summary": False,
                "log_every_n_steps": 10**9,
                **options,
            }
        )

    # Results

    def value(self, name: str | None = None) -> float:
        """The metric after the last epoch."""
        return self.history[-1][name or self.metric[0]]

    def best(self) -> float:
        choose = max if self.metric[1] == "max" else min
        return choose(row[self.metric[0]] for row in self.history)

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.history]

    def epoch_seconds(self) -> float:
        """The median over the epochs; the first, in which everything is set up, counts only where there is no other."""
        seconds = self.column("seconds")
        return statistics.median(seconds[1:] or seconds)

    def model(self, which: str = "last") -> nn.Module:
        """The model with its weights after the last epoch, or after the "best" one, in evaluation mode."""
        task = Task(self.configuration, self.data, self.layers, self.seed)
        checkpoint = read_checkpoint(self.folder, which)
        task.load_state_dict(checkpoint["state_dict"])
        return task.model.to(self.setting.device).eval()


def read_checkpoint(folder: Path, which: str) -> dict[str, Any]:
    """Raises Refused where the file is missing or broken."""
    path = folder / f"{which}.ckpt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise Refused(f"{path}: cannot be read ({type(error).__name__}); delete {folder} to train again") from error


def shorten(configuration: Configuration, setting: Setting) -> Configuration:
    """The configuration, changed as --epochs and --quick ask."""
    changes: dict[str, Any] = {}
    if setting.quick and configuration.epochs:
        changes["epochs"] = min(configuration.epochs, QUICK_EPOCHS)
        changes["images"] = min(configuration.images or QUICK_IMAGES, QUICK_IMAGES)
        if configuration.epoch_steps:
            changes["epoch_steps"] = min(configuration.epoch_steps, QUICK_STEPS)
    if setting.epochs and configuration.epochs:
        changes["epochs"] = setting.epochs
    return replace(configuration, **changes)


def strategy(setting: Setting) -> Any:
    if setting.devices == 1:
        return "auto"
    backend = "gloo" if setting.device == "cpu" else "nccl"
    if setting.strategy == "ddp":
        return DDPStrategy(process_group_backend=backend)
    return ModelParallelStrategy(
        data_parallel_size=setting.devices,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
        process_group_backend=backend,
    )


def main_process() -> bool:
    """False in the further processes that --devices starts."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def folder_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-+." else "-" for letter in name.lower()).strip("-")


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


def _csv(history: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def train(runs: list[Run], say: Callable[[str], None]) -> None:
    """Trains all runs that are not finished yet; those that differ only in their layers take turns, epoch by epoch."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.configuration.name, run.seed), []).append(run)
    for together in groups.values():
        todo = [run for run in together if not run.finished]
        start, turn = time.perf_counter(), 0
        while any(not run.finished for run in todo):
            for run in todo if turn % 2 == 0 else reversed(todo):
                run.advance(1 if len(todo) > 1 else None)
            turn += 1
        for run in todo:
            seconds = time.perf_counter() - start
            if run.history:
                say(f"  {run}: {len(run.history)} epochs, {run.metric[0]} {run.value():.4f}, {seconds:.1f} s")
