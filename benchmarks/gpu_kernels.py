"""What is compared on a card: our CUDA kernels, torch's, and where there is one, bitsandbytes'.

Each function measures one kernel at one size and returns a row: milliseconds by candidate, and the
work (bytes moved or floating-point operations) from which rates follow.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from gpu_timing import Run, in_turns
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllm.ops import (
    cuda,
    cuda_attention,
    cuda_block_op,
    cuda_driver,
    cuda_hopper,
    cuda_norm_op,
    library,
    reference,
)
from tinyllm.ops.adamw8bit import BLOCK, Moments, Rates
from tinyllm.ops.launch import Launch

BF16 = torch.bfloat16
Row = dict[str, Any]


def ceilings(device: torch.device, side: int, n_bytes: int, rounds: int) -> dict[str, float]:
    """Return what the card itself does: GB/s of a copy, TFLOP/s and TOP/s of square products."""
    a = torch.randn(side, side, device=device, dtype=BF16)
    q = torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8)
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = in_turns(
        {
            "copy": lambda: target.copy_(source),
            "bf16": lambda: a @ a,
            "int8": lambda: torch._int_mm(q, q.T),
        },
        rounds,
    )
    work = {"copy": 2 * n_bytes / 1e6, "bf16": 2 * side**3 / 1e9, "int8": 2 * side**3 / 1e9}
    units = {"copy": "copy_gb_per_s", "bf16": "bf16_tflop_per_s", "int8": "int8_top_per_s"}
    return {units[name]: float(f"{work[name] / taken:.4g}") for name, taken in ms.items()}


def attention(
    device: torch.device, t: int, width: int, n_tokens: int, d: int, rounds: int
) -> list[Row]:
    """Measure causal attention of B = n_tokens / t sequences with d / width heads, both ways."""
    b, h = max(1, n_tokens // t), d // width
    q, k, v = (
        torch.randn(b, t, h, width, device=device, dtype=BF16).transpose(1, 2).requires_grad_()
        for _ in range(3)
    )
    d_o = torch.randn_like(q)

    def by_torch(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                y: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return y

        return run

    forward: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: cuda.attention(q, k, v, None, 0, width**-0.5),
        "flash": by_torch(SDPBackend.FLASH_ATTENTION),
        "cudnn": by_torch(SDPBackend.CUDNN_ATTENTION),
    }

    def by_hopper() -> Tensor:
        return cuda_attention.forward(_run_hopper, q, k, v, None, 0, width**-0.5)[0]

    def both(run: Callable[[], Tensor]) -> Run:
        return lambda: torch.autograd.grad(run(), (q, k, v), d_o)

    flops = 2 * b * h * t * t * width  # two products, half of the square
    row = {"t": t, "width": width, "heads": h, "batch": b}
    variants = {"ours, wgmma": by_hopper} if cuda_hopper.is_hopper() else {}
    with torch.no_grad():
        alone = in_turns(forward | variants, rounds)
    whole = in_turns({name: both(forward[name]) for name in alone if name in forward}, rounds)
    back = {name: max(round(ms - alone[name], 5), 1e-5) for name, ms in whole.items()}
    return [
        {"kernel": "attention forward", **row, "flops": flops, "ms": alone},
        {"kernel": "attention backward", **row, "flops": 5 * flops // 2, "ms": back},
    ]


def _run_hopper(launch: Launch) -> None:
    """Run attention's kernel for Hopper instead of the one by mma.sync."""
    cuda_driver.run(cuda_hopper.of(launch))


def linear(device: torch.device, m: int, n: int, k: int, rounds: int, copies: int) -> Row:
    """Measure an INT8 layer with M rows beside bf16; each copy has a weight of its own."""
    x = torch.randn(m, k, device=device, dtype=BF16)
    ours, int_mm, plain = [], [], []
    for _ in range(copies):
        weight = torch.randn(n, k, device=device)
        q, scale = reference.quantize_per_row(weight)
        ours.append(_call(cuda.bind_linear_w8a8(q, scale), x))
        int_mm.append(_call(library.bind_linear_w8a8(q, scale), x))
        plain.append(_call(lambda x, w: F.linear(x, w), x, weight.to(BF16)))
    few = m <= 8
    ms = in_turns({"ours": ours, "_int_mm, quantised by torch": int_mm, "bf16": plain}, rounds)
    work = {"bytes": n * k} if few else {"flops": 2 * m * n * k}
    name = "linear W8A16" if few else "linear W8A8"
    return {"kernel": name, "m": m, "n": n, "k": k, **work, "ms": ms}


