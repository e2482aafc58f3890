"""In and out: rows of files that other tools read and write, block by block, and memories made of several."""

from residual_memory.exchange.merging import merge_memories
from residual_memory.exchange.reading import import_memory, open_rows
from residual_memory.exchange.rows import Block, Rows
from residual_memory.exchange.writing import export_memory

__all__ = ["Block", "Rows", "export_memory", "import_memory", "merge_memories", "open_rows"]
