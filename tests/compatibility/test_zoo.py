"""Ten of timm's families go the whole path, with small models and small images."""

from functools import partial

import pytest
import torch
from timm.models import MobileNetV3, StarNet, build_model_with_cfg, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from torch import nn
from zoo import try_model

pytestmark = pytest.mark.slow

AGREEMENT = 95.0  # percent of 20 pictures: one may fall the other way in a random network


# Two families of which timm has no small model for tests: a few blocks of each.


@register_model
def short_lcnet(pretrained=False, **options):
    blocks = [["dsa_r1_k3_s1_c16"], ["dsa_r1_k3_s2_c24"], ["dsa_r1_k5_s2_c32_se0.25"]]
    return build_model_with_cfg(
        MobileNetV3,
        "short_lcnet",
        pretrained,
        block_args=decode_arch_def(blocks),
        stem_size=8,
        num_features=64,
        act_layer=nn.Hardswish,
        se_layer=partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU),
        **options,
    )


@register_model
def short_starnet(pretrained=False, **options):
    return build_model_with_cfg(
        StarNet, "short_starnet", pretrained, base_dim=16, depths=[1, 1], **options
    )


@pytest.mark.parametrize(
    "model",
    [
        "short_lcnet",
        "short_starnet",
        "test_byobnet",
        "test_coatnet",
        "test_convnext",
        "test_efficientnet",
        "test_efficientnet_gn",
        "test_mambaout",
        "test_nfnet",
        "test_vit_relpos",
    ],
)
def test_a_family_goes_the_whole_path(model, tmp_path):
    with torch.random.fork_rng():
        row = try_model(model, 4, tmp_path, input_size=64)
    assert row["passed"], row.get("traceback", row["error"])
    assert row["converted"] > 0
    assert row["unlisted"] == []
    assert row["float_file_diff"] < 0.01
    assert row["agreement_off"] >= AGREEMENT
