"""Recipes for the data sets of the paper: field names, prompt, length rule and filter, as one setting."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxblock.data.config import DataConfig, RecipeName

BUILTIN = "builtin"

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response: Let's think step by step."
)
"""The published code's prompt (its preprocessing script); one user turn."""


@dataclass(frozen=True)
class Recipe:
    """What a data set's name stands for.

    Attributes:
        prompt_field: Field of the prompt.
        response_field: Field of the response.
        train: Where its training records come from when no file is given.
        test: The same for its test records; None if it has none.
        exclude_types: Training records whose type contains one of these are dropped.
        prompt_template: What a prompt is put into.
        max_total_len: Most tokens of prompt and response together, in training.
        max_records: Most training records.
    """

    prompt_field: str
    response_field: str
    train: str
    test: str | None
    exclude_types: tuple[str, ...] = ()
    prompt_template: str = PROMPT
    max_total_len: int = 256
    max_records: int = 20_000


RECIPES: dict[RecipeName, Recipe] = {
    # The published script skips the GSM types by default: what it trains on derives from MATH alone.
    "metamathqa": Recipe("query", "response", "hf:meta-math/MetaMathQA", None, exclude_types=("GSM",)),
    "gsm8k": Recipe("question", "answer", "hf:openai/gsm8k:main", "hf:openai/gsm8k:main"),
    "math": Recipe(
        "problem", "solution", "hf:DigitalLearningGmbH/MATH-lighteval", "hf:DigitalLearningGmbH/MATH-lighteval"
    ),
}


def resolve(config: DataConfig) -> DataConfig:
    """The settings with every field that a recipe may decide decided; a field that is set stays as it is.

    Where `train` is `builtin`, a recipe's own source takes its place, and then that of `test` too.

    Args:
        config: The data settings.

    Returns:
        Settings without None in `prompt_field`, `response_field`, `prompt_template`, `exclude_types`, `max_total_len`
        and `max_records`. Resolving them again changes nothing.
    """
    recipe = Recipe("question", "answer", BUILTIN, BUILTIN, (), "{prompt}", 0, 0)
    if config.recipe is not None:
        recipe = RECIPES[config.recipe]
    names = (
        "prompt_field",
        "response_field",
        "prompt_template",
        "exclude_types",
        "max_total_len",
        "max_records",
    )
    values = {name: getattr(recipe, name) for name in names if getattr(config, name) is None}
    if config.test == BUILTIN and config.test_recipe is not None:
        values["test"] = RECIPES[config.test_recipe].test
    elif config.test == BUILTIN and config.train == BUILTIN:
        values["test"] = recipe.test
    if config.train == BUILTIN:
        values["train"] = recipe.train
    return dataclasses.replace(config, **values)


def for_test(config: DataConfig) -> DataConfig:
    """Resolved settings with the field names of the test records."""
    if config.test_recipe is None:
        return config
    recipe = RECIPES[config.test_recipe]
    return dataclasses.replace(config, prompt_field=recipe.prompt_field, response_field=recipe.response_field)
