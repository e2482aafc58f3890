"""Give any trained model a memory of what it could not learn.

Run the model once over its training data, store for each example a key, its label and what the model said, and predict
base + weighted residuals of the nearest memories from then on (ResMem, NeurIPS 2023).

The names below are resolved when they are first used: importing the package imports no framework.
"""

import importlib
from typing import TYPE_CHECKING, Any

from residual_memory import errors
from residual_memory._version import __version__

if TYPE_CHECKING:
    from residual_memory.client import Client, Served
    from residual_memory.correction import ResidualKNN, correct, to_probabilities
    from residual_memory.evaluation import Evaluation, Setting, evaluate
    from residual_memory.exchange.merging import merge_memories
    from residual_memory.exchange.reading import import_memory
    from residual_memory.exchange.writing import export_memory
    from residual_memory.explanation import Explanation, explain
    from residual_memory.gate import Gate
    from residual_memory.indexes.registry import register_index
    from residual_memory.language import LanguageSetting, LanguageTuning, TokenScores
    from residual_memory.memory import Certificate, Inventory, Memory, salvage
    from residual_memory.models.base import KeyChoice
    from residual_memory.models.building import build_memory
    from residual_memory.models.parts import join_parts
    from residual_memory.models.pretrained import Card
    from residual_memory.models.ray import build_memory_on_ray
    from residual_memory.models.sklearn import ResMemClassifier, ResMemRegressor
    from residual_memory.models.torch import (
        ChosenKeys,
        ResMemModule,
        choose_keys,
        exportable,
        key_choices,
        observe,
    )
    from residual_memory.models.transformers import ResMemForCausalLM, tune_language
    from residual_memory.planning import Plan, estimate, nearest_fitting
    from residual_memory.privacy import PrivacyReport, audit_privacy
    from residual_memory.reports.measured import make_report
    from residual_memory.reports.page import Report
    from residual_memory.residuals import temper, top_m
    from residual_memory.shrinking import Shrunk, shrink
    from residual_memory.surveying import Survey, survey
    from residual_memory.tuning import TuningResult, tune, tune_gate
    from residual_memory.types import Neighbors, Observations, TopM
    from residual_memory.windows import Encoded, TextFile, Windows

_ROOMS = {
    "Client": "client",
    "Served": "client",
    "ResidualKNN": "correction",
    "correct": "correction",
    "to_probabilities": "correction",
    "export_memory": "exchange.writing",
    "import_memory": "exchange.reading",
    "merge_memories": "exchange.merging",
    "Explanation": "explanation",
    "explain": "explanation",
    "Gate": "gate",
    "KeyChoice": "models.base",
    "Certificate": "memory",
    "Inventory": "memory",
    "Memory": "memory",
    "salvage": "memory",
    "ChosenKeys": "models.torch",
    "ResMemClassifier": "models.sklearn",
    "ResMemModule": "models.torch",
    "ResMemRegressor": "models.sklearn",
    "ResMemForCausalLM": "models.transformers",
    "Card": "models.pretrained",
    "build_memory": "models.building",
    "build_memory_on_ray": "models.ray",
    "join_parts": "models.parts",
    "tune_language": "models.transformers",
    "LanguageSetting": "language",
    "LanguageTuning": "language",
    "TokenScores": "language",
    "Encoded": "windows",
    "TextFile": "windows",
    "Windows": "windows",
    "choose_keys": "models.torch",
    "key_choices": "models.torch",
    "exportable": "models.torch",
    "observe": "models.torch",
    "Plan": "planning",
    "estimate": "planning",
    "nearest_fitting": "planning",
    "PrivacyReport": "privacy",
    "audit_privacy": "privacy",
    "Report": "reports.page",
    "make_report": "reports.measured",
    "register_index": "indexes.registry",
    "temper": "residuals",
    "top_m": "residuals",
    "Shrunk": "shrinking",
    "shrink": "shrinking",
    "Survey": "surveying",
    "survey": "surveying",
    "Evaluation": "evaluation",
    "Setting": "evaluation",
    "evaluate": "evaluation",
    "TuningResult": "tuning",
    "tune": "tuning",
    "tune_gate": "tuning",
    "Neighbors": "types",
    "Observations": "types",
    "TopM": "types",
}

__all__ = [
    "Card",
    "Certificate",
    "ChosenKeys",
    "Client",
    "Encoded",
    "Evaluation",
    "Explanation",
    "Gate",
    "Inventory",
    "KeyChoice",
    "LanguageSetting",
    "LanguageTuning",
    "Memory",
    "Neighbors",
    "Observations",
    "Plan",
    "PrivacyReport",
    "Report",
    "ResMemClassifier",
    "ResMemForCausalLM",
    "ResMemModule",
    "ResMemRegressor",
    "ResidualKNN",
    "Served",
    "Setting",
    "Shrunk",
    "Survey",
    "TextFile",
    "TokenScores",
    "TopM",
    "TuningResult",
    "Windows",
    "__version__",
    "audit_privacy",
    "build_memory",
    "build_memory_on_ray",
    "choose_keys",
    "correct",
    "errors",
    "estimate",
    "evaluate",
    "explain",
    "export_memory",
    "exportable",
    "import_memory",
    "join_parts",
    "key_choices",
    "make_report",
    "merge_memories",
    "nearest_fitting",
    "observe",
    "register_index",
    "salvage",
    "shrink",
    "survey",
    "temper",
    "to_probabilities",
    "top_m",
    "tune",
    "tune_gate",
    "tune_language",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'residual_memory' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"residual_memory.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
