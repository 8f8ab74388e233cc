"""torch.compile's backend "dlkit" on architectures of transformers and timm."""

import copy
import importlib.util
from collections import Counter

import pytest
import torch
from support.architectures import TIMM, distances, make
from support.compiled import SHOWN, step
from torch._dynamo.utils import counters

NAMES = [*SHOWN, "deit_tiny_patch16_224", "resnet18", "whisper", "cohere", "opt", "phi3"]
NAMES += ["deit3_small_patch16_224", "dinov2", "convnext", "convformer_s18"]
NAMES += ["mobilenetv3_small_050"]
NAMES = [name for name in NAMES if importlib.util.find_spec("timm" if name in TIMM else "transformers")]
ADD_NORMS = {  # the norms that include the add before them
    "bert": 4,
    "gpt2": 4,
    "llama": 4,
    "qwen3": 4,
    "gemma2": 4,
    "t5": 10,
    "vit_tiny_patch16_224": 24,
    "swin_tiny_patch4_window7_224": 21,
    "deit3_small_patch16_224": 24,  # with LayerScale
    "dinov2": 4,
    "convnext_atto": 3,  # in front of the downsampling; in a block a convolution stands between add and norm
    "convnext": 3,
    "convformer_s18": 35,
    "phi3": 4,
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_the_original_s(name):
    """Outputs, gradients and buffers of a training step, and no more graphs than without dlkit."""
    model, example = make(name, 0.0)
    for parameter in model.parameters():  # weights of norms are 1 in a new model
        torch.nn.init.normal_(parameter, std=0.05) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.5, 1)
    expected = step(model, example, torch.float64, None, widened=True)
    graphs = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    counters.clear()
    fused = []
    found = step(model, example, torch.float64, fused, widened=True)
    assert (counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())) == graphs
    assert distances(found, expected)[0] < 1e-12
    assert fused
    if name in ADD_NORMS:
        count = Counter(entry.op for entry in fused)
        assert count["add_layer_norm"] + count["add_rms_norm"] == ADD_NORMS[name]
    assert any(entry.module for entry in fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TIMM])
def test_other_dtypes_are_no_farther_from_float64(name, dtype):
    model, example = make(name, 0.0)
    exact = step(model, example, torch.float64, None, widened=True)
    error, allowed = (distances(step(model, example, dtype, fused), exact)[1] for fused in ([], None))
    assert error < 1.25 * allowed  # a mean over few tensors


AUTOCAST = ["vit_tiny_patch16_224", "deit3_small_patch16_224", "dinov2", "bert", "gpt2", "t5", "convnext_atto"]


@pytest.mark.parametrize("name", [name for name in AUTOCAST if name in NAMES])
def test_autocast(name):
    """Branches in bf16 beside a residual in fp32: as many fusions, results no farther from float64."""
    model, example = make(name, 0.0)
    exact = step(model, example, torch.float64, None, widened=True)
    errors, fused = [], []
    for report in (fused, None):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(distances(step(model, example, torch.float32, report), exact)[1])
    assert errors[0] < 1.25 * errors[1]
    count = Counter(entry.op for entry in fused)
    assert count["add_layer_norm"] + count["add_rms_norm"] == ADD_NORMS[name]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_of_a_language_model(checkpointing):
    """With labels, in bf16 autocast: the loss falls as it does without dlkit."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    report, losses = [], {}
    for backend, options in (("eager", None), ("dlkit", {"report": report})):
        torch._dynamo.reset()
        net = copy.deepcopy(model)
        compiled = torch.compile(net, backend=backend, options=options)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        losses[backend] = []
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16):
                loss = compiled(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[backend].append(float(loss))
    assert {"cross_entropy", "rms_norm"} <= {entry.op for entry in report}
    torch.testing.assert_close(losses["dlkit"], losses["eager"], rtol=2e-2, atol=0)
    assert losses["dlkit"][-1] < 0.9 * losses["dlkit"][0]
