"""Residual networks for 32 x 32 images, the family of the paper's CIFAR-100 table."""

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
    """A CIFAR residual network of depth 6 n + 2 with 16, 32 and 64 channels.

    It takes images in [0, 1] and normalises them itself, so that nobody can forget to. The pooled 64 numbers are
    the input of `head`; `stage3` gives them before pooling, 64 x 8 x 8.

    Parameters
    ----------
    depth : 8, 14, 20, 32, 44 or 56 in the paper; any 6 n + 2 works.
    n_classes : number of logits.

    References
    ----------
    He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, depth: int = 8, n_classes: int = 100) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}, expected 6 n + 2: 8, 14, 20, 32, 44, 56, …")
        super().__init__()
        self.register_buffer("mean", torch.tensor(CHANNEL_MEANS).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(CHANNEL_DEVIATIONS).view(1, 3, 1, 1))
        n_blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, 1, n_blocks)
        self.stage2 = _stage(16, 32, 2, n_blocks)
        self.stage3 = _stage(32, 64, 2, n_blocks)
        self.head = nn.Linear(64, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        x = (images - self.mean) / self.deviation
        x = functional.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.head(x.mean((2, 3)))


def channels_last(network: CifarResNet) -> CifarResNet:
    """The network with its weights laid out for fast convolutions on cores."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _stage(n_in: int, n_out: int, stride: int, n_blocks: int) -> nn.Sequential:
    blocks = [BasicBlock(n_in, n_out, stride)]
    blocks += [BasicBlock(n_out, n_out, 1) for _ in range(n_blocks - 1)]
    return nn.Sequential(*blocks)
