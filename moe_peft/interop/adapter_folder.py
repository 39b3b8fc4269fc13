"""Any method's trained adapters as a folder of two files: `adapter_model.safetensors` and `moe_peft.json`.

The tensors are a checkpoint's, by its names and in its dtypes; the description is a checkpoint's too: method with all
its arguments, backbone with its fingerprint, tasks. Read, the folder is a checkpoint, without what training needs.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from moe_peft.checkpoint import FORMAT, describe
from moe_peft.interop.files import read_about, read_tensors, write_json
from moe_peft.interop.folder import new_folder
from moe_peft.methods.base import MultitaskModule

ABOUT, TENSORS = "moe_peft.json", "adapter_model.safetensors"


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a path is a folder that `write_adapter` wrote."""
    return (Path(path) / ABOUT).is_file()


def write_adapter(module: MultitaskModule, folder: str | Path) -> None:
    """Writes the folder, whole or not at all.

    Args:
        module: a method with its configuration (what was trained on the command line, or loaded, has it).
        folder: where to; no such path yet, or an empty folder.

    Raises:
        ValueError: a module without its configuration, or a folder that holds something.
    """
    module.configure_model()
    if module.config is None:
        raise ValueError("module: it has no configuration, from which it could be made again; set module.config")
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in module.adapter_state().items()}
    about = describe(module)
    with new_folder(folder) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        write_json(new / ABOUT, about | {"config": portable(about["config"])})


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a method's configuration without what trained it, and without places to write on the author's machine."""
    arguments = {name: value for name, value in config["init_args"].items() if name not in ("optimizer", "scheduler")}
    for name in ("embedder", "features"):
        reader = arguments.get(name)
        if isinstance(reader, dict) and "cache_dir" in reader.get("init_args", {}):
            arguments[name] = reader | {"init_args": reader["init_args"] | {"cache_dir": None}}
    return config | {"init_args": arguments}


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """Reads the folder as the content of a checkpoint (see `checkpoint.read_checkpoint`).

    Raises:
        ValueError: no such folder, truncated files, another format, or a value that is not finite.
    """
    folder = Path(folder)
    about = read_about(folder / ABOUT, FORMAT)
    lacking = [name for name in ("method", "backbone", "fingerprint", "tasks", "specs", "config") if name not in about]
    if lacking or "init_args" not in about["config"]:
        raise ValueError(f"'{folder / ABOUT}' lacks {(lacking or ['config.init_args'])[0]}; export the folder again")
    about["config"] = portable(about["config"])  # what was downloaded shall not choose where anything is written
    return {"moe_peft": about, "state_dict": read_tensors(folder / TENSORS, as_stored=True)}
