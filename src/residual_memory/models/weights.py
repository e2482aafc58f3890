"""What of a torch model goes into a file beside its memory: its weights, and the precision in which it runs."""

import errno
from pathlib import Path

from residual_memory.errors import CorruptFile, InvalidInput, MissingExtra, StorageFailure

try:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file
    from torch import Tensor, nn
except ImportError as error:
    raise MissingExtra("torch models", "torch") from error

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def save_weights(model: nn.Module, file: Path) -> None:
    """Write parameters and buffers as safetensors; tensors that share their values are written each by itself.

    Raises
    ------
    InvalidInput : if the model's state holds something else than plain tensors.
    StorageFailure : if the disk refuses.
    """
    tensors = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
            raise InvalidInput(f"the model's {name!r} is no plain tensor, so it cannot be kept as safetensors")
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    try:
        save_file(tensors, str(file))
    except SafetensorError as error:
        raise StorageFailure(errno.EIO, f"{file}: {error}") from error


def load_weights(model: nn.Module, file: Path) -> None:
    """Give a model the weights of a file; where they do not all fit, none is changed.

    Raises
    ------
    InvalidInput : if the model has other weights, naming the first that differs.
    CorruptFile : if the file cannot be read.
    """
    try:
        kept = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{file} cannot be read: {error}") from error
    own = model.state_dict()
    for name in [*own, *kept]:
        said, found = (_described(some[name]) if name in some else "none" for some in (kept, own))
        if said != found:
            raise InvalidInput(
                f"{file} holds for {name!r} {said}, but the model has {found}; "
                "make the model as it was made when it was saved"
            )
    model.load_state_dict(kept)


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def precision_name(dtype: "torch.dtype | None") -> str | None:
    """How an `autocast` is written down.

    Raises
    ------
    InvalidInput : if it is none that a model is run with.
    """
    names = [name for name, known in PRECISIONS.items() if known == dtype]
    if dtype is not None and not names:
        raise InvalidInput(f"autocast is {dtype}, expected torch.bfloat16 or torch.float16 where a model is saved")
    return names[0] if names else None


def precision_named(name: str | None) -> "torch.dtype | None":
    """The `autocast` of `precision_name`."""
    return None if name is None else PRECISIONS[name]
