"""The networks that we trained and keep in the repository, by their recipe."""

from pathlib import Path

from safetensors.torch import load_file

from residual_memory.demo.networks import CifarNetwork, channels_last, network_named

NETWORKS = Path(__file__).parents[1] / "networks"


def weights_file(network: str, sample: str, n_steps: int, seed: int) -> Path:
    """Where the weights of a network lie that saw this sample for so many batches."""
    return NETWORKS / f"{network}-{sample.removesuffix('%')}-{n_steps}-seed{seed}.safetensors"


def trained(network: str, sample: str, n_steps: int, seed: int = 0) -> CifarNetwork:
    """The network with those weights, ready to predict.

    Raises
    ------
    FileNotFoundError : if it was not trained yet; the text holds the command that trains it.
    """
    path = weights_file(network, sample, n_steps, seed)
    if not path.exists():
        options = f"--network {network} --sample {sample} --steps {n_steps} --seed {seed}"
        raise FileNotFoundError(f"{path.name} is missing; train it: python -m experiments.cifar100.train {options}")
    model = network_named(network)
    model.load_state_dict(load_file(path))
    return channels_last(model.eval())
