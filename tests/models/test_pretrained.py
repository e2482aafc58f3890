"""A model and its memory in a folder: read, it says the same; damage is found; nothing is run; a card says what."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import residual_memory as rm
from residual_memory.errors import (
    CorruptFile,
    DataNotFound,
    FingerprintMismatch,
    InvalidInput,
    MemoryLocked,
    ReadOnlyMemory,
    ResidualMemoryError,
    UnsupportedFormat,
)
from residual_memory.evaluation import Setting
from residual_memory.gate import Gate
from residual_memory.memory import Memory
from residual_memory.memory.format import canonical, checked_body
from residual_memory.models.pretrained import OPTIONS
from residual_memory.models.torch import ResMemModule, build_memory
from tests.models.nets import (
    CLASSIFIERS,
    REGRESSORS,
    Case,
    Mlp,
    mlp_data,
    trained_a_little,
)

CASES: dict[str, Case] = {**CLASSIFIERS, **REGRESSORS}
SETTING = Setting(n_neighbors=5, bandwidth=0.7, temperature=1.4, shrinkage=0.6)
GATE = Gate(0.9, (0.5, 0.2, -0.1, 0.3), (-1.0, 0.1, 0.2, -0.2), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0))
SETTINGS: dict[str, Setting] = {
    "plain": SETTING,
    "a bandwidth that was measured": Setting(n_neighbors=4),
    "a gate": Setting(n_neighbors=5, gate=GATE),
    "kriging": Setting(n_neighbors=5, kernel="kriging", nugget=0.2),
    "local, cut, half residual": Setting(n_neighbors=5, local=True, max_distance=2.0, residual_share=0.5),
}


def module_of(name: str = "mlp", path: Path | None = None, **options: Any) -> ResMemModule:
    """A network with running statistics, the memory of its data, and a setting."""
    make, data = CASES[name]
    examples = data()
    model = trained_a_little(make(), examples.inputs)
    memory = build_memory(model, examples, path, verbose=False, n_outputs=options.pop("n_outputs", None))
    setting = SETTING if memory.layout.task == "classification" else replace(SETTING, temperature=1.0)
    return ResMemModule(model, memory, **{"setting": setting, **options})


def inputs_of(name: str = "mlp") -> Tensor:
    """Examples that no memory has seen."""
    return CASES[name][1]().inputs.flip(0) * 1.1 + 0.1


def loaded(folder: Path, name: str = "mlp", **options: Any) -> ResMemModule:
    return ResMemModule.from_pretrained(folder, CASES[name][0](), **options)


def same_answers(first: ResMemModule, second: ResMemModule, x: Tensor) -> bool:
    one, other = first(x), second(x)
    np.testing.assert_array_equal(first.explain(x).ids, second.explain(x).ids)
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved module."""
    module_of().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------- the same predictions


@pytest.mark.parametrize("name", CASES)
def test_a_module_that_was_saved_says_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    module, x = module_of(name), inputs_of(name)
    module.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", name)
    assert same_answers(module, again, x)
    base = ResMemModule(module.model, module.memory, setting=replace(module.setting, shrinkage=0.0))
    assert not torch.equal(module(x), base(x))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_survives(name: str, tmp_path: Path) -> None:
    setting, x = SETTINGS[name], inputs_of()
    module = module_of(setting=setting, max_weight=0.3, index="faiss:HNSW8")
    module.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert same_answers(module, again, x)
    assert again.knn.max_weight == 0.3
    assert "HNSW" in again.knn.description
    kept = again.setting.to_dict()
    expected = {**setting.to_dict(), "bandwidth": module.knn.bandwidth}
    assert kept == expected
    assert "exact" in loaded(tmp_path / "saved", index="exact").knn.description.lower()


