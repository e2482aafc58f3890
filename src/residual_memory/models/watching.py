"""A torch model under observation: which layer, what passes through it, and a digest that tells models apart.

Hooks and eval mode last as long as a `with` block and come off on errors too.
"""

import difflib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, get_args
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float

from residual_memory.errors import InvalidInput, MissingExtra
from residual_memory.models.base import Side

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    raise MissingExtra("torch models", "torch") from error

FULLY_HASHED = 256 << 20  # bytes of parameters; a larger model is hashed by a sample of each tensor
HASHED_SAMPLE = 1 << 14


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Class and SHA-256 of a model's parameters and buffers: names, types, shapes and values.

    Models of more than 256 MiB are hashed by evenly spaced values of each tensor.
    """
    state = model.state_dict()
    total = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, Tensor))
    digest = hashlib.sha256()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().reshape(-1)
        if total > FULLY_HASHED and flat.numel() > HASHED_SAMPLE:
            flat = flat[torch.linspace(0, flat.numel() - 1, HASHED_SAMPLE, device=flat.device).long()]
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    kind = type(model)
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "sha256": digest.hexdigest()}


def name_of(function: Callable[..., Any]) -> str:
    """Module and name of a function, as a memory's source keeps it."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def places_of(model: nn.Module, layer: str, side: Side) -> list[tuple[str, nn.Module, Side]]:
    """Name, module and side of each part of a layer's name."""
    if side not in get_args(Side):
        raise InvalidInput(f"side is {side!r}, expected 'input' or 'output'")
    places = []
    for part in layer.split("+"):
        name, at, own = part.strip().partition("@")
        if at and own not in get_args(Side):
            raise InvalidInput(f"{part.strip()!r} ends in {own!r}, expected 'input' or 'output' after the @")
        chosen: Side = "input" if (own or side) == "input" else "output"
        places.append((name, module_named(model, name), chosen))
    return places


def module_named(model: nn.Module, name: str) -> nn.Module:
    """A module by its dotted name.

    Raises
    ------
    InvalidInput : if there is none; the message names the closest ones.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in model.named_modules() if known]
        close = difflib.get_close_matches(name, names, 3) or names[-5:]
        raise InvalidInput(f"the model has no layer {name!r}; did you mean {' or '.join(map(repr, close))}?") from None


@contextmanager
def watching(model: nn.Module, layer: str, side: Side) -> Iterator[Callable[[Callable[[Tensor], Tensor]], Tensor]]:
    """Watch every part of a layer's name while the context lasts.

    The function given turns what passed since its last call into keys [b d]: it takes a function that makes a batch of
    vectors [b d] of what one part gave. What a pass that failed left behind is forgotten when the next one begins.
    """
    with ExitStack() as stack:
        thread = threading.get_ident()
        caught: list[tuple[str, list[Tensor]]] = []

        def begin(*_arguments: Any) -> None:
            if threading.get_ident() == thread:
                for _name, passed in caught:
                    passed.clear()

        stack.callback(model.register_forward_pre_hook(begin).remove)
        caught += [
            (name, stack.enter_context(captured(module, own))) for name, module, own in places_of(model, layer, side)
        ]

        def keys(vectors: Callable[[Tensor], Tensor]) -> Float[Tensor, "b d"]:
            parts = [vectors(only(passed, name)) for name, passed in caught]
            for _, passed in caught:
                passed.clear()
            return parts[0] if len(parts) == 1 else torch.cat([functional.normalize(part, dim=1) for part in parts], 1)

        yield keys


@contextmanager
def captured(layer: nn.Module, side: Side) -> Iterator[list[Tensor]]:
    """What passes through the layer on this thread while the context lasts."""
    caught: list[Tensor] = []
    thread = threading.get_ident()

    def note(module: nn.Module, inputs: tuple[Any, ...], options: Any = None, result: Any = None) -> None:
        # Another thread may meet the hook while torch registers or removes it, and then gives it no options.
        del module
        if threading.get_ident() == thread:
            caught.append(first_tensor((*inputs, *options.values()) if side == "input" else result).clone())

    if side == "input":
        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(note, with_kwargs=True)
    try:
        yield caught
    finally:
        handle.remove()


_evaluated: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
_switching = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; the last thread to leave gives every module back its own mode."""
    with _switching:
        inside, training = _evaluated.get(model, (0, []))
        training += [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        _evaluated[model] = inside + 1, training
    try:
        yield
    finally:
        with _switching:
            inside, training = _evaluated.pop(model)
            if inside > 1:
                _evaluated[model] = inside - 1, training
            else:
                for module in training:
                    module.training = True


def pooled(keys: Tensor, pool: int) -> Float[Tensor, "b d"]:
    """Keys [b d] from what a layer gives: feature maps are averaged to pool × pool cells, sequences over time."""
    keys = keys.float()
    if keys.ndim == 3:
        return keys.mean(1)
    if keys.ndim == 4:
        return functional.adaptive_avg_pool2d(keys, pool).flatten(1)
    if keys.ndim == 5:
        return functional.adaptive_avg_pool3d(keys, pool).flatten(1)
    if keys.ndim != 2:
        raise InvalidInput(
            f"the layer gives a tensor of shape {tuple(keys.shape)}, expected a batch of vectors or maps"
        )
    return keys


def only(caught: Sequence[Tensor], name: str) -> Tensor:
    """The one tensor that passed through a layer.

    Raises
    ------
    InvalidInput : if the layer ran any other number of times.
    """
    if len(caught) != 1:
        raise InvalidInput(
            f"the layer {name!r} ran {len(caught)} times in one forward pass, expected once; name another layer"
        )
    return caught[0]


def first_tensor(value: Any) -> Tensor:
    """The first tensor in what a layer takes or gives."""
    if isinstance(value, Tensor):
        return value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise InvalidInput(f"the layer passes a {type(value).__name__} without a tensor in it; name another layer")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def moved_to(inputs: Any, device: torch.device) -> Any:
    """Inputs on a device, whatever they are nested in."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, Mapping):
        return {name: moved_to(value, device) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(moved_to(value, device) for value in inputs)
    return inputs


def digest_of(item: Any) -> str:
    """SHA-256 of an item of a data set: types, shapes and values."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for name in sorted(part):
                add(name)
                add(part[name])
        elif isinstance(part, tuple | list):
            for value in part:
                add(value)
        else:
            array = part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(repr(part).encode() if array.dtype == object else array.tobytes())

    add(item)
    return digest.hexdigest()
