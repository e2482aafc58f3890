import pytest
import torch
from torch import Tensor, nn

from residual_memory.demo.networks import CHANNEL_DEVIATIONS, CHANNEL_MEANS, BasicBlock, CifarResNet, channels_last


def n_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size)


@pytest.mark.parametrize("depth", [8, 14, 20])
@pytest.mark.parametrize("n_classes", [10, 100])
def test_images_become_one_logit_a_class(depth: int, n_classes: int) -> None:
    network = CifarResNet(depth, n_classes).eval()
    assert network(images()).shape == (2, n_classes)


@pytest.mark.parametrize(("depth", "n"), [(8, 83_892), (14, 181_108), (20, 278_324), (56, 861_620)])
def test_a_network_has_the_parameters_of_its_family(depth: int, n: int) -> None:
    assert n_parameters(CifarResNet(depth)) == n


@pytest.mark.parametrize("depth", [8, 14, 32])
def test_a_network_is_as_deep_as_it_says(depth: int) -> None:
    """Counted as its authors do: the 3 x 3 convolutions and the head; shortcuts are beside the way."""
    layers = [
        module
        for module in CifarResNet(depth).modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3))
    ]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 9, 10, 18, 51])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth is {depth}, expected 6 n"):
        CifarResNet(depth)


def test_the_stages_halve_the_image_and_double_the_channels() -> None:
    network = CifarResNet().eval()
    x = network.norm(network.conv(images()))
    shapes = []
    for stage in (network.stage1, network.stage2, network.stage3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_the_head_sees_the_mean_of_the_last_stage() -> None:
    network = CifarResNet().eval()
    seen: dict[str, Tensor] = {}
    network.stage3.register_forward_hook(lambda *parts: seen.update(maps=parts[2]))
    network.head.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    network(images())
    torch.testing.assert_close(seen["pooled"], seen["maps"].mean((2, 3)))


def test_it_normalises_images_itself() -> None:
    network = CifarResNet().eval()
    seen: list[Tensor] = []
    network.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    means, deviations = (torch.tensor(values).view(1, 3, 1, 1) for values in (CHANNEL_MEANS, CHANNEL_DEVIATIONS))
    network((means + 2 * deviations).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 32, 32), 2.0))


def test_the_normalisation_is_kept_with_the_weights_but_not_trained() -> None:
    network = CifarResNet()
    assert {"mean", "deviation"} <= set(network.state_dict())
    assert not {"mean", "deviation"} & {name for name, _ in network.named_parameters()}


def test_weights_go_from_one_network_to_another() -> None:
    first, second, x = CifarResNet().eval(), CifarResNet().eval(), images()
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_every_parameter_takes_part() -> None:
    network = CifarResNet(8, 10)
    network(images()).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_a_block_of_one_shape_adds_its_input_and_another_one_projects_it() -> None:
    same, other = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)
    assert isinstance(same.shortcut, nn.Identity)
    assert not isinstance(other.shortcut, nn.Identity)
    x = torch.randn(2, 8, 6, 6)
    nn.init.zeros_(same.norm2.weight)
    assert torch.equal(same(x), torch.relu(x))
    assert other(x).shape == (2, 16, 3, 3)


def test_channels_last_changes_the_layout_and_not_the_answer() -> None:
    network, x = CifarResNet().eval(), images()
    before = network(x)
    after = channels_last(network)
    assert after.conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(after(x), before, atol=1e-5, rtol=1e-4)
