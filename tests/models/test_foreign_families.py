"""One small model of each family that timm has: which are backbones, and which are refused in one line."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastuper import UperNetConfig
from fastuper import UperNetForSemanticSegmentation as Segmentation

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.exhaustive

FALLING = """
    halonet26t test_byobnet coat_mini test_convnext cpubone_nano cs3darknet_s cspnext_tiny davit_tiny
    densenet264d dla34 dpn68 edgenext_small efficientformer_l1 efficientformerv2_s0 test_efficientnet
    efficientvit_b0 fasternet_t0 fastvit_s12 focalnet_tiny_lrf gcvit_tiny ghostnet_050 hardcorenas_a hgnet_tiny
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_s inception_next_atto lcnetv2_small lowformer_b0
    test_mambaout test_maxvit caformer_s18 tf_mobilenetv3_large_minimal_100 mobilenetv5_base mobilevit_xxs
    mvitv2_tiny nasnetalarge nextvit_small test_nfnet pnasnet5large pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050
    repvit_m0_9 res2net50_26w_4s resnest26d test_resnet resnetv2_18 rexnet_150 legacy_senet154 skresnet18 starnet_s1
    swiftformer_xs swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tresnet_l
    twins_svt_small vgg11 ese_vovnet19b_slim legacy_xception xception41
"""
"""Models with maps of the strides 4, 8, 16, 32."""

OTHERS = {
    "csatv2": (8, 16, 32, 64),
    "inception_resnet_v2": (5, 10, 21, 64),
    "inception_v3": (5, 10, 21, 64),
    "inception_v4": (4, 10, 21, 64),
    "selecsls42": (8, 16, 32, 64),
}
"""The strides of other models whose maps fall; those that do not pad their convolutions have rough ones."""

FLAT = {
    "beit_base_patch16_224": 16,
    "cait_xxs24_224": 16,
    "convit_tiny": 16,
    "deepseek_vit_412m": 14,
    "deit_tiny_patch16_224": 16,
    "eva02_tiny_patch14_224": 14,
    "gemma4_vit_167m": 16,
    "naflexvit_base_patch16_siglip": 16,
    "qwen3_vit_88m": 16,
    "tnt_s_patch16_224": 16,
    "test_vit": 16,
    "vit_tiny_r_s16_p8_224": 32,
    "test_vit_relpos": 16,
    "samvit_base_patch16": 16,
    "vitamin_small_224": 16,
    "xcit_nano_12_p8_224": 8,
}
"""Vision transformers, read through a neck, and the sides of their patches in pixels."""

REFUSED = """
    convmixer_768_32 crossvit_tiny_240 efficientvim_m1 efficientvit_m0 levit_384_s8 gmlp_s16_224 nest_tiny
    pit_xs_224 sequencer2d_s shvit_s1 visformer_tiny volo_d1_224
"""
"""Models without four maps that fall, and without maps that a neck could scale."""

READ = dict.fromkeys(FALLING.split(), (4, 8, 16, 32)) | OTHERS | {name: (side,) * 4 for name, side in FLAT.items()}


def skip_unless_known(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")


def config(name: str) -> UperNetConfig:
    return UperNetConfig(backbone=name, use_timm_backbone=True, hidden_size=8, auxiliary_channels=8, num_labels=3)


@pytest.mark.parametrize("name", READ)
def test_a_family_is_read(name, tmp_path):
    skip_unless_known(name)
    model = Segmentation(config(name)).eval()
    assert model.backbone.measured_maps.scales == READ[name]
    assert (model.neck is not None) is (name in FLAT)
    model.save_pretrained(tmp_path)
    again = Segmentation.from_pretrained(tmp_path)
    for size in ((96, 128), (75, 53), (20, 30)):
        pixels = torch.randn(1, 3, *size)
        with torch.no_grad():
            logits = model(pixels).logits
            assert torch.equal(again(pixels).logits, logits)
        assert logits.shape == (1, 3, *size)
        assert logits.isfinite().all()
    model.train()(torch.randn(2, 3, 64, 64), labels=torch.zeros(2, 64, 64, dtype=torch.int64)).loss.backward()
    assert any(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize("name", REFUSED.split())
def test_a_family_is_refused(name):
    skip_unless_known(name)
    with pytest.raises(ValueError, match=rf"^timm's {name} (has no|returns)") as caught:
        Segmentation(config(name))
    assert "\n" not in str(caught.value)


def test_every_family_is_in_a_list():
    """A family of a newer timm belongs in one of the lists above."""
    files = {inspect.getmodule(timm.model_entrypoint(name)) for name in timm.list_models()}
    known = [name for name in [*READ, *REFUSED.split()] if timm.is_model(name)]
    missing = files - {inspect.getmodule(timm.model_entrypoint(name)) for name in known}
    assert not missing, missing
