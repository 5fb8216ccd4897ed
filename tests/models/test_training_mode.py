"""The model in training: deferred logits, gradient checkpointing, and losses over several batches."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from fastuper import (
    ConvNextConfig,
    ConvNextV2Config,
    ResNetConfig,
    SwinConfig,
    Swinv2Config,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTPyramidConfig,
)

BACKBONES = {
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], drop_path_rate=0.3),
    "convnextv2": lambda: ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1], drop_path_rate=0.3),
    "swin": lambda: SwinConfig(
        embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, hidden_dropout_prob=0.2
    ),
    "swinv2": lambda: Swinv2Config(
        64, embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4, hidden_dropout_prob=0.2
    ),
    # At least 16 channels: with fewer, oneDNN 3.12's backward pass of strided 1x1 convolutions writes out of bounds (on
    # AVX512, two threads, an odd number of images).
    "resnet": lambda: ResNetConfig(embedding_size=16, hidden_sizes=[32, 32, 32, 32], depths=[2, 2, 2, 2]),
    "vit_pyramid": lambda: ViTPyramidConfig(
        image_size=64,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=8,
        num_attention_heads=2,
        intermediate_size=32,
        use_absolute_embeddings=False,
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
        drop_path_rate=0.3,
        neck="transposed",
        neck_scales=[2, 1, 0.5, 0.25],
    ),
}


def model(kind: str = "convnext", **values: Any) -> UperNetForSemanticSegmentation:
    torch.manual_seed(0)
    values = {"hidden_size": 16, "auxiliary_channels": 8, "num_labels": 5, **values}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=BACKBONES[kind](), **values)).train()


def batch(count: int = 2, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(0, 5, (count, size, size), generator=generator)
    labels[:, : size // 4] = 255
    return {"pixel_values": torch.randn(count, 3, size, size, generator=generator), "labels": labels}


@pytest.fixture
def formed(monkeypatch):
    """Return a list with one item for each computation of full-size logits."""
    calls: list[int] = []
    full_size = UperNetForSemanticSegmentation._full_size
    monkeypatch.setattr(UperNetForSemanticSegmentation, "_full_size", lambda *args: calls.append(1) or full_size(*args))
    return calls


def test_the_loss_computes_no_full_size_logits(formed):
    output = model()(**batch())
    output.loss.backward()
    assert output["loss"] is output[0] is output.loss
    assert list(output) == ["loss", "logits"]
    assert len(output) == 2
    assert "logits" in output
    assert formed == []


READERS = {
    "attribute": lambda output: output.logits,
    "key": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "place": lambda output: output[1],
    "slice": lambda output: output[:2][1],
    "values": lambda output: list(output.values())[1],
    "items": lambda output: dict(output.items())["logits"],
    "tuple": lambda output: output.to_tuple()[1],
    "dict": lambda output: dict(output)["logits"],
    "flattened": lambda output: pytree.tree_leaves(output)[1],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_logits_are_computed_once_when_they_are_read(read, formed):
    network = model()
    output = network(**batch())
    with torch.no_grad():
        logits = read(output)
    assert len(formed) == 1
    assert read(output) is logits is output.logits
    assert len(formed) == 1
    assert logits.is_contiguous()
    assert logits.shape == (2, 5, 64, 64)
    # They carry the same gradient as logits computed in the forward pass.
    (gradient,) = torch.autograd.grad(logits.square().sum(), network.decode_head.classifier.weight)
    assert gradient.any()


@pytest.mark.parametrize("then", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("now", [None, torch.bfloat16], ids=str)
def test_logits_are_computed_under_the_autocast_of_the_forward_pass(then, now, monkeypatch):
    # On a GPU autocast resamples in float32. The result must not depend on the place where the logits are read.
    def state() -> torch.dtype | None:
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None

    def autocast(dtype: torch.dtype | None) -> Any:
        return torch.autocast("cpu", dtype, enabled=dtype is not None)

    original, states = UperNetForSemanticSegmentation._full_size, []
    monkeypatch.setattr(
        UperNetForSemanticSegmentation, "_full_size", lambda *args: states.append(state()) or original(*args)
    )
    network = model()
    with autocast(then):
        output = network(**batch())
    with autocast(now):
        assert output.logits is not None
        assert states == [then]
        assert state() == now


def test_logits_are_pickled():
    with torch.no_grad():
        output = model()(**batch())
    again = pickle.loads(pickle.dumps(output))
    assert torch.equal(again.logits, output.logits)


def test_logits_read_before_and_after_the_backward_pass_are_the_same():
    network, before = model("resnet"), model("resnet")
    output, other = network(**batch()), before(**batch())
    logits = other.logits
    for each in (output, other):
        each.loss.backward()
    assert torch.equal(output.logits, logits)


def test_logits_read_in_inference_mode_keep_their_gradient():
    output = model()(**batch())
    with torch.inference_mode():
        assert output.logits.shape == (2, 5, 64, 64)
    assert output.logits.requires_grad
    assert not output.logits.is_inference()


def test_the_loss_of_only_ignored_pixels_is_zero():
    network, data = model(), batch()
    data["labels"][:] = 255
    for count in (0, torch.tensor(0)):
        loss = network(**data, num_items_in_batch=count).loss
        assert loss == 0
        loss.backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


def test_a_sum_of_losses_beyond_the_range_of_float16():
    network = model().half()
    data = batch(size=256)
    data["pixel_values"] = data["pixel_values"].half()
    expected = network(**data).loss
    assert expected.isfinite()
    found = network(**data, num_items_in_batch=int((data["labels"] != 255).sum())).loss
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


def test_logits_without_gradients():
    with torch.no_grad():
        output = model()(**batch())
    assert not output.logits.requires_grad
    with torch.inference_mode():
        output = model()(**batch())
    assert output.logits.shape == (2, 5, 64, 64)


@pytest.mark.parametrize(
    ("given", "count"),
    [({"output_logits": True}, 1), ({"output_logits": False}, 0), ({"return_dict": False}, 1)],
    ids=["asked-for", "not-wanted", "tuple"],
)
def test_output_logits(given, count, formed):
    output = model()(**batch(), **given)
    assert len(formed) == count
    assert len(output) == 1 + count
    if count:
        assert output[1].shape == (2, 5, 64, 64)
    short = model()(**batch(), return_dict=False, output_logits=False)
    assert len(short) == 1


def test_logits_are_computed_under_a_mode(formed):
    with FlopCounterMode(display=False):
        output = model()(**batch())
    assert len(formed) == 1
    assert isinstance(output.__dict__["logits"], torch.Tensor)


@pytest.mark.exhaustive
def test_logits_are_computed_in_compiled_models(formed):
    torch._dynamo.reset()
    compiled = torch.compile(model(), backend="eager", fullgraph=True)
    with torch.no_grad():
        output = compiled(**batch())
    assert formed
    assert isinstance(output.__dict__["logits"], torch.Tensor)


def test_logits_are_computed_under_ddp(formed):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        network = model()
        parallel = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        output = parallel(**batch())
        assert len(formed) == 1
        assert isinstance(output.__dict__["logits"], torch.Tensor)
        output.loss.backward()
        alone = model()
        alone(**batch()).loss.backward()
        for ours, expected in zip(network.parameters(), alone.parameters(), strict=True):
            assert (ours.grad is None and expected.grad is None) or torch.equal(ours.grad, expected.grad)
        parallel(**batch(), output_logits=False)
        assert len(formed) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_loss_over_several_batches():
    network = model("swin").eval()
    parts = [batch(1), batch(2), batch(3)]
    valid = sum((part["labels"] != 255).sum() for part in parts)
    total = sum(network(**part, num_items_in_batch=valid).loss for part in parts)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    torch.testing.assert_close(total, network(**whole).loss)
    torch.testing.assert_close(network(**whole, num_items_in_batch=int(valid)).loss, network(**whole).loss)
    with pytest.raises(ValueError, match="num_items_in_batch divides the loss: give labels too"):
        network(parts[0]["pixel_values"], num_items_in_batch=3)


def test_the_loss_is_that_of_the_logits():
    network = model("resnet").double()
    data = batch()
    data["pixel_values"] = data["pixel_values"].double()
    maps = network.backbone(data["pixel_values"]).feature_maps
    expected = [
        F.cross_entropy(F.interpolate(head(maps), size=(64, 64), mode="bilinear"), data["labels"], ignore_index=255)
        for head in (network.decode_head, network.auxiliary_head)
    ]
    torch.testing.assert_close(model("resnet").double()(**data).loss, expected[0] + 0.4 * expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_a_loss_in_float32(dtype):
    network = model().to(dtype)
    data = batch()
    data["pixel_values"] = data["pixel_values"].to(dtype)
    assert network(**data).loss.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(**data)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(parameter.grad is None or parameter.grad.dtype == dtype for parameter in network.parameters())
    expected = model().to(dtype)(**data).loss
    torch.testing.assert_close(output.loss, expected.float(), rtol=0.02, atol=0.02)


# Gradient checkpointing -----------------------------------------------------------------------------------------------


def gradients(network: UperNetForSemanticSegmentation, steps: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    for step in range(steps):
        network(**batch(2 + step)).loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", BACKBONES)
def test_checkpointing_changes_nothing_but_memory(kind):
    """This includes dropped branches, running statistics and counts of batches."""
    usual, thrifty = model(kind), model(kind)
    assert not thrifty.is_gradient_checkpointing
    thrifty.gradient_checkpointing_enable()
    assert thrifty.is_gradient_checkpointing
    expected, found = gradients(usual), gradients(thrifty)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    buffers = dict(usual.named_buffers())
    assert buffers
    for name, buffer in thrifty.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert thrifty.decode_head.bottleneck.batch_norm.num_batches_tracked == 2


def kept_bytes(network: UperNetForSemanticSegmentation) -> int:
    """Return the bytes kept for the backward pass, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**batch())
    return sum(storage.nbytes() for storage in kept.values())


