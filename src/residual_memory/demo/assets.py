"""What ships with the package: two trained ResNet-8, 8-bit keys of all 60,000 images, and the tuned settings.

The networks are trained by ``experiments/cifar100/train.py``; keys and settings are written by
``python -m experiments cifar100``.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

if TYPE_CHECKING:
    from residual_memory.demo.networks import CifarResNet

ASSETS = Path(str(files("residual_memory.demo"))) / "assets"
SHIPPED_KEYS = ASSETS / "keys-resnet8-50000.npz"
N_TRAIN = 50_000

Trained = Literal["resnet8-45000", "resnet8-50000"]


def shipped_network(name: Trained) -> "CifarResNet":
    """ResNet-8 as trained on the first 45,000 images of the fixed split, or on all 50,000; in eval mode."""
    from safetensors.torch import load_file

    from residual_memory.demo.networks import CifarResNet, channels_last

    network = CifarResNet(8)
    network.load_state_dict(load_file(ASSETS / f"{name}.safetensors"))
    return channels_last(network.eval())


def shipped_settings() -> dict[str, dict[str, Any]]:
    """Settings chosen on the 5,000 held-out images with the network of the other 45,000, by name of the key."""
    settings: dict[str, dict[str, Any]] = json.loads((ASSETS / "settings.json").read_text())
    return settings


@dataclass(frozen=True)
class ShippedKeys:
    """The pooled last layer of the ResNet-8 trained on 50,000 images, for all images: training ones first.

    Attributes
    ----------
    keys, labels : of the 50,000 training images and the 10,000 test images.
    weight, bias : of the head, from which predictions follow.
    """

    keys: Float[ndarray, "n 64"]
    labels: Int64[ndarray, " n"]
    weight: Float[ndarray, "100 64"]
    bias: Float[ndarray, " 100"]
    class_names: tuple[str, ...]

    def predictions(self) -> Float[ndarray, "n 100"]:
        """What the network says of each image: softmax of the head over the key."""
        return head_predictions(self.keys, self.weight, self.bias)


def head_predictions(
    keys: Float[ndarray, "n d"], weight: Float[ndarray, "c d"], bias: Float[ndarray, " c"]
) -> Float[ndarray, "n c"]:
    """Softmax of a linear head: the base's prediction recomputed from a key that is the head's exact input."""
    logits = keys @ weight.T + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def write_keys(path: Path, shipped: ShippedKeys) -> None:
    """Store keys in 8 bits a number: each dimension has its own range."""
    top = shipped.keys.max(axis=0)
    coded = np.rint(shipped.keys / top * 255).clip(0, 255).astype(np.uint8)
    np.savez_compressed(
        path,
        coded=coded,
        top=top,
        labels=shipped.labels.astype(np.uint8),
        weight=shipped.weight,
        bias=shipped.bias,
        class_names=np.array(shipped.class_names),
    )


def shipped_keys(path: Path = SHIPPED_KEYS) -> ShippedKeys:
    """Read what `write_keys` wrote."""
    with np.load(path, allow_pickle=False) as packed:
        coded: UInt8[ndarray, "n 64"] = packed["coded"]
        return ShippedKeys(
            keys=coded.astype(np.float32) * (packed["top"] / 255),
            labels=packed["labels"].astype(np.int64),
            weight=packed["weight"],
            bias=packed["bias"],
            class_names=tuple(packed["class_names"].tolist()),
        )
