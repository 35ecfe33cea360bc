"""Defines recipes: each gives the field names, prompt, length rule and filter of a data set that the paper uses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxblock.data.config import DataConfig, RecipeName

BUILTIN = "builtin"

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response: Let's think step by step."
)
"""The prompt of the published code's preprocessing script; all of it is one user turn."""


@dataclass(frozen=True)
class Recipe:
    """Holds the settings that a recipe's name stands for.

    Attributes:
        prompt_field: The field that holds the prompt.
        response_field: The field that holds the response.
        train: The source of the training records when the config names no file.
        test: The source of the test records when the config names no file; None if the data set has none.
        exclude_types: Texts; a training record whose type contains one of them is dropped.
        prompt_template: The text in which `{prompt}` is replaced by the prompt.
        max_total_len: Training records with more tokens of prompt and response together are dropped; 0 for no limit.
        max_records: The number of training records that are kept; 0 for all.
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
    # The published script skips the GSM types by default, so that it trains only on records that derive from MATH.
    "metamathqa": Recipe("query", "response", "hf:meta-math/MetaMathQA", None, exclude_types=("GSM",)),
    "gsm8k": Recipe("question", "answer", "hf:openai/gsm8k:main", "hf:openai/gsm8k:main"),
    "math": Recipe(
        "problem", "solution", "hf:DigitalLearningGmbH/MATH-lighteval", "hf:DigitalLearningGmbH/MATH-lighteval"
    ),
}
_NO_RECIPE = Recipe("question", "answer", BUILTIN, BUILTIN, prompt_template="{prompt}", max_total_len=0, max_records=0)


def with_recipe(config: DataConfig) -> DataConfig:
    """Fills in the settings that a recipe decides; a setting that is given stays as it is.

    Where `train` is `builtin` it is replaced by the recipe's source, and then a `test` that is `builtin` by the recipe's too.
    A list of one training file becomes that file.

    Args:
        config: The data settings.

    Returns:
        Settings without None in `prompt_field`, `response_field`, `prompt_template`, `exclude_types`, `max_total_len`
        and `max_records`. Filling them in again changes nothing.
    """
    if isinstance(config.train, tuple) and len(config.train) == 1:
        config = dataclasses.replace(config, train=config.train[0])
    recipe = _NO_RECIPE if config.recipe is None else RECIPES[config.recipe]
    names = ("prompt_field", "response_field", "prompt_template", "exclude_types", "max_total_len", "max_records")
    values = {name: getattr(recipe, name) for name in names if getattr(config, name) is None}
    if config.test == BUILTIN and config.test_recipe is not None:
        values["test"] = RECIPES[config.test_recipe].test
    elif config.test == BUILTIN and config.train == BUILTIN:
        values["test"] = recipe.test
    if config.train == BUILTIN:
        values["train"] = recipe.train
    return dataclasses.replace(config, **values)


def with_test_fields(config: DataConfig) -> DataConfig:
    """Returns resolved settings with the field names of the test records, which `test_recipe` may decide."""
    if config.test_recipe is None:
        return config
    recipe = RECIPES[config.test_recipe]
    return dataclasses.replace(
        config,
        prompt_field=recipe.prompt_field,
        input_field=None,
        system_field=None,
        response_field=recipe.response_field,
    )
