"""Makes functions that break a folder of weights, for tests of what is said about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Break = Callable[[Path], Any]


def tensors(file: str, edit: Callable[[dict[str, np.ndarray]], Any]) -> Break:
    """Returns a function that changes the tensors in a file of a folder."""

    def apply(folder: Path) -> None:
        held = load_file(folder / file)
        edit(held)
        save_file(held, folder / file)

    return apply


def fields(file: str, edit: Callable[[dict[str, Any]], Any] | None = None, **changes: Any) -> Break:
    """Returns a function that changes a JSON file of a folder: by a function, or by fields."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        if edit is not None:
            edit(content)
        (folder / file).write_text(json.dumps(content | changes))

    return apply
