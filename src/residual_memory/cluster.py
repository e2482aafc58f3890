"""Ray: the cluster that the user is connected to or has named, or a local one."""

import logging
from typing import Any

from residual_memory.errors import MissingExtra


def connected(what: str) -> Any:
    """The module `ray`, connected.

    Where the user has called `ray.init` that connection is used. Otherwise Ray looks for a cluster by itself (the
    address in ``RAY_ADDRESS``, then one that runs on this machine) and failing that starts a local one, without its
    dashboard, that ends with the process.

    Parameters
    ----------
    what : what needs it, for the message.

    Raises
    ------
    MissingExtra : if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra(what, "ray") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    return ray
