"""Exported programs in tools that run or quantize them: ONNX, AOTInductor and torchao."""

import copy

import pytest
import torch
from torch import nn

import dlkit


def layers(*more):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(), nn.GroupNorm(2, 6), nn.LayerNorm(4), *more
    )


@pytest.mark.parametrize("change", [dlkit.replace, lambda model: dlkit.fuse(dlkit.replace(model))])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(tmp_path, dynamo, change):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = layers(*[nn.RMSNorm(4)] * dynamo), torch.randn(2, 3, 6, 6)  # the old exporter has no RMSNorm
    model(x)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.onnx.export(change(model), (x,), tmp_path / "model.onnx", dynamo=dynamo)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)


def test_aot_inductor(tmp_path):
    model, x = layers(nn.RMSNorm(4)).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(dlkit.replace(model), (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), expected)


def test_quantization_of_an_exported_program():
    """BatchNorm is folded into the convolution: the graph is that of torch's layers."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model, x = layers(), torch.randn(2, 3, 6, 6)
    model(x)
    results = []
    for net in (model.eval(), dlkit.replace(copy.deepcopy(model))):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
        prepared(x)
        quantized = pt2e.convert_pt2e(prepared)
        results.append(([node.target for node in quantized.graph.nodes if node.op == "call_function"], quantized(x)))
    assert results[0][0] == results[1][0] and "batch_norm" not in str(results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
