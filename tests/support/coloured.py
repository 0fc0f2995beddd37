"""Images of one colour a class, and networks that know these colours without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

SIDE = 32
COLOURS = {"cat": (220, 40, 40), "dog": (40, 220, 40), "emu": (40, 40, 220)}


def image(colour: str, number: int) -> Image.Image:
    noise = np.random.default_rng(number).normal(0, 15, (SIDE, SIDE, 3))
    return Image.fromarray(np.clip(COLOURS[colour] + noise, 0, 255).astype(np.uint8))


def folder_of(path: Path, classes: dict[str, str], parts: Sequence[str] = ("train", "val")) -> Path:
    """A data folder with ten images of a colour for each class."""
    for part in parts:
        for name, colour in classes.items():
            place = path / part / name
            place.mkdir(parents=True)
            for number in range(10):
                image(colour, number).save(place / f"{number}.png")
    return path


def network(outputs: dict[int, str], count: int) -> nn.Module:
    """A ResNet whose outputs of these numbers know a colour each; all others are never right."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=count).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        pixels = [
            torch.from_numpy(np.array(image(c, 0))).permute(2, 0, 1) for c in outputs.values()
        ]
        images = torch.stack([(x / 255 - mean) / std for x in pixels])
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        apart = features - features.mean(0)
        weight = 10 * apart / apart.square().sum(1).mean()
        model.fc.weight.zero_()
        model.fc.bias.fill_(-20)
        model.fc.weight[[*outputs]] = weight
        model.fc.bias[[*outputs]] = -(weight * (features + features.mean(0))).sum(1) / 2
    return model


def saved(path: Path, outputs: dict[int, str], count: int) -> Path:
    torch.save(network(outputs, count).state_dict(), path)
    return path
