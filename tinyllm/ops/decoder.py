"""Tokens through a whole quantised transformer in one native call, not some forty per block.

A small model decodes at the speed of its calls, not of its arithmetic: an RMSNorm of 256 numbers
takes 10 us from Python and 0.1 us in C++ (kernels/cpu/decoder.h).
Dimensions: B sequences, T new tokens, D width, F feed-forward width, H query heads, G key-value
heads, K head width, V vocabulary.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops import cpu
from tinyllm.ops.room import CACHED, Room

Weight = tuple[Tensor, Tensor]
"""INT8 rows (N, K) and their fp32 scales (N,), or those of `tinyllm.ops.int4`."""
GATES = 32
"""Rows of the gate that lie together, followed by their rows of the up projection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One block; layers that read the same input are joined by their outputs."""

    qkv: Weight
    """(H + 2 G) K outputs from D inputs: queries, keys, values."""
    o: Weight
    """D outputs from H K inputs."""
    gate: Weight
    """F outputs from D inputs."""
    up: Weight
    """Likewise."""
    down: Weight
    """D outputs from F inputs, its rows rotated by `reference.hadamard`."""
    norm_attention: Tensor
    """(D,)."""
    norm_mlp: Tensor
    """(D,)."""
    norm_q: Tensor | None
    """(K,), None without QK-norm."""
    norm_k: Tensor | None
    """(K,), likewise."""
    window: int
    """Keys that a query sees, its own among them; 0: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderWeights:
    """A whole model."""

    layers: Sequence[LayerWeights]
    embedding: Weight
    """V rows of D numbers, INT8."""
    head: Weight
    """V outputs from D inputs, INT8."""
    norm: Tensor
    """(D,), before the head."""
    cosines: Tensor
    """(positions, K / 2) of the rotation."""
    sines: Tensor
    """Likewise."""
    n_heads: int
    """H."""
    n_kv_heads: int
    """G."""
    d_head: int
    """K."""
    eps: float
    """Of every norm."""
    activation_bits: int
    """8, or 16 as `linear.in_two_terms` has them."""


class _Layer(ctypes.Structure):
    """`tinyllm::Layer` of kernels/cpu/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "down", "gate_up")),
        *((name, ctypes.c_void_p) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")),
        ("window", ctypes.c_int64),
    )


class _Decoder(ctypes.Structure):
    """`tinyllm::Decoder`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "head", "embedding", "embedding_scale")),
        *((name, ctypes.c_void_p) for name in ("norm", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("n_layers", "d", "d_ff")),
        *((name, ctypes.c_int64) for name in ("n_heads", "n_kv_heads", "d_head", "terms")),
        ("eps", ctypes.c_float),
    )


