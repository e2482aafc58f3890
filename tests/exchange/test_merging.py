"""Several memories as one: the same as if it had been filled by each in turn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import residual_memory as rm
from residual_memory.errors import DimensionMismatch, DuplicateId, FingerprintMismatch, InvalidInput
from residual_memory.memory import Memory
from tests.exchange.forms import KINDS, SUFFIXES, assert_same, kept, problem_of, values
from tests.problems import classification, knn_of, memory_of, same_bits, told


def three(kind: str, tmp_path: Path, **options: Any) -> list[Memory]:
    """In RAM and on disk, of different sizes."""
    sizes = ((40, 0), (25, 100), (30, 200))
    places = (None, tmp_path / "second", None)
    return [kept(kind, place, n=n, first=first, **options) for (n, first), place in zip(sizes, places, strict=True)]


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_memory_is_the_one_that_was_filled_one_by_one(tmp_path: Path, kind: str, text: bool) -> None:
    memories = three(kind, tmp_path, text=text, groups=True)
    before = [values(memory) for memory in memories]
    with rm.merge_memories(memories, tmp_path / "merged") as merged:
        assert merged.version == 1, "one commit"
    merged = Memory.open(tmp_path / "merged", verify=True)
    wanted = memory_of(problem_of(kind).rows([]), **KINDS[kind])
    for first, n in ((0, 40), (100, 25), (200, 30)):
        part, one = problem_of(kind, n, first), kept(kind, n=n, first=first, text=text, groups=True)
        ids, groups = one.snapshot.all_ids, one.snapshot.all_groups
        wanted.append(part.keys, part.labels, told(wanted, part), ids, groups)
        wanted.forget(ids[[0, 5, n - 1]])
    assert_same(merged, wanted)
    queries = problem_of(kind).queries
    answers = [knn_of(memory, index="exact:numpy")(queries) for memory in (merged, wanted)]
    assert same_bits(answers[0], answers[1])
    for memory, columns in zip(memories, before, strict=True):
        assert all(same_bits(values(memory)[name], column) for name, column in columns.items())


def test_new_ids_number_all_rows(tmp_path: Path) -> None:
    memories = [kept("dense", text=True, groups=True), kept("dense", groups=False)]
    with pytest.raises(InvalidInput, match="ids of memory 2 in RAM: integer, but of memory 1 in RAM: string"):
        rm.merge_memories(memories)
    with pytest.raises(InvalidInput, match="groups of memory 2 in RAM: none, but of memory 1 in RAM: string"):
        rm.merge_memories(memories, ids="new")
    merged = rm.merge_memories([kept("dense", text=True), kept("dense"), kept("dense")], ids="new")
    assert merged.ids.tolist() == list(range(3 * 57))
    assert merged.next_id == 3 * 57
    parts = [values(kept("dense"))["keys"]] * 3
    assert same_bits(values(merged)["keys"], np.concatenate(parts))


def test_an_id_that_two_memories_have_is_named_with_both(tmp_path: Path) -> None:
    memories = [kept("dense"), kept("dense", tmp_path / "b", first=100), kept("dense", first=130)]
    with pytest.raises(DuplicateId, match=r"memory 2 at \S+b and memory 3 in RAM both hold 27 ids, for example 131"):
        rm.merge_memories(memories, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    with pytest.raises(DuplicateId, match="memory 1 in RAM and memory 2 in RAM both hold 57"):
        rm.merge_memories([memories[0], memories[0]])


def test_an_id_that_was_forgotten_is_no_collision() -> None:
    memories = [kept("dense", n=10), kept("dense", n=10)]
    memories[0].forget([1, 2, 3])
    memories[1].forget([id for id in memories[1].ids.tolist() if id not in (1, 2, 3)])
    assert sorted(rm.merge_memories(memories).ids.tolist()) == sorted({1, 2, 3} | set(memories[0].ids.tolist()))


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        (
            {"key_dtype": "float16"},
            InvalidInput,
            "memory 2 in RAM has key_dtype 'float16', but memory 1 in RAM has 'fl",
        ),
        ({"prediction_dtype": "float32"}, InvalidInput, "has prediction_dtype 'float32'"),
        ({"metric": "cosine"}, InvalidInput, "has metric 'cosine'"),
        ({"n_outputs": 5}, DimensionMismatch, "has n_outputs 5"),
        ({"residuals": "top-m"}, InvalidInput, "has residuals 'top-m'"),
        ({"class_names": ["a", "b", "c", "d"]}, InvalidInput, "has class_names"),
    ],
)
def test_what_differs_is_named(options: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        rm.merge_memories([memory_of(classification()), memory_of(classification(), ids=np.arange(60) + 60, **options)])


def test_other_widths_are_refused() -> None:
    first, second = memory_of(classification(d=3)), memory_of(classification(d=4))
    with pytest.raises(DimensionMismatch, match="has dim 4, but memory 1 in RAM has 3"):
        rm.merge_memories([first, second], ids="new")
    problem = classification()
    tops = [memory_of(problem.rows([]), residuals="top-m") for _ in range(2)]
    for m, memory in zip((1, 2), tops, strict=True):
        memory.append(problem.keys, problem.labels, rm.top_m(problem.predictions, m))
    with pytest.raises(DimensionMismatch, match="has top_m 2, but memory 1 in RAM has 1"):
        rm.merge_memories(tops, ids="new")


def test_sources_must_be_the_same_unless_told_otherwise() -> None:
    memories = [memory_of(classification(), source={"layer": layer}) for layer in ("fc1", "fc2")]
    with pytest.raises(FingerprintMismatch, match="another source than memory 1"):
        rm.merge_memories(memories, ids="new")
    assert rm.merge_memories(memories, ids="new", check_source=False).source == {"layer": "fc1"}


def test_a_setting_is_kept_where_all_have_it() -> None:
    memories = [memory_of(classification()) for _ in range(2)]
    memories[0].save_setting({"n_neighbors": 3})
    assert rm.merge_memories(memories, ids="new").setting is None
    memories[1].save_setting({"n_neighbors": 3})
    assert rm.merge_memories(memories, ids="new").setting == {"n_neighbors": 3}


def test_the_next_id_is_above_all_that_were_ever_given() -> None:
    memories = [memory_of(classification(n=3), ids=[0, 1, 99]), memory_of(classification(n=3), ids=[5, 6, 7])]
    memories[0].forget([99])
    assert rm.merge_memories(memories).next_id == 100


def test_memories_without_rows_fit_all_and_one_memory_is_copied(tmp_path: Path) -> None:
    full, never = kept("log8", text=True, groups=True), memory_of(problem_of("log8").rows([]), **KINDS["log8"])
    assert_same(rm.merge_memories([never, full, never]), full)
    assert_same(rm.merge_memories([full]), full)
    assert len(rm.merge_memories([never, never])) == 0
    with pytest.raises(InvalidInput, match="no memories to merge"):
        rm.merge_memories([])
    with pytest.raises(InvalidInput, match="not empty"):
        full.path or rm.merge_memories([full], made_at(tmp_path))
    assert len(Memory.open(tmp_path / "taken")) == 0


def made_at(tmp_path: Path) -> Path:
    Memory.create(tmp_path / "taken", dim=1, n_outputs=1).close()
    return tmp_path / "taken"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_merged_exported_and_imported_is_the_same(tmp_path: Path, suffix: str) -> None:
    merged = rm.merge_memories(three("cosine, half", tmp_path))
    rm.export_memory(merged, tmp_path / f"rows{suffix}")
    assert_same(rm.import_memory(tmp_path / f"rows{suffix}"), merged)
