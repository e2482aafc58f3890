"""What an index of another package is tested with: `IndexContract`, the battery that every index must pass.

It needs pytest, and is imported by tests alone.
"""

import pytest

pytest.register_assert_rewrite("residual_memory.testing.index_contract")

from residual_memory.testing.index_contract import IndexContract  # noqa: E402  after its asserts are made to explain

__all__ = ["IndexContract"]
