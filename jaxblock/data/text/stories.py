"""Tells the built-in corpus's problems, as short stories or in one line of arithmetic."""

import random
from typing import Any

_NAMES = (
    "Ada", "Amir", "Bea", "Boris", "Chloe", "Dana", "Diego", "Elif", "Emeka", "Farah", "Finn", "Greta", "Hana",
    "Hugo", "Ines", "Ivan", "Jun", "Kofi", "Lena", "Luca", "Maya", "Mina", "Nils", "Noor", "Olga", "Omar", "Petra",
    "Quinn", "Rosa", "Sami", "Tara", "Theo", "Uma", "Viktor", "Wanda", "Yuki", "Zane", "Zoe",
)  # fmt: skip
_THINGS = (
    "apples", "badges", "balloons", "beads", "books", "bottles", "buttons", "candles", "cards", "carrots", "coins",
    "cookies", "crayons", "cups", "eggs", "flowers", "keys", "lemons", "letters", "marbles", "muffins", "pears",
    "pencils", "plums", "postcards", "ribbons", "shells", "spoons", "stamps", "stickers", "tickets", "tulips",
)  # fmt: skip
# No number is followed by a full stop: a tokenizer could merge the two into one token.
# The sentences are short because a prompt token costs as much time as a response token and the quickstart runs on two cores.
_OPENINGS = (
    "{name} has {n} {things}.",
    "{name} owns {n} {things}.",
    "{name} counts {n} {things}.",
    "{name} keeps {n} {things}.",
    "{name} starts with {n} {things}.",
)
_SENTENCES = {
    "+": (
        "{other} gives {name} {n} more.",
        "{name} buys {n} more.",
        "{name} finds {n} {things}.",
        "Then {other} adds {n} more.",
        "A neighbour brings {n} {things}.",
        "Later {name} gets {n} more.",
        "{n} new {things} arrive.",
        "{name} wins {n} {things}.",
    ),
    "-": (
        "{other} takes {n} of them.",
        "{name} gives {n} to {other}.",
        "Then {name} loses {n} {things}.",
        "{name} sells {n} {things}.",
        "{other} borrows {n} {things}.",
        "{n} of them go missing.",
        "Later {name} mislays {n} {things}.",
        "{name} throws away {n} {things}.",
    ),
    "*": (
        "A lucky trade makes it {n} times as many.",
        "Then there are {n} times as many {things}.",
        "{other} helps {name} to {n} times as many.",
    ),
}
_QUESTIONS = (
    "How many {things} does {name} have now?",
    "How many {things} are there now?",
    "How many {things} are left?",
    "How many {things} does that make?",
)


def tell(chain: tuple[Any, ...], rng: random.Random) -> str:
    """Tells a chain, (start, (operation, operand), ...), as a story that ends with a question, in words drawn from `rng`."""
    name, other = rng.sample(_NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(_THINGS)}
    parts = [rng.choice(_OPENINGS).format(n=chain[0], **words)]
    parts += [rng.choice(_SENTENCES[operation]).format(n=operand, **words) for operation, operand in chain[1:]]
    return " ".join([*parts, rng.choice(_QUESTIONS).format(**words)])


def tell_briefly(chain: tuple[Any, ...]) -> str:
    """Tells a chain as one line, like ``4 + 3 - 2 = ?``; its operations are applied from left to right."""
    return " ".join([str(chain[0]), *(f"{operation} {operand}" for operation, operand in chain[1:]), "= ?"])
