"""A memory behind HTTP: corrected predictions, the memories behind them, and changes; `create_app` makes it."""

from residual_memory.server.app import create_app
from residual_memory.server.limits import Limits
from residual_memory.server.running import serve

__all__ = ["Limits", "create_app", "serve"]