def test_maps_kept_for_the_backward_pass_are_channels_last():
    network, kept = model("resnet"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        network(**batch()).loss.backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    maps = [x for x in kept if x.ndim == 4 and x.untyped_storage().data_ptr() not in own]
    # Maps are (B, C, H, W); the loss's maps are (B, H, W, classes).
    strides = [x.stride(3 if x.shape[3] == 5 else 1) for x in maps if x.shape[1] > 1 and x.shape[2:].numel() > 1]
    assert len(strides) > 100
    assert set(strides) == {1}


@pytest.mark.parametrize("kind", BACKBONES)
def test_checkpointing_keeps_less(kind):
    network = model(kind)
    before = kept_bytes(network)
    network.gradient_checkpointing_enable()
    # The hooks of `kept_bytes` get the inputs of the blocks, which are kept.
    assert kept_bytes(network) < 0.5 * before
    network.gradient_checkpointing_disable()
    assert kept_bytes(network) == before


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_an_mlp_keeps_only_its_input_and_its_hidden_values(kind):
    """Norms and activations are cheap: untouched ones are recomputed, with the same gradients."""
    untouched, touched = model(kind), model(kind)
    for name, module in touched.named_modules():
        if name.endswith(("layernorm", "layernorm_after")):
            module.register_forward_hook(lambda *_: None)
    assert kept_bytes(untouched) < 0.95 * kept_bytes(touched)
    expected, found = gradients(touched), gradients(untouched)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_checkpointing_acts_only_in_training():
    network = model()
    network.gradient_checkpointing_enable()
    network.eval()
    expected = kept_bytes(network)
    network.gradient_checkpointing_disable()
    assert kept_bytes(network) == expected


def test_checkpointing_of_a_timm_backbone():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone="resnet10t", use_timm_backbone=True, hidden_size=16, auxiliary_channels=8, num_labels=5
    )
    config.auxiliary_in_channels = None
    usual = UperNetForSemanticSegmentation(config).train()
    thrifty = copy.deepcopy(usual)
    thrifty.activation_checkpointing_enable()  # its name in Transformers 5
    expected, found = gradients(usual), gradients(thrifty)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    buffers = dict(usual.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in thrifty.named_buffers())
    assert kept_bytes(thrifty) < kept_bytes(usual)
    thrifty.activation_checkpointing_disable()
    assert not thrifty.is_gradient_checkpointing


