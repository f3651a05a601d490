"""SigLIP and SigLIP 2 training: `load_model` and `Images` are the public names; the rest is run by command."""

from typing import Any

# before anything else is imported: what a file of the working folder has replaced cannot be taken back
from siglip_train.import_path import working_folder_last

working_folder_last()

from siglip_train.batch import Images  # noqa: E402

__all__ = ["Images", "load_model"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import `load_model` on first use, so that `import siglip_train` stays cheap."""
    if name == "load_model":
        from siglip_train.interop.load import load_model

        return load_model
    raise AttributeError(f"module 'siglip_train' has no attribute {name!r}")