def test_outputs_and_precision_survive(tmp_path: Path) -> None:
    data, x = mlp_data(), inputs_of()
    model = nn.Sequential(Mlp(), nn.Softmax(1))
    options: dict[str, Any] = {"outputs": "probabilities", "autocast": torch.bfloat16}
    memory = build_memory(model, data, None, layer="0.body", side="output", verbose=False, **options)
    module = ResMemModule(model, memory, setting=SETTING, **options)
    module.save_pretrained(tmp_path / "saved")
    again = ResMemModule.from_pretrained(tmp_path / "saved", nn.Sequential(Mlp(), nn.Softmax(1)))
    assert same_answers(module, again, x)
    assert not torch.equal(module(x), ResMemModule(model, memory, setting=SETTING, outputs="probabilities")(x))


def test_a_memory_that_was_filled_by_hand_survives_with_its_layer(tmp_path: Path) -> None:
    built = module_of()
    snapshot, rows = built.memory.snapshot, np.arange(20)
    bare = Memory.create(dim=6, n_outputs=3)
    bare.append(snapshot.keys.take(rows), snapshot.targets(rows), snapshot.predictions(rows))
    module = ResMemModule(built.model, bare, setting=SETTING, layer="body.3", side="output")
    module.save_pretrained(tmp_path / "saved")
    assert same_answers(module, loaded(tmp_path / "saved"), inputs_of())
    unnamed = ResMemModule(built.model, bare, setting=SETTING)  # the layer is found at the first use
    unnamed.save_pretrained(tmp_path / "unnamed")
    assert same_answers(unnamed, loaded(tmp_path / "unnamed"), inputs_of())


def test_a_folder_may_be_copied_renamed_and_saved_again(folder: Path, tmp_path: Path) -> None:
    first = loaded(folder)
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    shutil.rmtree(folder)
    second = loaded(tmp_path / "elsewhere" / "copy")
    second.save_pretrained(tmp_path / "again")
    assert same_answers(second, loaded(tmp_path / "again"), inputs_of())
    assert same_answers(first, second, inputs_of())


def test_weights_that_are_shared_stay_shared(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)))

    model = Tied()
    module = ResMemModule(model, build_memory(model, mlp_data(), None, verbose=False), setting=SETTING)
    module.save_pretrained(tmp_path / "saved")
    again = Tied()
    assert same_answers(module, ResMemModule.from_pretrained(tmp_path / "saved", again), inputs_of())
    assert again.second.weight is again.first.weight


# ---------------------------------------------------------------------- what is in the folder


