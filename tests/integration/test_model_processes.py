"""The models of test_models in 2 processes (gloo), with dlkit's layers and optimizer, against torch's in one."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support.models import MODELS, losses_of, make
from support.processes import join_group, new_cases, problems_of, run_cases
from torch import nn

import dlkit

PROCESSES = 2
CASES, case = new_cases()


def run(rank, folder):
    """Runs in each process."""
    join_group(rank, folder, PROCESSES)
    run_cases(CASES, (rank, dist.init_device_mesh("cpu", (PROCESSES,))), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return problems_of(run, folder, PROCESSES)


def present(*names):
    return [name for name in names if name in MODELS]


def ours(name, p=0.0):
    return dlkit.fuse(dlkit.replace(make(name, p)))


trained = partial(losses_of, optimizer=dlkit.optim.SGD)


def assert_same(found, expected):
    """`found` holds losses of parts of the batch or of all of it. transformers computes losses in fp32."""
    found = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(found)
    assert abs(expected[-1] - expected[0]) > 1e-3 * abs(expected[0]), expected
    torch.testing.assert_close((found / PROCESSES).tolist(), expected, rtol=1e-6, atol=0)


def part(rank):
    return lambda batch: {key: value.chunk(PROCESSES)[rank] for key, value in batch.items()}


@case
def data_parallel(rank, mesh):
    for name in present("gpt2", "vit"):
        expected = losses_of(make(name, 0.0), name)
        model = nn.parallel.DistributedDataParallel(ours(name))
        assert_same(trained(model, name, part(rank)), expected)


@case
def data_parallel_with_synchronised_statistics(rank, mesh):
    for name in present("resnet18"):
        expected = losses_of(make(name, 0.0), name)
        model = dlkit.nn.SyncBatchNorm.convert_sync_batchnorm(ours(name))
        assert_same(trained(nn.parallel.DistributedDataParallel(model), name, part(rank)), expected)


def sharded(model, name, **options):
    from torch.distributed.fsdp import fully_shard

    blocks = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}[name]
    for block in model.get_submodule(blocks):
        fully_shard(block, **options)
    return fully_shard(model, **options)


@case
def fsdp2(rank, mesh):
    for name in present("gpt2", "bert", "llama"):
        expected = losses_of(make(name, 0.0), name)
        for checkpointed in (False, True):
            model = ours(name)
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            assert_same(trained(sharded(model, name, mesh=mesh), name, part(rank)), expected)


@case
def tensor_and_sequence_parallelism(rank, mesh):
    """Norms and dropouts on DTensors. With dropout the run is that of dlkit's layers in one process."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    for name in present("bert"):
        for p in (0.0, 0.3):
            model = dlkit.replace(make(name, p))
            torch.manual_seed(3)
            expected = losses_of(copy.deepcopy(model) if p else make(name, p), name)
            columns = ColwiseParallel(input_layouts=Shard(1))
            rows = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
            # The sequence is cut first, since SequenceParallel expects its input cut.
            cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
            join = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
            plan = {"bert.embeddings.LayerNorm": cut, "cls.predictions.transform": join}
            parallelize_module(model, mesh, plan)
            parallelize_module(model, mesh, {"bert.embeddings.LayerNorm": SequenceParallel()})
            for layer in model.bert.encoder.layer:
                layer_plan = {
                    **{f"attention.self.{which}": columns for which in ("query", "key", "value")},
                    "attention.output.dense": rows,
                    "attention.output.LayerNorm": SequenceParallel(),
                    "intermediate.dense": columns,
                    "output.dense": rows,
                    "output.LayerNorm": SequenceParallel(),
                }
                parallelize_module(layer, mesh, layer_plan)
            torch.manual_seed(3)
            assert_same(trained(model, name), expected)


@pytest.mark.parametrize("name", CASES)
def test_case(problems, name):
    for rank, found in enumerate(problems):
        assert name in found, f"process {rank} did not get to it"
        assert found[name] is None, f"process {rank}: {found[name]}"
