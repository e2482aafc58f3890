"""What `resmem serve` takes for the memories of the demo: `--model` and `--data residual_memory.demo.served:…`."""

from typing import TYPE_CHECKING

from residual_memory.demo.assets import shipped_network
from residual_memory.demo.cifar100 import find_cifar100, read_cifar100
from residual_memory.errors import DataNotFound

if TYPE_CHECKING:
    from residual_memory.demo.images import Images
    from residual_memory.demo.networks import CifarResNet


def network() -> "CifarResNet":
    """The ResNet-8 that all 50,000 images were used for."""
    return shipped_network("resnet8-50000")


def images() -> "Images":
    """The 50,000 training images.

    Raises
    ------
    DataNotFound : if they are not on this machine.
    """
    from residual_memory.demo.images import Images

    folder = find_cifar100()
    if folder is None:
        raise DataNotFound("CIFAR-100 is not on this machine; run resmem demo first, or leave --data out")
    return Images(read_cifar100(folder, "train"))
