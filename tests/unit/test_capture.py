"""CUDA graphs where there is no GPU, and where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.unit.test_modeling import model


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="recorded on a GPU, and pixel_values are on cpu"):
        model("convnext").capture(torch.zeros(1, 3, 64, 64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_sees_new_images_and_new_weights() -> None:
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
    with pytest.raises(ValueError, match="capture once more for another shape"):
        replay(first[:, :, :32])
