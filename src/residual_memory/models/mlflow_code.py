"""Run by MLflow when it loads a model that `models.mlflow.log_model` logged; for nothing else."""

from mlflow.models import ModelConfig, set_model

from residual_memory.models.mlflow import CLASSES

set_model(CLASSES[ModelConfig().get("kind")]())
