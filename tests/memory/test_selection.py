"""Rows are chosen by what they carry as a loop over dicts would choose them."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_memory.errors import InvalidInput, UnknownId
from residual_memory.memory import Memory, segments
from residual_memory.memory.attributes import NEVER
from tests.problems import Problem, classification, empty_memory, memory_of, regression

PAST, COMING = 1_000_000_000, 4_000_000_000

Row = dict[str, Any]


def row(owner: str, tags: list[str], group: Any, label: int, expires: int, snippet: str) -> Row:
    return {"owner": owner, "tags": tags, "group": group, "label": label, "expires": expires, "snippet": snippet}


names = st.sampled_from(["", "a", "ab", "b", "ü", "a\0"])
tag_names = st.sampled_from(["a", "ab", "b", "ü"])
moments = st.sampled_from([0, 5, PAST, COMING, COMING + 1, NEVER])
groups = {"string": st.sampled_from(["g", "gg", "ü"]), "integer": st.integers(0, 3), "none": st.none()}


def rows_with(kind: str) -> st.SearchStrategy[list[Row]]:
    tags = st.lists(tag_names, max_size=3, unique=True)
    one = st.builds(row, names, tags, groups[kind], st.integers(0, 3), moments, st.sampled_from(["", "s"]))
    return st.lists(one, min_size=1, max_size=10)


def one_or_more(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(values, max_size=3)
    return st.one_of(values, several, several.map(tuple), several.map(set))


def conditions(kind: str) -> st.SearchStrategy[Row]:
    every: dict[str, st.SearchStrategy[Any]] = {
        "owner": one_or_more(names),
        "tag": one_or_more(st.one_of(tag_names, st.sampled_from(["", "nobody's", "a\n", "\n"]))),
        "label": one_or_more(st.integers(-1, 5)),
        "expired": st.one_of(st.just(True), moments.filter(lambda moment: moment < NEVER)),
    }
    if kind != "none":
        every["group"] = one_or_more(groups[kind])
    return st.dictionaries(st.sampled_from(sorted(every)), st.none(), min_size=1).flatmap(
        lambda chosen: st.fixed_dictionaries({name: every[name] for name in chosen})
    )


def meets(held: Row, where: Row) -> bool:
    """By a plain reading of the page."""
    for name, wanted in where.items():
        if name == "expired":
            met = held["expires"] <= (time.time() if wanted is True else wanted)
        else:
            several = wanted if isinstance(wanted, list | tuple | set) else [wanted]
            met = any(value in held["tags"] if name == "tag" else value == held[name] for value in several)
        if not met:
            return False
    return True


def filled(rows: list[Row], cut: int) -> Memory:
    """The rows in two segments, ids from 10 on."""
    problem = classification(n=len(rows))
    memory = empty_memory(problem)
    for part in (slice(0, cut), slice(cut, None)):
        held, some = rows[part], problem.rows(part)
        if held:
            memory.append(
                some.keys,
                [entry["label"] for entry in held],
                some.predictions,
                ids=10 + np.arange(len(rows))[part],
                groups=None if held[0]["group"] is None else [entry["group"] for entry in held],
                owners=[entry["owner"] for entry in held],
                tags=[entry["tags"] for entry in held],
                expires=[entry["expires"] for entry in held],
                snippets=[entry["snippet"] for entry in held],
            )
    return memory


@pytest.mark.parametrize("kind", groups)
@given(data=st.data())
@settings(max_examples=60)
def test_rows_are_found_and_forgotten_as_a_loop_would(kind: str, data: st.DataObject) -> None:
    rows = data.draw(rows_with(kind))
    where, then = data.draw(conditions(kind)), data.draw(conditions(kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "MERGE_BYTES", 0)
        memory = filled(rows, data.draw(st.integers(0, len(rows))))
    held = dict(enumerate(rows, 10))
    for conditioned in (where, then):
        wanted = [name for name, entry in held.items() if meets(entry, conditioned)]
        assert memory.find(conditioned).tolist() == wanted
        version = memory.version
        assert memory.forget(where=conditioned) == len(wanted)
        assert memory.version == version + bool(wanted)
        held = {name: entry for name, entry in held.items() if name not in wanted}
        assert memory.ids.tolist() == list(held)
        assert_inventory(memory, list(held.values()), len(rows))


def assert_inventory(memory: Memory, held: list[Row], n_rows: int) -> None:
    found, now = memory.inventory(), time.time()
    assert (found.rows, found.forgotten) == (len(held), n_rows - len(held))
    assert found.owners == Counter(entry["owner"] for entry in held)
    assert found.tags == Counter(name for entry in held for name in entry["tags"])
    assert found.labels == Counter(entry["label"] for entry in held)
    assert found.groups == len({entry["group"] for entry in held} - {None})
    assert found.expired == sum(entry["expires"] <= now for entry in held)
    assert found.next_expiry == min((e["expires"] for e in held if now < e["expires"] < NEVER), default=None)
    assert found.snippets == sum(entry["snippet"] != "" for entry in held)
    for counts in (found.owners, found.tags, found.labels):
        assert list(counts.values()) == sorted(counts.values(), reverse=True), "most first"


# ---------------------------------------------------------------------- one condition at a time


@pytest.fixture
def memory(place: Path | None) -> Memory:
    rows = [
        row("alice", ["x"], "g", 0, PAST, ""),
        row("bob", ["x", "xy"], "h", 1, COMING, "s"),
        row("alice", [], "g", 1, NEVER, ""),
        row("", ["xy"], "gh", 2, COMING + 9, ""),
    ]
    problem = classification(n=4)
    memory = empty_memory(problem, place)
    columns = {name: [entry[name] for entry in rows] for name in rows[0]}
    memory.append(
        problem.keys,
        columns["label"],
        problem.predictions,
        groups=columns["group"],
        owners=columns["owner"],
        tags=columns["tags"],
        expires=columns["expires"],
    )
    return memory


@pytest.mark.parametrize(
    ("where", "ids"),
    [
        ({"owner": "alice"}, [0, 2]),
        ({"owner": "ali"}, []),
        ({"owner": ""}, [3]),
        ({"owner": ["bob", "alice"]}, [0, 1, 2]),
        ({"owner": []}, []),
        ({"owner": np.array(["bob", ""])}, [1, 3]),
        ({"tag": "x"}, [0, 1]),
        ({"tag": ["x", "xy"]}, [0, 1, 3]),
        ({"group": "g"}, [0, 2]),
        ({"group": np.str_("gh")}, [3]),
        ({"label": 1}, [1, 2]),
        ({"label": np.int64(1)}, [1, 2]),
        ({"label": np.array([0, 2])}, [0, 3]),
        ({"label": 2**70}, []),
        ({"expired": True}, [0]),
        ({"expired": False}, [1, 2, 3]),
        ({"expired": PAST}, [0]),
        ({"expired": PAST - 1}, []),
        ({"expired": COMING + 0.5}, [0, 1]),
        ({"expired": NEVER}, [0, 1, 3]),
        ({"owner": "alice", "label": 1}, [2]),
        ({"owner": "alice", "tag": "xy"}, []),
    ],
    ids=str,
)
def test_each_condition_chooses_its_rows(memory: Memory, where: Row, ids: list[int]) -> None:
    assert memory.find(where).tolist() == ids
    assert memory.forget(where=where) == len(ids)
    assert memory.ids.tolist() == [name for name in range(4) if name not in ids]
    assert memory.version == (2 if ids else 1), "nothing met is no change"
    assert memory.find(where).tolist() == [], "forgotten rows are not found"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"owners": "alice"}, "did you mean 'owner'"),
        ({"tagg": "x"}, "did you mean 'tag'"),
        ({"Label": 1}, "did you mean 'label'"),
        ({"expires": True}, "did you mean 'expired'"),
        ({"colour": 1}, r"'colour', expected 'owner' or 'tag' or 'group' or 'label' or 'expired'$"),
        ({1: 1}, "has the condition 1"),
        ({}, "expected a dict of conditions"),
        ([("owner", "alice")], "expected a dict of conditions"),
        ("owner", "expected a dict of conditions"),
        ({"owner": 1}, "owner is 1, expected a string"),
        ({"owner": None}, "owner is None, expected a string"),
        ({"owner": ["alice", None]}, "owner is None, expected a string"),
        ({"owner": "\ud800"}, "owner is .*, expected a string"),
        ({"tag": "\ud800"}, "tag is .*, expected a string"),
        ({"tag": b"x"}, "tag is .*, expected a string"),
        ({"group": 1}, "group is 1, expected a string"),
        ({"group": None}, "group is None, expected a string"),
        ({"label": "1"}, "label is '1', expected a whole number"),
        ({"label": True}, "label is True, expected a whole number"),
        ({"label": np.True_}, "label is .*True.*, expected a whole number"),
        ({"label": None}, "label is None, expected a whole number"),
        ({"label": 1.5}, "label is 1.5, expected a whole number"),
        ({"label": [[0, 1]]}, r"label is \[0, 1\], expected a whole number"),
        ({"label": np.array([[0, 1]])}, "label is .*, expected a whole number"),
        ({"label": np.array(1.5)}, "label is .*, expected a whole number"),
        ({"label": {"a": 1}}, "label is .*, expected a whole number"),
        ({"expired": "yes"}, "'yes' is no moment"),
        ({"expired": None}, "None is no moment"),
        ({"expired": float("nan")}, "nan is no moment"),
        ({"expired": [True]}, "is no moment"),
        ({"owner": "alice", "lable": 1}, "did you mean 'label'"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_condition_that_is_none_is_refused_and_nothing_is_forgotten(memory: Memory, where: Any, said: str) -> None:
    for ask in (memory.find, lambda conditions: memory.forget(where=conditions)):
        with pytest.raises(InvalidInput, match=said):
            ask(where)
    assert (len(memory), memory.version) == (4, 1)


def test_a_label_in_an_array_without_axes_is_a_label(memory: Memory) -> None:
    assert memory.find({"label": np.array(1)}).tolist() == [1, 2]


def test_forget_takes_ids_or_conditions_and_not_both(memory: Memory) -> None:
    both: dict[str, Any] = {"ids": [0], "where": {"owner": "bob"}}
    for given_ in ({}, both):
        with pytest.raises(InvalidInput, match="one of both"):
            memory.forget(**given_)
    assert (len(memory), memory.version) == (4, 1)


def test_forget_says_how_many_rows_it_masked(memory: Memory) -> None:
    assert memory.forget([2, 0, 2]) == 2
    assert memory.forget([]) == 0
    assert memory.forget(where={"owner": "alice"}) == 0
    assert memory.forget(where={"expired": COMING}) == 1
    assert memory.version == 3
    with pytest.raises(UnknownId):
        memory.forget([1])
    assert [(change.what, change.rows) for change in memory.history] == [("append", 4), ("forget", 2), ("forget", 1)]


def test_a_regression_has_no_labels_to_choose_by(values: Problem) -> None:
    memory = memory_of(values)
    with pytest.raises(InvalidInput, match=r"regression.*no label"):
        memory.find({"label": 1})
    assert memory.inventory().labels == {}


def test_a_memory_without_groups_says_so() -> None:
    with pytest.raises(InvalidInput, match="no group"):
        memory_of(classification(n=3)).find({"group": 1})


def test_an_empty_memory_holds_nothing_of_anybody(place: Path | None) -> None:
    memory = empty_memory(classification(), place)
    found = memory.inventory()
    assert (found.rows, found.forgotten, found.owners, found.tags, found.labels) == (0, 0, {}, {}, {})
    assert (found.groups, found.expired, found.next_expiry, found.snippets) == (0, 0, None, 0)
    for where in ({"owner": ""}, {"tag": "x"}, {"label": 0}, {"expired": True}):
        assert memory.forget(where=where) == 0
    assert memory.version == 0


def test_rows_of_which_nobody_said_anything_have_the_owner_of_none() -> None:
    memory = memory_of(regression(n=3), groups=[1, 1, 2])
    assert memory.find({"owner": ""}).tolist() == [0, 1, 2]
    assert memory.find({"expired": True}).tolist() == []
    assert memory.inventory().owners == {"": 3}
    assert memory.inventory().groups == 2
