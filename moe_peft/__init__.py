"""Multi-task mixture-of-experts parameter-efficient fine-tuning on Lightning. Importing the package costs nothing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_peft.adapted_model import AdaptedModel as AdaptedModel
    from moe_peft.adapted_model import load_adapter as load_adapter

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports what is used without Lightning's command line when it is asked for."""
    if name in ("AdaptedModel", "load_adapter"):
        from moe_peft import adapted_model

        return getattr(adapted_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