def rms_norm(device: torch.device, rows: int, width: int, rounds: int) -> Row:
    """Measure RMSNorm forward in bf16."""
    x, weight = (
        torch.randn(rows, width, device=device, dtype=BF16),
        torch.ones(width, device=device),
    )
    low = weight.to(BF16)
    ms = in_turns(
        {
            "ours": lambda: cuda_norm_op.rms_norm(x, weight, 1e-5),
            "torch": lambda: F.rms_norm(x, (width,), low, 1e-5),
        },
        rounds,
    )
    return {"kernel": "RMSNorm", "rows": rows, "width": width, "bytes": 4 * x.numel(), "ms": ms}


def swiglu(device: torch.device, rows: int, width: int, rounds: int) -> Row:
    """Measure SwiGLU forward in bf16."""
    gate, up = (torch.randn(rows, width, device=device, dtype=BF16) for _ in range(2))
    ms = in_turns(
        {
            "ours": lambda: cuda_block_op.swiglu(gate, up),
            "torch": lambda: F.silu(gate) * up,
        },
        rounds,
    )
    return {"kernel": "SwiGLU", "rows": rows, "width": width, "bytes": 6 * up.numel(), "ms": ms}


def cross_entropy(device: torch.device, rows: int, vocabulary: int, rounds: int) -> Row:
    """Measure loss and gradient of bf16 logits."""
    logits = torch.randn(rows, vocabulary, device=device, dtype=BF16, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device=device)

    def by_torch() -> object:
        loss = F.cross_entropy(logits.float(), targets, reduction="sum")
        return torch.autograd.grad(loss, logits)

    ms = in_turns(
        {"ours": lambda: cuda.cross_entropy(logits.detach(), targets), "torch": by_torch}, rounds
    )
    n_bytes = 4 * logits.numel()
    return {
        "kernel": "cross-entropy",
        "rows": rows,
        "width": vocabulary,
        "bytes": n_bytes,
        "ms": ms,
    }


def adamw8bit(device: torch.device, n: int, rounds: int) -> Row:
    """Measure one step on n numbers beside bitsandbytes' and torch's fused one in fp32."""
    p, g = (torch.randn(n, device=device) for _ in range(2))
    codes = [torch.zeros(n, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(-(-n // BLOCK), device=device) for _ in range(2)]
    moments = Moments(m=codes[0], v=codes[1], m_scale=scales[0], v_scale=scales[1])
    rates = Rates(beta1=0.9, beta2=0.95, rate=1e-4, inverse2=1.0, eps=1e-8, decay=0.9999)
    candidates: dict[str, Run] = {"ours": lambda: cuda.adamw8bit_step(p, g, moments, rates)}
    with suppress(ImportError, RuntimeError, OSError):
        from bitsandbytes.optim.adamw import AdamW8bit

        candidates["bitsandbytes"] = _stepper(AdamW8bit, p, g)
    candidates["torch fused, fp32 states"] = _stepper(torch.optim.AdamW, p, g, fused=True)
    # read p, g and both bytes of state, write p and both bytes
    ms = in_turns(candidates, rounds, captured=False)
    return {"kernel": "AdamW 8 bit", "n": n, "bytes": (4 + 4 + 2 + 4 + 2) * n, "ms": ms}


def _stepper(kind: Any, p: Tensor, g: Tensor, **options: Any) -> Run:
    """Return the step of an optimizer on a copy of p."""
    own = torch.nn.Parameter(p.clone())
    own.grad = g.clone()
    step: Run = kind([own], lr=1e-4, **options).step
    return step


def _call(function: Callable[..., object], *arguments: Tensor) -> Run:
    """Return a call with fixed arguments."""
    return lambda: function(*arguments)


def all_rows(device: torch.device, *, tiny: bool) -> list[Row]:
    """Measure everything; tiny: sizes at which a test can go through it without a card."""
    rounds = 1 if tiny else 30
    lengths: Sequence[int] = (16,) if tiny else (512, 1024, 2048, 4096, 8192)
    rows: list[Row] = []
    for width in (64,) if tiny else (64, 128):
        for t in lengths:
            sizes = (16, 64) if tiny else (16384, 2048)
            rows += attention(device, t, width, *sizes, rounds)
    for m, n, k in ((1, 64, 64), (9, 64, 64)) if tiny else GEMM:
        copies = 1 if tiny or m > 8 else 4
        rows.append(linear(device, m, n, k, rounds, copies))
    many, width, vocabulary, n = (3, 64, 64, 512) if tiny else (16384, 2048, 16384, 1 << 26)
    rows.append(rms_norm(device, many, width, rounds))
    rows.append(swiglu(device, many, width, rounds))
    rows.append(cross_entropy(device, many // 3, vocabulary, rounds))
    rows.append(adamw8bit(device, n, rounds))
    return rows


GEMM = ((1, 4096, 4096), (1, 16384, 4096), (4, 16384, 4096), (512, 4096, 4096), (4096, 4096, 4096))
"""M rows, N outputs, K inputs; weights of 64 MB do not fit into any card's cache."""
