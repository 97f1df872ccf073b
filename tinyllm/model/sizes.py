"""The sizes of a model: what params.yaml says and what follows from it.

`-S model.d=768` alone gives a valid model: a `null` size follows from the width.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

D_FF_MULTIPLE = 64
"""Feed-forward widths are rounded up to this: whole vector registers in every kernel."""
D_HEAD = 64
"""Head width that `n_heads: null` aims at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParams:
    """The `model` section of params.yaml."""

    d: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int | None
    """Query heads; null: one per 64 of `d`."""
    n_kv_heads: int | None
    """Key and value heads, a divisor of `n_heads`; null: half of `n_heads`, at least 1."""
    d_ff: int | None
    """Feed-forward width; null: 8/3 of `d`, rounded up to a multiple of 64."""
    qk_norm: bool
    """RMSNorm on each query and key head, before RoPE (Qwen3)."""
    tie_embeddings: bool
    """One matrix for the embedding and the head."""
    rope_base: float
    """Base of the rotary frequencies."""
    norm_eps: float
    """Added to the mean square in RMSNorm."""
    max_seq_len: int
    """Longest sequence in tokens that the model serves; training may not use longer ones."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        resolve(self, vocab_size=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Every size of one model, as its config.json holds them."""

    architecture: Literal["transformer"] = "transformer"
    vocab_size: int
    d: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ff: int
    qk_norm: bool
    tie_embeddings: bool
    rope_base: float
    norm_eps: float
    max_seq_len: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def resolve(params: ModelParams, vocab_size: int) -> ModelConfig:
    """Return the sizes with everything that follows from `d` filled in.

    Raises:
        ValueError: sizes that do not fit together; one line per problem, each begins with the
        field.
    """
    n_heads = params.n_heads if params.n_heads is not None else max(1, params.d // D_HEAD)
    n_kv_heads = params.n_kv_heads if params.n_kv_heads is not None else max(1, n_heads // 2)
    d_ff = params.d_ff if params.d_ff is not None else round_up(8 * params.d // 3, D_FF_MULTIPLE)
    counts = {"d": params.d, "n_layers": params.n_layers, "n_heads": n_heads}
    counts |= {"n_kv_heads": n_kv_heads, "d_ff": d_ff, "max_seq_len": params.max_seq_len}
    problems = [f"{name}: must be at least 1, got {n}" for name, n in counts.items() if n < 1]
    if not problems:
        problems = _misfits(params, n_heads, n_kv_heads)
    if problems:
        raise ValueError("\n".join(problems))
    return ModelConfig(
        vocab_size=vocab_size,
        d=params.d,
        n_layers=params.n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=params.d // n_heads,
        d_ff=d_ff,
        qk_norm=params.qk_norm,
        tie_embeddings=params.tie_embeddings,
        rope_base=params.rope_base,
        norm_eps=params.norm_eps,
        max_seq_len=params.max_seq_len,
    )


def _misfits(params: ModelParams, n_heads: int, n_kv_heads: int) -> list[str]:
    """Return what does not divide and what is out of range, one line each."""
    problems = []
    if params.d % n_heads:
        problems.append(f"n_heads: {n_heads} does not divide d = {params.d}; null follows from d")
    elif params.d // n_heads % 2:
        problems.append(
            f"d: head width {params.d // n_heads} is odd, RoPE turns pairs; change d or n_heads"
        )
    if n_heads % n_kv_heads:
        problems.append(
            f"n_kv_heads: {n_kv_heads} does not divide n_heads = {n_heads}; null follows"
        )
    if params.rope_base <= 1:
        problems.append(f"rope_base: must be above 1, got {params.rope_base}")
    if params.norm_eps <= 0:
        problems.append(f"norm_eps: must be above 0, got {params.norm_eps}")
    return problems


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` not below `n`; `round_up(65, 64)` is 128."""
    return -(-n // multiple) * multiple