class _Tokens(ctypes.Structure):
    """`tinyllm::Tokens`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scale", "value_scale")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("layer", "sequence", "head", "position")),
        ("stored", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "logits")),
        *((name, ctypes.c_int64) for name in ("n_sequences", "n_tokens")),
    )


class Decoder:
    """A model that is ready to take tokens, on the CPU."""

    def __init__(self, weights: DecoderWeights) -> None:
        """Pack the weights; later changes of them have no effect."""
        self._memory: list[object] = []  # the library holds bare addresses
        self._arena = cpu.Arena(_packed_bytes(weights))
        layers = (_Layer * len(weights.layers))(*map(self._layer, weights.layers))
        embedding_q, embedding_scale = (x.detach().contiguous() for x in weights.embedding)
        numbers = [_floats(x) for x in (weights.norm, weights.cosines, weights.sines)]
        self._memory += [layers, embedding_q, embedding_scale, *numbers]
        self._n_vocabulary, self._d = weights.head[0].shape
        self._n_positions = weights.cosines.shape[0]
        self._decoder = _Decoder(
            *(ctypes.addressof(layers), self._packed(weights.head)),
            *(embedding_q.data_ptr(), embedding_scale.data_ptr()),
            *(x.data_ptr() for x in numbers),
            *(len(weights.layers), self._d, weights.layers[0].gate[0].shape[0]),
            *(weights.n_heads, weights.n_kv_heads, weights.d_head),
            weights.activation_bits // 8,
            weights.eps,
        )
        self._address = ctypes.addressof(self._decoder)
        self._run = cpu.load()[0].tinyllm_decode
        self._threads = cpu.given_threads()  # looked up once: it takes as long as a small layer

    def hidden(self, ids_BT: Tensor, room: Room) -> Tensor:
        """Return the normalised output of the last block, (B, T, D); see `logits`."""
        hidden = torch.empty((*ids_BT.shape, self._d))
        self._pass(ids_BT, room, hidden, None)
        return hidden

    def logits(self, ids_BT: Tensor, room: Room) -> Tensor:
        """Return the logits after each sequence's last token, (B, V).

        Args:
            ids_BT: new tokens, int64.
            room: their keys and values are written behind those of earlier tokens.

        Raises:
            IndexError: a token is not in the vocabulary, or a position beyond the room.
        """
        logits = torch.empty(ids_BT.shape[0], self._n_vocabulary)
        self._pass(ids_BT, room, None, logits)
        return logits

    def for_sequence(self, room: Room) -> "SequenceDecoder":
        """Return what reads one sequence, whose room this is."""
        return SequenceDecoder(self, room, torch.empty(1, self._n_vocabulary))

    def _pass(self, ids: Tensor, room: Room, hidden: Tensor | None, logits: Tensor | None) -> None:
        """Let the library write into what is not None."""
        ids = ids.contiguous()
        starts = (ctypes.c_int64 * len(room.starts))(*room.starts)
        tokens = _tokens(room, ids.data_ptr(), ctypes.addressof(starts), hidden, logits)
        tokens.n_sequences, tokens.n_tokens = ids.shape
        end = max(room.starts) + tokens.n_tokens
        if end > self.n_positions(room) or len(room.starts) != tokens.n_sequences:
            raise IndexError(f"{end} positions of {len(room.starts)} sequences do not fit")
        self.run(tokens)

    def n_positions(self, room: Room) -> int:
        """Return how many positions a sequence can have."""
        return min(room.keys.shape[3], self._n_positions)

    def run(self, tokens: _Tokens) -> None:
        """Make a pass whose positions fit."""
        threads = self._threads or torch.get_num_threads()
        if self._run(self._address, ctypes.addressof(tokens), threads):
            raise IndexError(f"a token is not one of {self._n_vocabulary}")

    def _layer(self, weights: LayerWeights) -> _Layer:
        """Pack one block."""
        norms = [
            None if norm is None else _floats(norm)
            for norm in (weights.norm_attention, weights.norm_mlp, weights.norm_q, weights.norm_k)
        ]
        self._memory += norms
        return _Layer(
            *(self._packed(x) for x in (weights.qkv, weights.o, weights.down, _gate_up(weights))),
            *(None if norm is None else norm.data_ptr() for norm in norms),
            weights.window,
        )

    def _packed(self, weight: Weight) -> int:
        """Pack a matrix; return the address of its `tinyllm::Weight`."""
        linear = cpu.PackedLinear(*weight, self._arena)
        self._memory.append(linear)
        return linear.address


class SequenceDecoder:
    """A decoder and one sequence's memory: the call is prepared once, a token only changes it."""

    def __init__(self, decoder: Decoder, room: Room, logits_1V: Tensor) -> None:
        self._decoder, self._room, self._logits_1V = decoder, room, logits_1V
        self._start = ctypes.c_int64()
        self._tokens = _tokens(room, 0, ctypes.addressof(self._start), None, logits_1V)
        self._tokens.n_sequences = 1
        self._n_positions = decoder.n_positions(room)

    def logits(self, ids: Sequence[int], start: int) -> Tensor:
        """Return the logits after the last token, (1, V), which the next call writes over.

        Args:
            ids: new tokens.
            start: how many positions there are already.

        Raises:
            IndexError: as `Decoder.logits`.
        """
        if not 0 < len(ids) <= self._n_positions - start:
            raise IndexError(f"{len(ids)} tokens do not fit behind {start} of {self._n_positions}")
        numbers = array("q", ids)
        self._tokens.ids, self._tokens.n_tokens = numbers.buffer_info()
        self._start.value = start
        self._decoder.run(self._tokens)
        return self._logits_1V


def _tokens(
    room: Room, ids: int, starts: int, hidden: Tensor | None, logits: Tensor | None
) -> _Tokens:
    """Return a call that lacks its numbers of sequences and tokens.

    `ids` and `starts` are addresses of int64; what `hidden` or `logits` is not None is written.
    """
    layer, sequence, head, position, _ = room.keys.stride()
    return _Tokens(
        *(ids, starts, room.keys.data_ptr(), room.values.data_ptr()),
        *(scale.data_ptr() for scale in room.scales or ()),
        layer_stride=layer,
        sequence_stride=sequence,
        head_stride=head,
        position_stride=position,
        stored=CACHED.index(room.keys.dtype),
        hidden=None if hidden is None else hidden.data_ptr(),
        logits=None if logits is None else logits.data_ptr(),
    )


def no_decoder(weights: DecoderWeights) -> None:
    """Stand for the reference: there is nothing to prepare, the model's layers run one by one."""


def _floats(x: Tensor) -> Tensor:
    """Return a copy in fp32 that nobody else changes."""
    return x.detach().float().contiguous().clone()


def _gate_up(weights: LayerWeights) -> Weight:
    """Return gate and up as one matrix, `GATES` rows of each in turn, padded with zeros.

    So every panel of 64 outputs holds pairs, and any thread can multiply its pairs at once.
    """
    n_padded = -weights.gate[0].shape[0] % GATES

    def in_turns(*parts: Tensor) -> Tensor:
        """Return `GATES` rows of each part in turn."""
        padded = [torch.cat((x, x.new_zeros(n_padded, *x.shape[1:]))) for x in parts]
        turns = [x.view(-1, GATES, *x.shape[1:]) for x in padded]
        return torch.stack(turns, dim=1).flatten(0, 2)

    rows, scales = zip(weights.gate, weights.up, strict=True)
    return in_turns(*rows), in_turns(*scales)


def _packed_bytes(weights: DecoderWeights) -> int:
    """Return what all matrices take when they are packed."""
    matrices = [(weights.head[0].shape[0], weights.head[0])]
    for layer in weights.layers:
        n_pairs = -(-layer.gate[0].shape[0] // GATES) * GATES
        matrices += [(x[0].shape[0], x[0]) for x in (layer.qkv, layer.o, layer.down)]
        matrices.append((2 * n_pairs, layer.gate[0]))
    total = 0
    for n, rows in matrices:
        bits = cpu.bits_of(rows)
        total += cpu.packed_bytes(n, rows.shape[1] * 8 // bits, bits)
    return total
