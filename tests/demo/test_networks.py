import pytest
import torch
from torch import Tensor, nn

from residual_memory.demo.networks import (
    CHANNEL_DEVIATIONS,
    CHANNEL_MEANS,
    NETWORKS,
    BasicBlock,
    CifarMobileNetV2,
    CifarResNet,
    InvertedResidual,
    channels_last,
    network_named,
)


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


# ---------------------------------------------------------------------------------------------- wider, and mobile


def test_a_network_of_twice_the_width_has_twice_the_channels() -> None:
    network = CifarResNet(8, 100, width=2).eval()
    assert network(images()).shape == (2, 100)
    assert network.conv.out_channels == 32
    assert network.head.in_features == 128
    assert n_parameters(CifarResNet(8, width=1)) == n_parameters(CifarResNet(8))


def test_a_mobile_network_has_about_the_parameters_of_the_paper() -> None:
    """2.35 million for a hundred classes."""
    assert n_parameters(CifarMobileNetV2()) == 2_351_972
    assert n_parameters(CifarMobileNetV2(10)) == 2_351_972 - 90 * 1281


def test_a_mobile_network_ends_in_maps_of_4_by_4_whose_mean_the_head_sees() -> None:
    network = CifarMobileNetV2(10).eval()
    seen: dict[str, Tensor] = {}
    network.features.register_forward_hook(lambda *parts: seen.update(maps=parts[2]))
    network.head.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    with torch.inference_mode():
        assert network(images()).shape == (2, 10)
    assert seen["maps"].shape == (2, 1280, 4, 4)
    torch.testing.assert_close(seen["pooled"], seen["maps"].mean((2, 3)))


def test_a_mobile_network_has_the_stages_of_the_paper() -> None:
    """Channels, blocks and strides of table 2, the first two strides at 1 for small images."""
    blocks = [module for module in CifarMobileNetV2().features if isinstance(module, InvertedResidual)]
    assert len(blocks) == 17
    assert sum(block.skips for block in blocks) == 10
    strides = [convolution_of(block.depthwise).stride for block in blocks]
    assert [place for place, stride in enumerate(strides) if stride == (2, 2)] == [3, 6, 13]
    outputs = [convolution_of(block.project).out_channels for block in blocks]
    assert sorted(set(outputs)) == [16, 24, 32, 64, 96, 160, 320]
    assert all(
        convolution_of(block.depthwise).groups == convolution_of(block.depthwise).in_channels for block in blocks
    )


def convolution_of(part: nn.Module) -> nn.Conv2d:
    return next(module for module in part.modules() if isinstance(module, nn.Conv2d))


def test_a_mobile_network_normalises_images_itself() -> None:
    network = CifarMobileNetV2().eval()
    seen: list[Tensor] = []
    network.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    means, deviations = (torch.tensor(values).view(1, 3, 1, 1) for values in (CHANNEL_MEANS, CHANNEL_DEVIATIONS))
    with torch.inference_mode():
        network((means - 3 * deviations).expand(1, 3, 32, 32))
    torch.testing.assert_close(seen[0], torch.full((1, 3, 32, 32), -3.0))


@pytest.mark.parametrize(("n_out", "stride", "skips"), [(8, 1, True), (8, 2, False), (6, 1, False)])
def test_an_inverted_block_adds_its_input_where_shapes_allow(n_out: int, stride: int, skips: bool) -> None:
    block, x = InvertedResidual(8, n_out, stride, 3).eval(), torch.randn(2, 8, 6, 6)
    assert block.skips == skips
    assert block(x).shape == (2, n_out, 6 // stride, 6 // stride)
    nn.init.zeros_(list(block.project.parameters())[-2])  # the scale of the norm
    torch.testing.assert_close(block(x), x if skips else torch.zeros(2, n_out, 6 // stride, 6 // stride))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_named_network_gives_a_logit_for_each_of_a_hundred_classes(name: str) -> None:
    network = network_named(name).eval()
    with torch.inference_mode():
        assert network(images(1)).shape == (1, 100)


def test_the_names_say_the_depth_and_the_width() -> None:
    for depth in (8, 14, 20, 32, 44, 56):
        assert n_parameters(network_named(f"resnet{depth}")) == n_parameters(CifarResNet(depth))
    assert n_parameters(network_named("resnet8-wide")) == n_parameters(CifarResNet(8, width=2))
    assert isinstance(network_named("mobilenetv2"), CifarMobileNetV2)


@pytest.mark.parametrize("name", ["resnet18", "resnet20-wide", "ResNet8", "mobilenet", ""])
def test_a_network_of_another_name_is_refused_and_the_names_are_told(name: str) -> None:
    with pytest.raises(ValueError, match=f"network is '{name}', expected one of resnet8, resnet14, .*mobilenetv2"):
        network_named(name)
