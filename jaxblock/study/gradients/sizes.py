"""Says how much is drawn where a study measures gradients, and checks that it can be done."""

from __future__ import annotations

from dataclasses import dataclass

from jaxblock.config.config import Config
from jaxblock.errors import UserError

GRADIENTS = "gradients"
"""The kind of the experiments that measure gradients, and the name of their points, such as ``400/gradients``."""


@dataclass(frozen=True)
class GradientSizes:
    """Says how much is drawn where the gradients of a checkpoint are measured.

    Attributes:
        batches: the independent batches of each way to estimate the gradient, whose variance is measured.
        forwards: the rows times the draws of a batch, a multiple of 4: the computing that all of these ways have in common.
        examples: the examples on which the variance of a row is decomposed.
        groups: the independent groups of ``forwards`` examples on whose blocks directions are compared.
        bound_blocks: the block sizes at which the NELBO is compared with -log p; each divides the response.
        bound_examples: the examples of this comparison.
        orders: the random orders of commitment of a block of more than 8 positions; for smaller ones all are taken.
    """

    batches: int = 24
    forwards: int = 16
    examples: int = 128
    groups: int = 12
    bound_blocks: tuple[int, ...] = (1, 2, 4, 8)
    bound_examples: int = 16
    orders: int = 16

    def check(self, config: Config, arm: str, where: str) -> None:
        """Checks the sizes, and that the gradients of an arm can be measured.

        Args:
            config: the arm's settings.
            arm: the file and the arm, for messages.
            where: the file, for messages.

        Raises:
            UserError: a size is too small or does not fit the response, or the arm's canvas or network is not what the measurements
                are about.
        """
        for name, value, least in (
            ("batches", self.batches, 3),
            ("examples", self.examples, 3),
            ("groups", self.groups, 3),
            ("bound_examples", self.bound_examples, 2),
            ("orders", self.orders, 2),
        ):
            if value < least:
                raise UserError(f"{where}: gradients.{name} is {value}: it must be at least {least}")
        if self.forwards < 4 or self.forwards % 4:
            raise UserError(
                f"{where}: gradients.forwards is {self.forwards}: it must be a multiple of 4, the most draws of a row"
            )
        length = config.canvas.response_len
        wrong = [size for size in self.bound_blocks if size < 1 or length % size]
        if wrong or not self.bound_blocks:
            raise UserError(
                f"{where}: gradients.bound_blocks must be block sizes that divide canvas.response_len {length}, not "
                f"{list(self.bound_blocks)}"
            )
        if config.canvas.context != "aligned" or config.canvas.suffix_window is not None:
            raise UserError(
                f"{arm}: gradients are measured on the whole aligned canvas: set canvas.context to aligned and leave out "
                "canvas.suffix_window"
            )
        if config.lora.rank:
            raise UserError(f"{arm}: gradients are measured of all weights: leave out lora.rank")
