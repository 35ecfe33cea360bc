"""Decodes with a network of LLaDA's kind in plain PyTorch, as the published decoders do: the other side of decode_vs_torch.py.

The algorithms are LLaDA's low-confidence decoding (block by block, a quota of tokens a step) and Fast-dLLM's: the prefix
cache, the dual cache, and the rules that commit by threshold or by factor. They are published for one prompt; here a batch
of prompts of one length works too. The mask token is never committed, as in jaxblock.

Run as a script, it compares the decoder with its own bare forwards: the same calls of the network, with nothing chosen
between them. They take turns; the ratio is the median of the pairs' ratios.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.torch_decoder
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.small_network import CACHES, VARIED, network, random_prompts, seconds, sizes_parser
from jaxblock.diffusion.decoding.config import CacheName, FactorRule
from jaxblock.models.architecture import Architecture
from jaxblock.models.spec import Table, flatten
from jaxblock.types import Params


class Layer(NamedTuple):
    """Holds a layer's weights, [out, in]; products of the same input are one matrix.

    In memory they are the transposes, as jaxblock has them, with which PyTorch's products of few rows are a little faster.
    """

    attn_norm: Tensor
    qkv: Tensor
    o: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


KeysValues = list[tuple[Tensor, Tensor]]
"""Each layer's keys (rotated) and values of the whole canvas: two tensors [B, G, T, H]."""


