"""jaxblock: Blockwise SFT for masked diffusion language models (LLaDA and relatives) in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "__version__", "load"]

if TYPE_CHECKING:
    from jaxblock.errors import UserError
    from jaxblock.loading import load
    from jaxblock.model import Model


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use, so that ``jaxblock --help`` does not wait for JAX."""
    if name == "load":
        from jaxblock.loading import load

        return load
    if name == "Model":
        from jaxblock.model import Model

        return Model
    if name == "UserError":
        from jaxblock.errors import UserError

        return UserError
    raise AttributeError(f"module 'jaxblock' has no attribute {name!r}")
