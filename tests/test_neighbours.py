# SPDX-License-Identifier: Apache-2.0
"""A wrapped model together with optional third-party packages: `make neighbours`."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import timm_or_skip

import gated_prompt as gp

timm_or_skip()
from restated import make_case, small_vit

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTED = ["vpt-shallow", "vpt-deep", "gpt", "gpt-deep"]


def images(batch=2):
    torch.manual_seed(3)
    return torch.randn(batch, 3, 40, 24)


def make(method):
    return make_case("MAE-style", {"method": method}).float().eval()


@pytest.mark.parametrize("method", PROMPTED)
def test_accelerate_offloads_a_wrapped_model(method):
    accelerate = pytest.importorskip("accelerate")
    model = make(method)
    wanted = model(images())
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.backbone.blocks[0].mlp.fc1.weight.is_meta
    torch.testing.assert_close(model(images()), wanted)
    vit = small_vit()
    accelerate.cpu_offload(vit, execution_device="cpu")
    with pytest.raises(RuntimeError, match=r"its own forward, .* call accelerate after wrap"):
        gp.wrap(vit, method, num_prompts=4)


@pytest.mark.parametrize("method", PROMPTED)
def test_the_old_onnx_export_has_the_gates(method, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = make(method), tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(),), path, dynamo=False, input_names=["images"])
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(None, {"images": (images() + 1).numpy()})
    torch.testing.assert_close(
        torch.from_numpy(got), model(images() + 1).detach(), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("method", PROMPTED)
def test_int8_weights_of_torchao_run_compile_and_are_saved(method, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")

    def make_vit():
        vit = small_vit().float().eval()
        quantization.quantize_(vit, quantization.Int8WeightOnlyConfig())
        return vit

    model = gp.wrap(make_vit(), method, num_prompts=4, prompt_dropout=0.0).eval()
    wanted = model(images())
    plain = copy.deepcopy(model)
    for module in list(plain.backbone.modules()):  # the same weights, not quantised
        weight = getattr(module, "_parameters", {}).get("weight")
        if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter:
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    torch.testing.assert_close(wanted, plain(images()), rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), wanted, rtol=1e-3, atol=1e-3)
    model.save_tuned(tmp_path)
    torch.testing.assert_close(gp.load_tuned(tmp_path, make_vit())(images()), wanted)


@pytest.mark.parametrize("method", PROMPTED)
def test_lightning_averages_weights(method):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.param_groups(lr=1e-3), lr=1e-3)

    data = torch.utils.data.TensorDataset(images(8), torch.arange(8) % 5)
    module = Module(make(method).train())
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[lightning.callbacks.WeightAveraging()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data, 4))
    assert module.model.eval()(images()).isfinite().all()