class Network:
    """A bidirectional transformer with RMSNorm, rotary positions and SwiGLU, without biases, with jaxblock's weights."""

    def __init__(self, arch: Architecture, table: Table, params: Params):
        """Copies the weights, which ``table`` describes; a family with other weights than LLaDA's is refused."""
        known = {"embed", "final_norm", "head", *(f"blocks/{name}" for field in FIELDS for name in field.split())}
        assert set(table) <= known and arch.rope_scaling is None, f"this is no network of LLaDA's kind: {arch.family}"
        flat = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(params).items()}

        def part(*names: str, layer: int | None = None) -> Tensor:
            arrays = [flat[name] if layer is None else flat[name][layer] for name in names]
            stored = [array.T if table[name].transpose else array for name, array in zip(names, arrays, strict=True)]
            return torch.from_numpy(np.concatenate(stored))

        self.arch = arch
        self.embed, self.final_norm = part("embed"), part("final_norm")
        self.head = self.embed if arch.tie_embeddings else part("head")
        self.layers = [
            Layer(*(part(*(f"blocks/{name}" for name in field.split()), layer=layer) for field in FIELDS))
            for layer in range(arch.n_layers)
        ]
        half = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
        angles = torch.outer(torch.arange(arch.max_len), arch.rope_theta**-half)
        self.cos, self.sin = angles.cos(), angles.sin()

    def room(self, rows: int, width: int) -> KeysValues:
        """Returns empty keys and values for a batch of canvases of ``width`` positions."""
        shape = (rows, self.arch.n_kv_heads, width, self.arch.head_dim)
        return [(torch.empty(shape), torch.empty(shape)) for _ in self.layers]

    def hidden(self, ids: Tensor, begin: int, kept: KeysValues) -> Tensor:
        """Computes the last hidden states of the positions from ``begin`` on.

        Args:
            ids: their tokens [B, N]. Their keys and values replace the ``kept`` ones, and those of all other positions are
                attended to as they are kept.
            begin: the canvas position of the first.
            kept: the keys and values of the canvas; changed in place.

        Returns:
            Hidden states after the last norm [B, N, D].
        """
        x = self.embed[ids]
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            x = x + self._attention(layer, self._norm(x, layer.attn_norm), begin, keys, values)
            gate, up = functional.linear(self._norm(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return self._norm(x, self.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiplies hidden states by the head."""
        return functional.linear(hidden, self.head)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return functional.rms_norm(x, scale.shape, scale, self.arch.norm_eps)

    def _attention(self, layer: Layer, x: Tensor, begin: int, keys: Tensor, values: Tensor) -> Tensor:
        rows, count, _ = x.shape
        arch, here = self.arch, slice(begin, begin + count)
        heads = functional.linear(x, layer.qkv).view(rows, count, -1, arch.head_dim).transpose(1, 2)
        q, k, v = heads.split([arch.n_heads, arch.n_kv_heads, arch.n_kv_heads], dim=1)
        keys[:, :, here], values[:, :, here] = self._rotate(k, here), v
        grouped = arch.n_heads != arch.n_kv_heads
        out = functional.scaled_dot_product_attention(self._rotate(q, here), keys, values, enable_gqa=grouped)
        return functional.linear(out.transpose(1, 2).reshape(rows, count, -1), layer.o)

    def _rotate(self, x: Tensor, here: slice) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[here], self.sin[here]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


FIELDS = ("attn_norm", "q k v", "o", "mlp_norm", "gate up", "down")
"""What each field of ``Layer`` is made of: jaxblock's names of a layer's parameters."""


@dataclass(frozen=True)
class Options:
    """How responses are decoded.

    Attributes:
        response: response positions.
        block: positions of a block.
        steps: steps of a block, over which its tokens are split evenly; not used with a threshold or factor.
        cache: ``none`` feeds the whole canvas at every step. The others do so at a block's first step; at later ones
            ``prefix`` feeds what begins with the block, and ``dual`` the block alone.
        threshold: commit every token of at least this confidence, and always the best one.
        factor: commit ranks n = 1, 2, ... while confidence >= 1 - factor / (n + 1), and always the best one.
        factor_rule: ``v1`` accepts a first failure at the last rank too.
        head: the positions whose logits are computed: ``block``, or ``all`` that are fed, as the published scripts do.
    """

    response: int
    block: int
    steps: int
    cache: CacheName = "none"
    threshold: float | None = None
    factor: float | None = None
    factor_rule: FactorRule = "strict"
    head: Literal["block", "all"] = "block"

    def quota(self, step: int) -> int:
        """Returns how many tokens of a row a step commits; the remainder goes to the first steps."""
        return self.block // self.steps + (step < self.block % self.steps)


class Forward(NamedTuple):
    """One call of the network: the first and the end of the positions that it is fed, and the first of the block."""

    begin: int
    end: int
    block: int


class Decoded(NamedTuple):
    """Holds the decoded canvases [B, P + R], and the calls of the network that it took."""

    ids: Tensor
    forwards: list[Forward]


@torch.inference_mode()
def decode(net: Network, options: Options, prompts: Tensor) -> Decoded:
    """Decodes the responses of a batch of prompts of one length, int64 [B, P]."""
    rows, prompt_len = prompts.shape
    mask_id, width = net.arch.need_mask_id(), prompt_len + options.response
    ids = torch.cat([prompts, torch.full((rows, options.response), mask_id)], dim=1)
    kept, forwards = net.room(rows, width), []
    for first in range(prompt_len, width, options.block):
        block = ids[:, first : first + options.block]  # a view: what is written there is written to the canvas
        step = 0
        while (masked := block == mask_id).any():
            fed = Forward(*_fed(options, step, first, width), first)
            logits = forward(net, options, ids, fed, kept)
            token, confidence = candidates(logits, mask_id)
            chosen = choose(options, step, confidence, masked)
            block.copy_(torch.where(chosen, token, block))
            forwards.append(fed)
            step += 1
    return Decoded(ids, forwards)


def _fed(options: Options, step: int, first: int, width: int) -> tuple[int, int]:
    """Returns the first and the end of the positions that a step of the block at ``first`` feeds."""
    if step == 0 or options.cache == "none":
        return 0, width
    return first, first + options.block if options.cache == "dual" else width


def forward(net: Network, options: Options, ids: Tensor, fed: Forward, kept: KeysValues) -> Tensor:
    """Calls the network once, and returns the logits of the block [B, A, V]."""
    hidden = net.hidden(ids[:, fed.begin : fed.end], fed.begin, kept)
    inside = slice(fed.block - fed.begin, fed.block - fed.begin + options.block)
    return net.logits(hidden[:, inside]) if options.head == "block" else net.logits(hidden)[:, inside]


def candidates(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Returns the most probable token of each position and its probability (float64), both [B, A]; changes the logits."""
    of_mask = logits[..., mask_id].clone()
    logits[..., mask_id] = -torch.inf
    best, token = logits.max(dim=-1)
    # The best token's own share of the sum is 1. It is added in float64, where a probability near 1 keeps its distance from 1.
    others = logits.sub_(best[..., None]).exp_().scatter_(-1, token[..., None], 0).sum(dim=-1) + (of_mask - best).exp()
    return token, 1 / (1 + others.double())


def choose(options: Options, step: int, confidence: Tensor, masked: Tensor) -> Tensor:
    """Returns the masked positions that a step commits, bool [B, A]. Of equal ones the first is preferred."""
    rank = confidence.masked_fill(~masked, -1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    if options.threshold is not None:
        chosen = (confidence >= options.threshold) | (rank == 0)
    elif options.factor is not None:
        fails = masked & (confidence < 1 - options.factor / (rank + 2)) & (rank > 0)
        if options.factor_rule == "v1":
            fails &= rank < masked.sum(dim=-1, keepdim=True) - 1
        chosen = rank < torch.where(fails, rank, options.block).amin(dim=-1, keepdim=True)
    else:
        chosen = rank < options.quota(step)
    return chosen & masked


@torch.inference_mode()
def replay(net: Network, options: Options, decoded: Decoded) -> None:
    """Makes the calls of the network that a decoding made, with nothing chosen between them: its bare forwards."""
    kept = net.room(*decoded.ids.shape)
    for fed in decoded.forwards:
        forward(net, options, decoded.ids, fed, kept)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the decoder's forwards per second and the bare ones, for each cache and batch size; returns the ratios."""
    args = sizes_parser(__doc__).parse_args(argv)
    torch.set_num_threads(args.threads)
    arch, ours, params = network(args, VARIED)
    net, found = Network(arch, ours.param_table, params), {}
    for rows in args.batch:
        prompts = torch.from_numpy(random_prompts(args, rows)).long()
        for cache in CACHES:
            options = Options(args.response, args.block, args.steps, cache, head=args.head)
            found[f"{cache}, batch {rows}"] = _share_of_bare(net, options, prompts, args.repeat)
    return found


def _share_of_bare(net: Network, options: Options, prompts: Tensor, repeat: int) -> float:
    """Returns the decoder's forwards per second over the bare ones, the median of ``repeat`` pairs, and prints all three."""
    decoded = decode(net, options, prompts)
    replay(net, options, decoded)
    count = len(decoded.forwards)
    pairs = [
        (count / seconds(lambda: decode(net, options, prompts)), count / seconds(lambda: replay(net, options, decoded)))
        for _ in range(repeat)
    ]
    inside, outside = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    middle = statistics.median(ratios)
    print(
        f"batch {len(prompts)}, cache {options.cache:6}: decoder {inside:8.2f} forwards/s, bare {outside:8.2f}; ratio "
        f"{middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}; at least 0.9 wanted)"
    )
    return middle


if __name__ == "__main__":
    main()