def test_a_folder_holds_plain_files_and_no_pickle(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    segment = next(name for name in names if name.startswith("memory/rows-"))
    assert names == [
        "README.md",
        "memory/manifest.copy",
        "memory/manifest.json",
        segment,
        "model.safetensors",
        "resmem.json",
    ]
    assert not any(b"\x80\x04\x95" in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_what_was_forgotten_is_in_no_file_of_the_folder(tmp_path: Path) -> None:
    """The scan finds the bytes where they are: in the memory that the folder was made of."""
    module = module_of(path=tmp_path / "memory")
    memory = module.memory
    canary = "canary-5b1d9e77"
    key = np.linspace(0.123, 0.321, 6, dtype=np.float32)
    memory.append(key[None], [1], [[0.2, 0.3, 0.5]], owners=canary, snippets=[canary], tags=[canary])
    memory.forget(where={"owner": canary})
    assert memory.n_forgotten == 1

    def finds(path: Path) -> set[str]:
        content = b"".join(file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file())
        return {name for name, trace in (("text", canary.encode()), ("key", key.tobytes())) if trace in content}

    assert finds(tmp_path / "memory") == {"text", "key"}
    module.save_pretrained(tmp_path / "saved")
    assert finds(tmp_path / "saved") == set()
    again = loaded(tmp_path / "saved")
    assert again.memory.n_forgotten == 0
    assert same_answers(module, again, inputs_of())


def test_an_empty_memory_can_be_saved(tmp_path: Path) -> None:
    module = module_of(index="exact")
    module.memory.forget(module.memory.ids)
    module.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved")
    assert len(again.memory) == 0
    assert torch.equal(module(inputs_of()), again(inputs_of()))


# ---------------------------------------------------------------------- writing


def test_what_is_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    module = module_of()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("mine")
    for taken in (folder, tmp_path / "file", tmp_path):
        with pytest.raises(InvalidInput, match="already exists and is not empty; name another folder"):
            module.save_pretrained(taken)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    module.save_pretrained(tmp_path / "empty")
    module.save_pretrained(tmp_path / "new" / "below")
    assert same_answers(loaded(tmp_path / "empty"), loaded(tmp_path / "new" / "below"), inputs_of())
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]


def test_what_cannot_be_kept_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    class Stateful(Mlp):
        def get_extra_state(self) -> dict[str, str]:
            return {"any": "thing"}

    model: Mlp = Stateful()
    module = ResMemModule(model, build_memory(model, mlp_data(), None, verbose=False), setting=SETTING)
    with pytest.raises(InvalidInput, match="'_extra_state' is no plain tensor"):
        module.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []

    model = Mlp()
    memory = build_memory(model, mlp_data(), None, layer=_keys, verbose=False)
    with pytest.raises(InvalidInput, match=r"the function 'tests\.models\.test_pretrained:_keys'"):
        ResMemModule(model, memory, layer=_keys, setting=SETTING).save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def _keys(x: Tensor) -> Tensor:
    return x


def test_a_disk_that_refuses_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(rm.errors.StorageFailure):
        module_of().save_pretrained(tmp_path / "file" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------- reading


def files_of(folder: Path) -> list[Path]:
    """All files whose bytes count: the card may be edited, and the copy of a manifest is for `salvage`."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("README.md", "manifest.copy", ".gitattributes")
    ]


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (
    lambda content: flipped(content, len(content) // 2),
    lambda content: flipped(content, -1),
    lambda content: content[:-7],
    lambda content: b"",
    lambda content: content + b"\0",
)


def each_damage(folder: Path, read: Callable[[], Any]) -> None:
    """Assert that each file, damaged in each way or missing, gives a typed error that names it."""
    for path in files_of(folder):
        whole = path.read_bytes()
        for damage in DAMAGES:
            path.write_bytes(damage(whole))
            with pytest.raises(CorruptFile, match=re.escape(path.name)):
                read()
        path.unlink()
        with pytest.raises((CorruptFile, FileNotFoundError), match=re.escape(path.name)) as error:
            read()
        assert isinstance(error.value, ResidualMemoryError)
        path.write_bytes(whole)
    read()


def test_a_file_that_is_damaged_cut_or_missing_is_named_and_the_model_is_as_it_was(folder: Path) -> None:
    model = Mlp()
    before = state_of(model)
    (folder / "README.md").write_text("edited by hand")
    (folder / ".gitattributes").write_text("of the hub")

    def read() -> ResMemModule:
        if unchanged(model, before):
            return ResMemModule.from_pretrained(folder, model)
        raise AssertionError("a folder that cannot be read changed the model")

    each_damage(folder, read)
    assert not unchanged(model, before)


def test_without_verify_cut_weights_are_still_found(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(CorruptFile, match=r"model\.safetensors has"):
        loaded(folder, verify=False)
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(CorruptFile, match=r"model\.safetensors cannot be read"):
        loaded(folder, verify=False)


def test_another_architecture_is_told_by_the_first_weight_that_differs(folder: Path) -> None:
    wide = Mlp(n_in=5)
    half = Mlp().half()
    longer = Mlp()
    longer.tail = nn.Linear(2, 2)
    for model, said in (
        (wide, r"'body.0.weight' float32 of shape \(6, 4\), but the model has float32 of shape \(6, 5\)"),
        (half, r"'body.0.weight' float32 of shape \(6, 4\), but the model has float16 of shape \(6, 4\)"),
        (longer, r"'tail.weight' none, but the model has float32 of shape \(2, 2\)"),
    ):
        before = state_of(model)
        with pytest.raises(InvalidInput, match=said):
            ResMemModule.from_pretrained(folder, model)
        assert unchanged(model, before)


def test_another_class_is_refused_and_stays_as_it_was(folder: Path) -> None:
    class Other(Mlp):
        pass

    model = Other()
    before = state_of(model)
    with pytest.raises(FingerprintMismatch, match=r"class 'tests.models.nets.Mlp'"):
        ResMemModule.from_pretrained(folder, model)
    assert unchanged(model, before)


def test_what_is_no_such_folder_is_told(folder: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", folder / "memory"):
        with pytest.raises(DataNotFound, match=r"holds no resmem\.json; .* hf download"):
            loaded(place)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).symlink_to(path)
    with pytest.raises(InvalidInput, match=r"is a link, as in the cache of the Hugging Face hub.*--local-dir"):
        loaded(linked)


def changed_options(folder: Path, **changes: Any) -> None:
    """Rewrite `resmem.json` under a checksum that fits."""
    file = folder / OPTIONS
    file.write_bytes(canonical({**checked_body(file.read_bytes(), "it"), **changes}))


def test_another_format_or_class_is_told(folder: Path) -> None:
    changed_options(folder, kind="ResMemForCausalLM")
    with pytest.raises(InvalidInput, match=r"read it with ResMemForCausalLM\.from_pretrained"):
        loaded(folder)
    changed_options(folder, format=99, library="9.9")
    with pytest.raises(UnsupportedFormat, match=r"format 99, written by residual-memory 9\.9.*upgrade"):
        loaded(folder)
    changed_options(folder, format=1, files=[1, 2])
    with pytest.raises(CorruptFile, match=r"resmem\.json cannot be used"):
        loaded(folder)
    (folder / OPTIONS).write_text(json.dumps({"format": 1}))
    with pytest.raises(CorruptFile, match=r"resmem\.json is damaged"):
        loaded(folder)


def test_a_memory_is_opened_for_reading_unless_it_is_to_be_changed(folder: Path) -> None:
    first, x = loaded(folder), inputs_of()
    with pytest.raises(ReadOnlyMemory):
        first.memory.forget(first.memory.ids[:1])
    second = loaded(folder, writable=True)
    with pytest.raises(MemoryLocked):
        loaded(folder, writable=True)
    gone = int(second.explain(x[:1]).ids[0, 0])
    second.memory.forget([gone])
    second.memory.close()
    assert gone in first.explain(x[:1]).ids
    first.memory.refresh()
    assert gone not in first.explain(x[:1]).ids
    with pytest.raises(InvalidInput, match="index"):
        loaded(folder, writable=True, index="no such engine")
    loaded(folder, writable=True).memory.close()  # the one that failed gave its lock back


# ---------------------------------------------------------------------- the card


def card_of(module: ResMemModule, folder: Path, **said: Any) -> str:
    module.save_pretrained(folder, card=rm.Card(**said))
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_card_says_what_model_memory_and_setting_are(tmp_path: Path) -> None:
    text = card_of(module_of(n_outputs=1_000), tmp_path / "saved", base="an MLP", data="20 points", license="MIT")
    for line in (
        "license: mit",
        "| base | an MLP |",
        "| class of the base | tests.models.nets.Mlp |",
        "| data of the memory | 20 points |",
        "| keys | 6 numbers, float32, euclidean |",
        "| layer of the keys | input of head |",
        "| predictions | 1,000 outputs, dense, float32 |",
        "| rows | 20 |",
        "| size of the memory | 0.1 MB |",
        "| neighbours (k) | 5 |",
        "None were given, so nothing is said of what the memory gains.",
        "How well that can be told was not measured; `audit_privacy` does it.",
    ):
        assert f"\n{line}\n" in text
    assert "has the keys, labels, predictions, ids of every row" in text


def test_a_card_shows_all_three_predictions_with_intervals_the_verdict_and_the_audit(tmp_path: Path) -> None:
    module = module_of()
    held = rm.observe(module.model, mlp_data(60, seed=1), module.memory, verbose=False)
    rows: tuple[Any, Any, Any] = held.keys, held.labels, held.predictions
    tuned = rm.tune(module.memory, *rows, n_neighbors=(5,))
    nats = rm.evaluate(module.memory, *rows, SETTING, metric="log_loss")
    audit = rm.audit_privacy(module.memory, *rows, SETTING, max_weights=(1.0, 0.1))
    text = card_of(module, tmp_path / "saved", evaluations={"a|b": tuned, "other": nats}, privacy=audit)
    table = [line for line in text.splitlines() if line.startswith(("| a", "| other"))]
    for line, found, metric, scale in zip(
        table, (tuned, nats), ("accuracy, %", "log-loss, nats"), (100, 1), strict=True
    ):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert cells[1] == metric
        assert cells[-1] == "60"
        for cell, estimate in zip(
            cells[2:6], (found.base, found.memory_only, found.corrected, found.gain), strict=True
        ):
            value, margin = (float(part) for part in cell.split(" ± "))
            assert value == pytest.approx(scale * estimate.value, rel=1e-3)
            assert margin == pytest.approx(scale * estimate.margin, rel=0.06)
    assert f"- On other: {nats.verdict}" in text
    assert f"Measured: {audit.verdict}; with AUC {audit.auc_nearest.value:.3f}" in text
    assert "not measured" not in text


def test_a_card_says_what_its_rows_carry(tmp_path: Path) -> None:
    module = module_of()
    module.memory.append(np.zeros((1, 6)), [0], np.full((1, 3), 1 / 3), owners="alice", snippets=["a rose"])
    text = card_of(module, tmp_path / "saved")
    assert "has the keys, labels, predictions, ids, owners, snippets of every row" in text
    assert "alice" not in text


HOSTILE = "<script>alert(1)</script> | ![x](https://evil) \n---\n# [a](b) `c` *d* _e_ &lt; \x1b[31m \u202eabc\n\n```\nx"


def test_text_of_others_is_shown_as_it_is(tmp_path: Path) -> None:
    """Rendered by a parser of Markdown that lets HTML through, as that of a hub may."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown_it missing: pip install myst-parser")
    module = module_of()
    held = rm.observe(module.model, mlp_data(30, seed=1), module.memory, verbose=False)
    rows: tuple[Any, Any, Any] = held.keys, held.labels, held.predictions
    found = rm.evaluate(module.memory, *rows, SETTING)
    told = {"title": HOSTILE, "base": HOSTILE, "data": HOSTILE, "evaluations": {f"1. + {HOSTILE}": found}}
    text = card_of(module, tmp_path / "saved", **told)
    plain = card_of(module, tmp_path / "plain", title="x", base="x", data="x", evaluations={"x": found})
    parser = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table")
    bodies = [parser.render(some.split("---\n", 2)[2]) for some in (text, plain)]
    tags = [re.findall(r"<[^>]*>", body) for body in bodies]
    assert tags[0] == tags[1]
    shown = re.sub(r"<[^>]*>", "", bodies[0])
    assert shown.count("&lt;script&gt;alert(1)&lt;/script&gt; | ![x](https://evil)") == 5
    assert shown.count("`c` *d* _e_ &amp;lt;") == 5
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_the_hub_can_read_a_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub missing: pip install transformers")
    module_of("one output").save_pretrained(tmp_path / "saved", card=rm.Card(title="---\n- x: [", license="Apache-2.0"))
    card = hub.ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "residual-memory"
    assert card.data.tags == ["residual-memory", "regression"]


def test_a_license_that_is_no_identifier_is_refused() -> None:
    for wrong in ("mit\nmodel-index: x", "", "see: [here]"):
        with pytest.raises(InvalidInput, match="expected an identifier of SPDX"):
            rm.Card(license=wrong)