def test_options_of_checkpointing():
    network = model()
    network.gradient_checkpointing_enable({"use_reentrant": False})
    assert network.is_gradient_checkpointing
    network.activation_checkpointing_enable(every_n_layers=2)
    blocks = [layer for stage in network.backbone.encoder.stages for layer in stage.layers]
    assert [block.gradient_checkpointing for block in blocks] == [True, False, True, False, True]
    assert network.decode_head.gradient_checkpointing
    with pytest.raises(ValueError, match="offload=True"):
        network.activation_checkpointing_enable(offload=True)
    for options in ({"use_reentrant": True}, {"every": 2}):
        with pytest.raises(
            ValueError, match="gradient checkpointing supports only use_reentrant=False and every_n_layers"
        ):
            network.gradient_checkpointing_enable(options)


@pytest.mark.exhaustive
def test_checkpointing_compiles():
    torch._dynamo.reset()
    network = model("resnet")
    network.gradient_checkpointing_enable()
    compiled = torch.compile(network, backend="aot_eager")
    loss = compiled(**batch(), output_logits=False).loss
    loss.backward()
    expected = model("resnet")
    expected(**batch()).loss.backward()
    torch.testing.assert_close(
        network.decode_head.classifier.weight.grad, expected.decode_head.classifier.weight.grad, rtol=1e-3, atol=1e-5
    )
    assert network.decode_head.bottleneck.batch_norm.num_batches_tracked == 1
