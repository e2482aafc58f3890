"""Watching a model: one framework a file, each with the extraction and the prediction of that framework."""
