"""Breaks a folder of weights, for tests of what is said about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

Break = Callable[[Path], Any]


def change(file: str, edit: Callable[[dict[str, Any]], Any] = dict, **changes: Any) -> Break:
    """Returns a function that changes the tensors or the JSON in a file of a folder: by a function, or by fields."""

    def apply(folder: Path) -> None:
        path, tensors = folder / file, file.endswith(".safetensors")
        held = load_file(path) if tensors else json.loads(path.read_text())
        edit(held)
        held |= changes
        save_file(held, path) if tensors else path.write_text(json.dumps(held))

    return apply
