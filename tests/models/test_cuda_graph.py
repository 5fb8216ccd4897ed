"""CUDA graphs: the error without a GPU, replays on a GPU, and the state that a recorded graph depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastuper.models.cuda_graph import Dependencies
from tests.models.test_upernet import model


def test_capture_needs_a_gpu() -> None:
    with pytest.raises(ValueError, match="recorded on a GPU, but pixel_values are on cpu; move the model"):
        model("convnext").capture(torch.zeros(1, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replay_uses_new_images_and_new_weights() -> None:
    network = model("convnext").eval().cuda()
    first, second = torch.randn(2, 1, 3, 64, 64, device="cuda").unbind()
    with torch.no_grad():
        replay = network.capture(first)
        labels = network.capture(first, target_size=(50, 70))
        for step in range(3):
            for pixels in (first, second):
                torch.testing.assert_close(replay(pixels), network(pixels).logits)
                assert torch.equal(labels(pixels)[0], network.segment(pixels, target_sizes=[(50, 70)])[0])
            parameter = network.decode_head.classifier.weight
            parameter.mul_(1.5) if step == 0 else setattr(parameter, "data", parameter.data * 0.5)
    with pytest.raises(ValueError, match="call capture for this shape too"):
        replay(first[:, :, :32])


def changes() -> dict[str, Callable[[Any], Any]]:
    def parameter(network: Any) -> Any:
        return network.decode_head.classifier.weight

    return {
        "moved": lambda network: setattr(parameter(network), "data", parameter(network).data.clone()),
        "replaced": lambda network: setattr(
            network.decode_head.classifier, "weight", torch.nn.Parameter(parameter(network).clone())
        ),
        "converted": lambda network: network.double(),
        "a module": lambda network: setattr(network.decode_head, "classifier", torch.nn.Identity()),
        "a hook": lambda network: network.decode_head.fpn_convs[0].register_forward_hook(lambda *_: None),
        "another hook": lambda network: (
            list(network.backbone._forward_hooks.values()),
            network.backbone._forward_hooks.clear(),
            network.backbone.register_forward_hook(lambda *_: None),
        ),
        "forward": lambda network: setattr(network.decode_head, "forward", lambda maps: maps[0]),
        "a module more": lambda network: network.decode_head.lateral_convs.append(torch.nn.Identity()),
        "a bias": lambda network: setattr(
            network.decode_head.bottleneck.conv,
            "bias",
            torch.nn.Parameter(torch.zeros(len(network.decode_head.bottleneck.conv.weight))),
        ),
        "a mode": lambda network: network.decode_head.bottleneck.batch_norm.train(),
        "a buffer": lambda network: network.decode_head.bottleneck.batch_norm.register_buffer("running_mean", None),
    }


@pytest.mark.parametrize("change", changes())
def test_dependencies_of_a_recorded_graph(change: str) -> None:
    network = model("convnext").eval().requires_grad_(False)
    network.backbone.register_forward_hook(lambda *_: None)
    dependencies = Dependencies(network)
    network.decode_head.classifier.weight.mul_(2)  # in place: the graph reads this memory
    network.load_state_dict(network.state_dict())
    assert dependencies.are_unchanged()
    changes()[change](network)
    assert not dependencies.are_unchanged()
    assert Dependencies(network).are_unchanged()


def test_dependencies_include_compiled_parts() -> None:
    network = model("convnext").eval()
    network.backbone = torch.compile(network.backbone, backend="eager")
    assert Dependencies(network).are_unchanged()


def test_dependencies_include_hooks_on_all_modules() -> None:
    dependencies = Dependencies(model("convnext"))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not dependencies.are_unchanged()
    handle.remove()
    assert dependencies.are_unchanged()
