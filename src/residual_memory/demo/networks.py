"""Networks for 32 x 32 images: the family of the paper's CIFAR-100 table."""

from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

# Mean and deviation of the CIFAR-100 training images, in [0, 1].
CHANNEL_MEANS = (0.5071, 0.4865, 0.4409)
CHANNEL_DEVIATIONS = (0.2673, 0.2564, 0.2762)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; a change of shape goes through a 1 x 1 convolution (option B)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o g v"]:
        hidden = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR residual network of depth 6 n + 2 with 16, 32 and 64 channels, or a multiple of them.

    It takes images in [0, 1] and normalises them itself, so that nobody can forget to. The pooled 64 numbers are
    the input of `head`; `stage3` gives them before pooling, 64 x 8 x 8.

    Parameters
    ----------
    depth : 8, 14, 20, 32, 44 or 56 in the paper; any 6 n + 2 works.
    n_classes : number of logits.
    width : times the usual number of channels.

    References
    ----------
    He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, depth: int = 8, n_classes: int = 100, width: int = 1) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}, expected 6 n + 2: 8, 14, 20, 32, 44, 56, …")
        super().__init__()
        self.register_buffer("mean", torch.tensor(CHANNEL_MEANS).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CHANNEL_DEVIATIONS).view(1, 3, 1, 1))
        n_blocks, n = (depth - 2) // 6, 16 * width
        self.conv = nn.Conv2d(3, n, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(n)
        self.stage1 = _stage(n, n, 1, n_blocks)
        self.stage2 = _stage(n, 2 * n, 2, n_blocks)
        self.stage3 = _stage(2 * n, 4 * n, 2, n_blocks)
        self.head = nn.Linear(4 * n, n_classes)
        _start(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        x = (images - self.mean) / self.deviation
        x = functional.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))


class InvertedResidual(nn.Module):
    """A 1 x 1 expansion, a 3 x 3 convolution channel by channel, and a linear 1 x 1 projection."""

    def __init__(self, n_in: int, n_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        self.expand = _normed(nn.Conv2d(n_in, wide, 1, bias=False), nn.ReLU6()) if expansion > 1 else nn.Identity()
        self.depthwise = _normed(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.ReLU6())
        self.project = _normed(nn.Conv2d(wide, n_out, 1, bias=False))
        self.skips = stride == 1 and n_in == n_out

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o g v"]:
        hidden = self.project(self.depthwise(self.expand(x)))
        return x + hidden if self.skips else hidden


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 for 32 x 32 images: the first two strides are 1, so that `features` ends in 1280 x 4 x 4.

    Parameters
    ----------
    n_classes : number of logits.

    References
    ----------
    Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, table 2.
    """

    mean: Tensor
    deviation: Tensor

    # expansion, channels, blocks, stride of the first
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, n_classes: int = 100) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(CHANNEL_MEANS).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CHANNEL_DEVIATIONS).view(1, 3, 1, 1))
        layers: list[nn.Module] = [_normed(nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.ReLU6())]
        n_in = 32
        for expansion, n_out, n_blocks, stride in self.STAGES:
            for block in range(n_blocks):
                layers.append(InvertedResidual(n_in, n_out, stride if block == 0 else 1, expansion))
                n_in = n_out
        self.features = nn.Sequential(*layers, _normed(nn.Conv2d(n_in, 1280, 1, bias=False), nn.ReLU6()))
        self.head = nn.Linear(1280, n_classes)
        _start(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        x = self.features((images - self.mean) / self.deviation)
        return self.head(x.mean((2, 3)))


CifarNetwork = CifarResNet | CifarMobileNetV2
Network = TypeVar("Network", CifarResNet, CifarMobileNetV2, CifarNetwork)

NETWORKS = ("resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56", "resnet8-wide", "mobilenetv2")


def network_named(name: str) -> CifarNetwork:
    """A network of the family with fresh weights; "resnet8-wide" has twice the channels.

    Raises
    ------
    ValueError : if the family has none of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"network is {name!r}, expected one of {', '.join(NETWORKS)}")
    if name == "mobilenetv2":
        return CifarMobileNetV2()
    depth, _, wide = name.removeprefix("resnet").partition("-")
    return CifarResNet(int(depth), width=2 if wide else 1)


def channels_last(network: Network) -> Network:
    """The network with its weights laid out for fast convolutions on cores."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _stage(n_in: int, n_out: int, stride: int, n_blocks: int) -> nn.Sequential:
    blocks = [BasicBlock(n_in, n_out, stride)]
    blocks += [BasicBlock(n_out, n_out, 1) for _ in range(n_blocks - 1)]
    return nn.Sequential(*blocks)


def _normed(convolution: nn.Conv2d, *activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), *activation)


def _start(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
