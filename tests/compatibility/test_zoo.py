"""A fixed dozen of timm's families goes the whole path, with small models and small pictures."""

import pytest
import torch
from zoo import try_model

pytestmark = pytest.mark.slow

AGREEMENT = 95.0  # percent of 20 pictures: one may fall the other way in a random network


@pytest.mark.parametrize(
    "model",
    [
        "lcnet_035",
        "starnet_s050",
        "test_byobnet",
        "test_coatnet",
        "test_convnext",
        "test_efficientnet",
        "test_efficientnet_gn",
        "test_mambaout",
        "test_nfnet",
        "test_resnet",
        "test_vit",
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
