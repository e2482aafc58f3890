"""Run by MLflow when it loads a model that `models.mlflow.log_model` logged; for nothing else."""

import mlflow

from residual_memory.models.mlflow import MemoryModel

mlflow.models.set_model(MemoryModel())
