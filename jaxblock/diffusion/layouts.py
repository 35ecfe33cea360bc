"""Makes the layouts (the static part of a canvas) of training, decoding and the NELBO from settings and a network's traits."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxblock.diffusion.canvas import Layout
from jaxblock.diffusion.config import CanvasConfig, MethodConfig, check_blocks
from jaxblock.diffusion.decoding.config import DecodeConfig
from jaxblock.errors import UserError
from jaxblock.settings import Alignment


@runtime_checkable
class NetworkTraits(Protocol):
    """Lists the properties of a network that a canvas depends on; ``models.architecture.Architecture`` has all of it."""

    @property
    def alignment(self) -> Alignment:
        """Which hidden state predicts a token."""
        ...

    @property
    def vocab_size(self) -> int:
        """The number of token ids."""
        ...

    @property
    def eos_id(self) -> int:
        """The end-of-sequence token, which fills the rest of a response's last block."""
        ...

    @property
    def max_len(self) -> int:
        """The longest sequence that the network was made for."""
        ...

    def need_mask_id(self) -> int:
        """Returns the mask token; raises UserError where there is none."""
        ...


def training_layout(
    canvas: CanvasConfig, method: MethodConfig, network: NetworkTraits, stop_ids: tuple[int, ...]
) -> Layout:
    """Returns the layout of a training step; classical SFT has one block, as long as the response.

    Args:
        canvas: the ``canvas`` section.
        method: the ``method`` section.
        network: the network's traits.
        stop_ids: the tokens that end a response.
    """
    return Layout(
        response_len=canvas.response_len,
        block=canvas.response_len if method.objective == "classical" else canvas.block,
        alignment=network.alignment,
        context=canvas.context,
        suffix_window=canvas.suffix_window,
        mask_id=network.need_mask_id(),
        fill_id=network.eos_id,
        stop_ids=stop_ids,
        total_len=canvas.total_len,
    )


def scoring_layout(canvas: CanvasConfig, network: NetworkTraits, stop_ids: tuple[int, ...]) -> Layout:
    """Returns the layout of the NELBO: the decoder's for every objective and context, so that runs can be compared."""
    return decoding_layout(canvas, DecodeConfig(), network, stop_ids)


def decoding_layout(
    canvas: CanvasConfig, decode: DecodeConfig, network: NetworkTraits, stop_ids: tuple[int, ...]
) -> Layout:
    """Returns the layout of the decoder, which is always ``aligned``.

    The view of the ``paper`` context shows where the answer ends, which a decoder cannot know.

    Args:
        canvas: the ``canvas`` section.
        decode: the ``decode`` section; its sizes and special ids, where set, override those of the canvas and the network.
        network: the network's traits.
        stop_ids: the tokens that end a response, where ``decode`` names none.

    Raises:
        UserError: the block does not divide the response or has fewer positions than steps, a token cannot end or fill a
            response, or ``quirks`` would do nothing.
    """
    layout = Layout(
        response_len=decode.response_len or canvas.response_len,
        block=decode.block or canvas.block,
        alignment=network.alignment,
        context="aligned",
        suffix_window=canvas.suffix_window,
        mask_id=network.need_mask_id(),
        fill_id=network.eos_id if decode.fill_id is None else decode.fill_id,
        stop_ids=stop_ids if decode.stop_ids is None else decode.stop_ids,
    )
    check_blocks(layout.response_len, layout.block, "decode")
    if decode.steps_per_block is not None and decode.steps_per_block > layout.block:
        raise UserError(
            f"decode.steps_per_block {decode.steps_per_block} is more than the {layout.block} positions of a block: set at "
            f"most {layout.block}, one token a step"
        )
    if decode.quirks == "fast_dllm" and layout.alignment != "shifted":
        raise UserError(
            "decode.quirks fast_dllm has no effect on a network whose hidden state predicts its own position (LLaDA): set it to "
            "none; the cached results are Fast-dLLM's there"
        )
    for name, ids in (("fill_id", (layout.fill_id,)), ("stop_ids", layout.stop_ids)):
        for token in ids:
            if token == layout.mask_id or not 0 <= token < network.vocab_size:
                what = (
                    "the mask token" if token == layout.mask_id else f"outside the vocabulary of {network.vocab_size}"
                )
                raise UserError(f"decode.{name}: {token} is {what}: name a token that ends or fills a response")
    return layout


def infilling_layout(
    canvas: CanvasConfig, decode: DecodeConfig, network: NetworkTraits, stop_ids: tuple[int, ...]
) -> Layout:
    """Returns the layout of texts with masked spans: the decoder's, in which the response's other tokens are given and visible.

    Args:
        canvas: the ``canvas`` section.
        decode: the ``decode`` section.
        network: the network's traits.
        stop_ids: the tokens that end a response, where ``decode`` names none.

    Raises:
        UserError: ``decoding_layout`` raises it, or a window would hide what is given.
    """
    layout = decoding_layout(canvas, decode, network, stop_ids)
    if layout.suffix_window is not None and layout.suffix_window < layout.response_len - layout.block:
        raise UserError(
            f"canvas.suffix_window {layout.suffix_window} hides what comes after a block, and infilling is to see it: set "
            "canvas.suffix_window to null (the model was then trained with less of a suffix than it is shown)"
        )
    return layout._replace(infill=True)


def check_decoding(canvas: CanvasConfig, decode: DecodeConfig, network: NetworkTraits) -> None:
    """Raises UserError where decoding on this canvas cannot work. Called first, so that the error does not come hours later."""
    layout = decoding_layout(canvas, decode, network, ())
    width = canvas.prompt_len + max(canvas.response_len, layout.response_len)
    if width > network.max_len:
        raise UserError(
            f"canvas.prompt_len and the response make {width} positions, but the model was made for {network.max_len}: "
            "set canvas.prompt_len, canvas.response_len or decode.response_len lower"
        )
