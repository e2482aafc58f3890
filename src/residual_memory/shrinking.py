"""A smaller memory of a larger one: fewer rows, and shorter ones.

What is written is a new memory; the old one stays. Every row of it is still one example, which can be explained and
forgotten.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from residual_memory.errors import InvalidInput
from residual_memory.exchange.fields import Exported
from residual_memory.exchange.making import made
from residual_memory.exchange.rows import Block
from residual_memory.indexes.distances import squared_error
from residual_memory.memory import Memory, Snapshot, require_empty
from residual_memory.memory.attributes import NEVER, TEXTS
from residual_memory.memory.format import Manifest
from residual_memory.memory.memory import described
from residual_memory.progress import progress_bar
from residual_memory.residuals import top_m as largest_of
from residual_memory.types import TopM
from residual_memory.validation import as_count, as_fraction, as_non_negative

FLOOR = 0.2  # of the mean residual: rows without a residual have a chance too, since they vote for no correction
TWIN_SAMPLE = 1000  # rows by which the usual distance of rows of one label is measured
BLOCK_ROWS = 1024
TABLE_NUMBERS = 8 << 20  # distances that are held at a time


@dataclass(frozen=True)
class Shrunk:
    """A smaller memory, and which rows of the larger one it was made without.

    Attributes
    ----------
    memory : the new one, open for writing. Its setting is to be tuned again wherever `memory.setting` is None.
    n_rows : of the larger one.
    twins : rows that stayed out because another one stands for them.
    twin_distance : up to which it does; None where nobody asked for it.
    small : rows whose residual is too small.
    not_drawn : rows that the draw left out.
    """

    memory: Memory
    n_rows: int
    twins: int
    twin_distance: float | None
    small: int
    not_drawn: int


def shrink(
    memory: Memory,
    path: str | os.PathLike[str] | None = None,
    *,
    keep_rows: float = 1.0,
    smallest_residual: float = 0.0,
    twins_within: float | None = None,
    within_groups: bool = False,
    top_m: int | None = None,
    prediction_dtype: str | None = None,
    key_dtype: str | None = None,
    seed: int = 0,
) -> Shrunk:
    """Make a smaller memory of the rows of a larger one, which is not changed.

    A residual is as large as what the base missed: 1 minus its probability of the label, or the distance of its value
    from the target. Twins go first, then rows of a small residual, then the draw takes of what is left.

    A saved setting moves along where all rows stay and it can still be used. Otherwise tune again: with fewer rows,
    other neighbours are near.

    Parameters
    ----------
    memory : stays as it is, and may be open read-only.
    path : a new or empty directory; None keeps the new memory in RAM.
    keep_rows : the share of the rows that may stay. They are drawn, a large residual with a larger chance, so that rows
        which the base knows still stand where the base is right. With one seed a smaller share is part of a larger one.
    smallest_residual : rows with a smaller one stay out, all of them; neighbours that stay then correct the base where
        it was right, and without a new setting the memory may do harm.
    twins_within : of rows whose keys lie close together, and whose label, owner, tags and expiry are the same, the
        first stays. How close, as a multiple of the median distance from a row to the nearest one like it; 0 means
        equal keys. Each row is compared with those of its label.
    within_groups : twins are of one group too, so that forgetting a group takes nothing from the others.
    top_m : classes whose probabilities stay in a row. Whole predictions can be cut to their largest ones too; such rows
        are right for temperature 1 alone.
    prediction_dtype, key_dtype : as in `Memory.create`. None keeps the type; whole predictions that are cut to `top_m`
        become "log8".
    seed : of the draw.

    Raises
    ------
    InvalidInput : if nothing is asked for, an option does not fit, no row would stay, or `path` holds something.
    StorageFailure : if the disk refuses; nothing is left.

    References
    ----------
    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", Information Processing Letters 97, 2006.

    Examples
    --------
    >>> memory = Memory.create(dim=1, n_outputs=2)
    >>> ids = memory.append([[0.0], [0.0], [1.0], [2.0]], [1, 1, 0, 1], [[0.9, 0.1]] * 4)
    >>> shrink(memory, twins_within=0.0, smallest_residual=0.5).memory.ids
    array([0, 3])
    """
    options = (keep_rows, smallest_residual, twins_within, top_m, prediction_dtype, key_dtype)
    if options == (1.0, 0.0, None, None, None, None):
        raise InvalidInput("nothing would become smaller; say which rows may go, or how short they may be")
    exported = Exported(memory)
    snapshot = exported.snapshot
    share = as_fraction("keep_rows", keep_rows, above_zero=True)
    least = _as_size(snapshot, smallest_residual)
    manifest = _shortened(snapshot.manifest, top_m, prediction_dtype, key_dtype)
    if path is not None:
        require_empty(path)
    rows = np.flatnonzero(snapshot.alive)
    kept, distance = np.ones(len(rows), bool), None
    if twins_within is not None:
        kept, distance = without_twins(snapshot, rows, as_non_negative("twins_within", twins_within), within_groups)
    n_twins = int((~kept).sum())
    sizes = snapshot.residual_sizes(rows) if least > 0 or share < 1 else np.zeros(len(rows))
    kept &= sizes >= least
    n_small = len(rows) - n_twins - int(kept.sum())
    if len(rows) and not kept.any():
        raise InvalidInput(
            f"the largest residual is {sizes.max():.3g}, so no row of at least {least:g} would stay; ask for less"
        )
    wanted = int(np.ceil(share * len(rows)))
    candidates = np.flatnonzero(kept)
    kept[:] = False
    kept[candidates[drawn(sizes, wanted, seed, candidates)]] = True
    n_kept = int(kept.sum())
    if n_kept < len(rows):
        manifest = replace(manifest, setting=None)
    blocks = _blocks(exported, kept, top_m)
    small = made(path, manifest, blocks, as_stored=True, n_rows=n_kept, doing="shrinking")
    return Shrunk(small, len(rows), n_twins, distance, n_small, len(candidates) - n_kept)


def drawn(sizes: Float[ndarray, " n"], wanted: int, seed: int, among: Int64[ndarray, " m"]) -> Int64[ndarray, " w"]:
    """Places in `among` of the rows that a draw without replacement takes, large residuals with larger chances.

    Each row waits for an exponential time at a rate of its weight, and the first ones are taken; the times of all rows
    are drawn, so that they do not depend on which rows are left.
    """
    if wanted >= len(among):
        return np.arange(len(among))
    mean = sizes.mean()
    rates = sizes + FLOOR * mean if mean > 0 else np.ones(len(sizes))
    times = np.random.default_rng(seed).exponential(size=len(sizes)) / rates
    return np.argsort(times[among], kind="stable")[:wanted]


def without_twins(
    snapshot: Snapshot, rows: Int64[ndarray, " n"], within: float, within_groups: bool
) -> tuple[Bool[ndarray, " n"], float]:
    """Which of the rows stay when the first of near rows that are alike stands for the others, and what near is."""
    stays = np.ones(len(rows), bool)
    kinds = _kinds(snapshot, rows, within_groups)
    order = np.argsort(kinds, kind="stable")
    alike = [places for places in np.split(order, np.flatnonzero(np.diff(kinds[order])) + 1) if len(places) > 1]
    distance = within * _usual_distance(snapshot, rows, kinds, alike) if within else 0.0
    with progress_bar("looking for twins", sum(map(len, alike))) as advance:
        for places in alike:
            stays[places] = _leaders(snapshot.keys.take(rows[places]), distance)
            advance(len(places))
    return stays, distance


def _usual_distance(
    snapshot: Snapshot, rows: Int64[ndarray, " n"], kinds: Int64[ndarray, " n"], alike: list[Int64[ndarray, " _"]]
) -> float:
    """Median distance from a row to the nearest one that is alike, over a sample of those that have one."""
    mates = {int(kinds[places[0]]): places for places in alike}
    having = np.sort(np.concatenate(alike)) if alike else np.zeros(0, np.int64)
    nearest = []
    for place in having[np.unique(np.linspace(0, len(having) - 1, min(TWIN_SAMPLE, len(having))).astype(int))]:
        others = mates[int(kinds[place])]
        differences = snapshot.keys.take(rows[others[others != place]]).astype(np.float64)
        differences -= snapshot.keys.take(rows[[place]])
        nearest.append(np.sqrt(np.einsum("md,md->m", differences, differences).min()))
    return float(np.median(nearest)) if nearest else 0.0


def _kinds(snapshot: Snapshot, rows: Int64[ndarray, " n"], within_groups: bool) -> Int64[ndarray, " n"]:
    """A number for each row, the same for rows that are alike but for their keys and predictions."""
    columns: list[Any] = [snapshot.targets(rows)]
    if within_groups and snapshot.group_column is not None:
        columns.append(snapshot.group_column.take(rows))
    if len(expires := snapshot.expires) and expires.min() < NEVER:
        columns.append(expires[rows])
    for name in TEXTS:
        if name != "snippets" and len((texts := snapshot.texts(name)).flat):
            columns.append(np.array(texts.take(rows).decoded()))
    kinds = np.zeros(len(rows), np.int64)
    for column in columns:
        values = np.unique(column, axis=0, return_inverse=True)[1].reshape(-1)
        kinds = np.unique(kinds * (int(values.max(initial=0)) + 1) + values, return_inverse=True)[1].reshape(-1)
    return kinds


def _leaders(keys: Float[ndarray, "n d"], distance: float) -> Bool[ndarray, " n"]:
    """Which keys have no earlier one within the distance that stays itself."""
    stays = np.zeros(len(keys), bool)
    words = np.ascontiguousarray(keys + 0).view(f"V{keys.dtype.itemsize * keys.shape[1]}")  # + 0: no negative zeros
    first = np.sort(np.unique(words[:, 0], return_index=True)[1])
    if distance == 0:
        stays[first] = True
        return stays
    singles = keys[first].astype(np.float32)
    singles -= singles.mean(axis=0)
    squares = np.einsum("nd,nd->n", singles, singles)
    doubt = squared_error(keys.shape[1], 4 * float(squares.max()))

    def near(some: Int64[ndarray, " b"], others: Int64[ndarray, " l"]) -> Bool[ndarray, "b l"]:
        """By inner products where these are exact enough to tell, by the differences where not."""
        squared = squares[some, None] + squares[others] - 2 * (singles[some] @ singles[others].T)
        within = squared <= distance**2
        pairs = np.argwhere(np.abs(squared - distance**2) <= doubt)
        for here in np.array_split(pairs, 1 + len(pairs) * keys.shape[1] // TABLE_NUMBERS):
            left, right = some[here[:, 0]], others[here[:, 1]]
            differences = keys[first[left]].astype(np.float64) - keys[first[right]]
            within[here[:, 0], here[:, 1]] = np.einsum("md,md->m", differences, differences) <= distance**2
        return within

    leads = np.zeros(len(first), bool)
    step = max(1, min(BLOCK_ROWS, TABLE_NUMBERS // len(first)))
    for start in range(0, len(first), step):
        block = np.arange(start, min(start + step, len(first)))
        free = block[~near(block, np.flatnonzero(leads)).any(axis=1)]
        leads[free] = True
        earlier = np.tril(near(free, free), -1)
        for place in np.flatnonzero(earlier.any(axis=1)):
            leads[free[place]] = not leads[free[earlier[place]]].any()
    stays[first[leads]] = True
    return stays


def _as_size(snapshot: Snapshot, value: float) -> float:
    if snapshot.layout.task == "regression":
        return as_non_negative("smallest_residual", value)
    return as_fraction("smallest_residual", value)


def _shortened(manifest: Manifest, top_m: int | None, prediction_dtype: str | None, key_dtype: str | None) -> Manifest:
    """What is true of the new memory before it has rows.

    Raises
    ------
    InvalidInput : if its rows cannot be cut so.
    """
    layout, m = manifest.layout, manifest.top_m
    if top_m is not None:
        if layout.task == "regression":
            raise InvalidInput("the memory is of a regression, which has no classes to list; leave top_m out")
        m = as_count("top_m", top_m)
        most = manifest.top_m or layout.n_outputs
        if m > most:
            raise InvalidInput(f"top_m is {m}, expected at most {most}, the classes that a row of the memory has")
    cut = top_m is not None and layout.residuals == "dense"
    options = {
        **vars(layout),
        "residuals": "top-m" if cut else layout.residuals,
        "prediction_dtype": prediction_dtype or ("log8" if cut else layout.prediction_dtype),
        "key_dtype": key_dtype or layout.key_dtype,
    }
    setting = manifest.setting
    return replace(
        described(**options, class_names=manifest.class_names, source=manifest.source),
        setting=None if cut and setting is not None and setting.get("temperature", 1) != 1 else setting,
        id_kind=manifest.id_kind,
        group_kind=manifest.group_kind,
        next_id=manifest.next_id,
        top_m=m,
    )


def _blocks(exported: Exported, kept: Bool[ndarray, " n"], top_m: int | None) -> Iterator[Block]:
    """The rows that stay, cut to their largest classes."""
    for block in exported.blocks():
        some = block.taken(kept[block.first : block.first + len(block)])
        if len(some):
            yield some if top_m is None else replace(some, predictions=_cut(some.predictions, top_m))


def _cut(predictions: "TopM | Float[ndarray, 'b c']", m: int) -> TopM:
    if not isinstance(predictions, TopM):
        whole = predictions.astype(np.float64)
        return largest_of(whole / whole.sum(axis=1, keepdims=True), m)  # half precision loses a little of the sum
    places = np.argsort(-predictions.probabilities, axis=1, kind="stable")[:, :m]
    indices, listed = (np.take_along_axis(part, places, 1) for part in (predictions.indices, predictions.probabilities))
    total = predictions.probabilities.sum(axis=1) + predictions.rest
    return TopM(indices, listed, np.maximum(total - listed.sum(axis=1), 0))
