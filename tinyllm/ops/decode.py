"""One token through one transformer block in two native calls, instead of some forty torch calls.

A small model decodes at the speed of its calls, not of its arithmetic: an RMSNorm of 256 numbers
takes 10 us from Python and 0.1 us here. The cache stays where it is, between the two calls.
Dimensions: D width, F feed-forward width, H query heads, G key-value heads, K head width, S keys.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyllm.ops import cpu

Weight = tuple[Tensor, Tensor]
"""INT8 rows (N, K) and their fp32 scales (N,)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockWeights:
    """What a block consists of; layers that read the same input are joined by their outputs."""

    qkv: Weight
    """(H + 2 G) K outputs from D inputs: queries, keys, values."""
    o: Weight
    """D outputs from H K inputs."""
    gate_up: Weight
    """2 F outputs from D inputs: gate, up."""
    down: Weight
    """D outputs from F inputs."""
    norm_attention: Tensor
    """(D,)."""
    norm_mlp: Tensor
    """(D,)."""
    norm_q: Tensor | None
    """(K,), None without QK-norm."""
    norm_k: Tensor | None
    """(K,), likewise."""
    n_heads: int
    """H."""
    n_kv_heads: int
    """G."""
    d_head: int
    """K."""
    eps: float
    """Of every norm."""


class _Block(ctypes.Structure):
    """`tinyllm::Block` of kernels/cpu/decode.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm_attention", "norm_mlp", "norm_q", "norm_k")),
        *((name, ctypes.c_int64) for name in ("d", "d_ff", "n_heads", "n_kv_heads", "d_head")),
        ("eps", ctypes.c_float),
    )


class DecodeBlock:
    """A block that is ready to take one token at a time, in fp32 on the CPU."""

    def __init__(self, weights: BlockWeights) -> None:
        linears = [
            cpu.PackedLinear(*weight)
            for weight in (weights.qkv, weights.o, weights.gate_up, weights.down)
        ]
        norms = [
            None if norm is None else norm.detach().float().contiguous().clone()
            for norm in (weights.norm_attention, weights.norm_mlp, weights.norm_q, weights.norm_k)
        ]
        d, d_ff = weights.down[0].shape
        heads, kv_heads, d_head = weights.n_heads, weights.n_kv_heads, weights.d_head
        block = _Block(
            *(linear.address for linear in linears),
            *(None if norm is None else norm.data_ptr() for norm in norms),
            *(d, d_ff, heads, kv_heads, d_head),
            weights.eps,
        )
        self._keep = (linears, norms, block)  # the library holds bare addresses
        self._address = ctypes.addressof(block)
        library, _ = cpu.load()
        self._run_project, self._run_finish = (
            library.tinyllm_decode_project,
            library.tinyllm_decode_finish,
        )
        self._threads = cpu.n_threads()
        self._n_qkv = (heads + 2 * kv_heads) * d_head
        self._kv_shape = (1, kv_heads, 1, d_head)
        self._kv_strides = (kv_heads * d_head, d_head, d_head, 1)
        self._k_offset, self._v_offset = heads * d_head, (heads + kv_heads) * d_head

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of one token in one tensor, and its keys and values.

        Args:
            x_BTD: residual stream, (1, 1, D), contiguous fp32.
            cos: cosines of the position, K / 2 numbers.
            sin: sines likewise.

        Returns:
            everything, for `finish`; the new keys and the new values, both (1, G, 1, K), for the
            cache.
        """
        qkv = torch.empty(self._n_qkv)
        cos, sin = cos.contiguous(), sin.contiguous()
        cpu.check(
            self._run_project(
                self._address,
                x_BTD.data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
                qkv.data_ptr(),
                self._threads,
            )
        )
        keys = qkv.as_strided(self._kv_shape, self._kv_strides, self._k_offset)
        return qkv, keys, qkv.as_strided(self._kv_shape, self._kv_strides, self._v_offset)

    def finish(self, x_BTD: Tensor, qkv: Tensor, k_BGSK: Tensor, v_BGSK: Tensor) -> Tensor:
        """Return the block's output, (1, 1, D), with all keys and values so far, (1, G, S, K)."""
        _, k_head, k_row, k_one = k_BGSK.stride()
        _, v_head, v_row, v_one = v_BGSK.stride()
        if k_one != 1 or v_one != 1:
            return self.finish(x_BTD, qkv, k_BGSK.contiguous(), v_BGSK.contiguous())
        y = torch.empty(x_BTD.shape)
        cpu.check(
            self._run_finish(
                *(self._address, x_BTD.data_ptr(), qkv.data_ptr()),
                *(k_BGSK.data_ptr(), k_head, k_row),
                *(v_BGSK.data_ptr(), v_head, v_row),
                *(k_BGSK.shape[2], y.data_ptr(), self._threads),
            )
        )
        return y


def no_decode_block(weights: BlockWeights) -> None:
    """Stand for the reference: there is nothing to prepare, the block's layers run one by one."""
