"""Allows importing these modules as `longctx_layers.kernels` only.

The import name `kernels` belongs to another project.
"""

from __future__ import annotations


def check_import_name(name: str) -> None:
    """Raise ImportError for a module that was imported from the checkout's folder `kernels/`."""
    if not name.startswith("longctx_layers.kernels."):
        raise ImportError(
            f"expected an import name under longctx_layers.kernels, got {name!r}; install the "
            "library (pip install -e .) and import it from there"
        )
