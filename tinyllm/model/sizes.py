"""The sizes of a model: what params.yaml says and what follows from it.

`-S model.d=768` alone gives a valid model, and so does `-S model.attention=mla`: a `null` size
follows from the width.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

D_FF_MULTIPLE = 64
"""Feed-forward widths are rounded up to this: whole vector registers in every kernel."""
D_HEAD = 64
"""Head width that `n_heads: null` aims at."""

Attention = Literal["gqa", "mla"]
FeedForward = Literal["swiglu", "gelu", "relu2"]
Norm = Literal["rmsnorm", "layernorm"]
Positions = Literal["rope", "learned"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaParams:
    """Widths of multi-head latent attention, DeepSeek-V3: arXiv:2412.19437, section 2.1.1."""

    q_rank: int | None
    """Latent of the queries; null: none, one full matrix makes them."""
    kv_rank: int | None
    """Latent that keys and values are made from, the cached one; null: a quarter of `d`."""
    d_nope: int | None
    """Of each query and key head, without a position; null: `d / n_heads`."""
    d_rope: int | None
    """Of the rotated part of each query head and of the one shared key; null: half of `d_nope`."""
    d_v: int | None
    """Of each value head; null: `d / n_heads`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MlaSizes:
    """`MlaParams` with everything filled in."""

    q_rank: int | None
    kv_rank: int
    d_nope: int
    d_rope: int
    d_v: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary angles shrink, so that a longer context turns no further than the trained one."""

    kind: Literal["none", "linear", "yarn"]
    """linear: every angle; yarn: slow ones only, Peng et al. 2023, arXiv:2309.00071."""
    factor: float
    """Longer by this; 1.0 with none."""
    original_len: int | None
    """Context that was trained before, in tokens; null: `max_seq_len / factor`."""

    def __post_init__(self) -> None:
        """Refuse a factor without effect."""
        if (self.kind == "none") != (self.factor == 1.0) or self.factor < 1:
            raise ValueError(
                f"factor: {self.factor} with kind {self.kind}; none takes 1.0, linear and yarn more"
            )
        if self.original_len is not None and self.original_len < 1:
            raise ValueError(f"original_len: must be at least 1, got {self.original_len}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParams:
    """The `model` section of params.yaml."""

    d: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    attention: Attention
    """gqa: heads share keys and values; mla: all of them are made from one small latent."""
    n_heads: int | None
    """Query heads; null: one per 64 of `d`."""
    n_kv_heads: int | None
    """gqa: key and value heads, a divisor of `n_heads`, 1 for multi-query; null: half of `n_heads`
    or the next divisor below. mla has as many as queries."""
    qk_norm: bool
    """gqa: RMSNorm on each query and key head, before RoPE (Qwen3). mla norms its latents."""
    mla: MlaParams
    """Widths of mla; unused by gqa."""
    window: int | None
    """Positions that a query of a windowed block sees, its own among them; null: all."""
    window_layers: tuple[int, ...] | None
    """Blocks with a window, counted from 0; null: every other one, beginning with block 0."""
    ffn: FeedForward
    """Activation of the feed-forward part; swiglu has a gate and so a third matrix."""
    d_ff: int | None
    """Feed-forward width; null: 8/3 of `d` for swiglu, else 4 `d`, rounded up to 64."""
    norm: Norm
    """rmsnorm: no mean is subtracted; layernorm: as in GPT-2."""
    norm_eps: float
    """Added to the mean square, or to the variance."""
    bias: bool
    """A bias in linear layers and LayerNorm, as in GPT-2; gqa only."""
    dropout: float
    """Share of the embeddings and of what a block adds that is dropped while training; 0: none."""
    tie_embeddings: bool
    """One matrix for the embedding and the head."""
    positions: Positions
    """rope: rotated queries and keys; learned: a vector per position, as in GPT-2; gqa only."""
    rope_base: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling
    """For contexts longer than those trained on."""
    max_seq_len: int
    """Longest sequence in tokens that the model serves; training may not use longer ones."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes."""
        resolve(self, vocab_size=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Every size of one model, as its config.json holds them.

    What has a default here is left out of the file where it has that value: folders from before the
    field existed mean the same.
    """

    architecture: Literal["transformer"] = "transformer"
    vocab_size: int
    d: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    """Width of a query and key head."""
    d_ff: int
    qk_norm: bool
    tie_embeddings: bool
    rope_base: float
    norm_eps: float
    max_seq_len: int
    mla: MlaSizes | None = None
    """None: gqa."""
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    ffn: FeedForward = "swiglu"
    norm: Norm = "rmsnorm"
    bias: bool = False
    dropout: float = 0.0
    positions: Positions = "rope"
    rope_scaling: RopeScaling = RopeScaling(kind="none", factor=1.0, original_len=None)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        plain = asdict(self)
        plain["window_layers"] = list(self.window_layers)
        usual = {f.name for f in fields(self)[1:] if getattr(self, f.name) == f.default}
        return {name: value for name, value in plain.items() if name not in usual}

    @property
    def d_rope(self) -> int:
        """How many channels of a head are rotated."""
        return self.d_head if self.mla is None else self.mla.d_rope

    @property
    def cached(self) -> tuple[int, int, int]:
        """What a block caches per position: heads, width of their keys, width of their values.

        Latent attention has one head: the rotated shared key, and the latent in place of a value.
        """
        if self.mla is None:
            return self.n_kv_heads, self.d_head, self.d_head
        return 1, self.mla.d_rope, self.mla.kv_rank


def resolve(params: ModelParams, vocab_size: int) -> ModelConfig:
    """Return the sizes with everything that follows from `d` filled in.

    Raises:
        ValueError: sizes that do not fit together; one line per problem, each begins with the
        field.
    """
    latent = params.attention == "mla"
    n_heads = params.n_heads if params.n_heads is not None else max(1, params.d // D_HEAD)
    n_kv_heads = params.n_kv_heads if params.n_kv_heads is not None else _half(n_heads)
    share = 8 * params.d // 3 if params.ffn == "swiglu" else 4 * params.d
    d_ff = params.d_ff if params.d_ff is not None else round_up(share, D_FF_MULTIPLE)
    counts = {"d": params.d, "n_layers": params.n_layers, "n_heads": n_heads}
    counts |= {"n_kv_heads": n_kv_heads, "d_ff": d_ff, "max_seq_len": params.max_seq_len}
    counts |= {f"mla.{name}": n for name, n in asdict(params.mla).items() if n is not None}
    counts |= {} if params.window is None else {"window": params.window}
    problems = [f"{name}: must be at least 1, got {n}" for name, n in counts.items() if n < 1]
    if not problems:
        problems = [*_misfits(params, n_heads, n_kv_heads), *_conflicts(params)]
    if problems:
        raise ValueError("\n".join(problems))
    mla = _mla_sizes(params, n_heads) if latent else None
    every_other = tuple(range(0, params.n_layers, 2)) if params.window is not None else ()
    return ModelConfig(
        vocab_size=vocab_size,
        d=params.d,
        n_layers=params.n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads if latent else n_kv_heads,
        d_head=params.d // n_heads if mla is None else mla.d_nope + mla.d_rope,
        d_ff=d_ff,
        qk_norm=params.qk_norm and not latent,
        tie_embeddings=params.tie_embeddings,
        rope_base=params.rope_base,
        norm_eps=params.norm_eps,
        max_seq_len=params.max_seq_len,
        mla=mla,
        window=params.window,
        window_layers=every_other if params.window_layers is None else params.window_layers,
        ffn=params.ffn,
        norm=params.norm,
        bias=params.bias,
        dropout=params.dropout,
        positions=params.positions,
        rope_scaling=_rope_scaling(params),
    )


def _half(n_heads: int) -> int:
    """Return the largest divisor up to a half: `_half(12)` is 6, `_half(5)` is 1."""
    return next(n for n in range(max(1, n_heads // 2), 0, -1) if max(1, n_heads) % n == 0)


def _mla_sizes(params: ModelParams, n_heads: int) -> MlaSizes:
    """Return the widths of latent attention; a quarter of d is DeepSeek-V2-Lite's kv_rank."""
    given, d_head = params.mla, params.d // n_heads
    d_nope = given.d_nope or d_head
    return MlaSizes(
        q_rank=given.q_rank,
        kv_rank=given.kv_rank or round_up(params.d // 4, 16),
        d_nope=d_nope,
        d_rope=given.d_rope or round_up(d_nope // 2, 2),
        d_v=given.d_v or d_head,
    )


def _rope_scaling(params: ModelParams) -> RopeScaling:
    """Return the scaling with its original length."""
    given = params.rope_scaling
    if given.kind == "none":
        return RopeScaling(kind="none", factor=1.0, original_len=None)
    original = given.original_len or max(1, round(params.max_seq_len / given.factor))
    return RopeScaling(kind=given.kind, factor=given.factor, original_len=original)


def _misfits(params: ModelParams, n_heads: int, n_kv_heads: int) -> list[str]:
    """Return what does not divide and what is out of range, one line each."""
    problems = []
    d_head = params.d // n_heads
    if params.d % n_heads:
        problems.append(f"n_heads: {n_heads} does not divide d = {params.d}; null follows from d")
    elif params.attention == "gqa" and params.positions == "rope" and d_head % 2:
        problems.append(f"d: head width {d_head} is odd, RoPE turns pairs; change d or n_heads")
    if n_heads % n_kv_heads:
        problems.append(
            f"n_kv_heads: {n_kv_heads} does not divide n_heads = {n_heads}; null follows"
        )
    if (params.mla.d_rope or 0) % 2:
        problems.append(f"mla.d_rope: {params.mla.d_rope} is odd, RoPE turns pairs")
    beyond = [i for i in params.window_layers or () if not 0 <= i < params.n_layers]
    if beyond:
        problems.append(f"window_layers: there is no block {beyond[0]} of {params.n_layers}")
    if params.rope_base <= 1:
        problems.append(f"rope_base: must be above 1, got {params.rope_base}")
    if params.norm_eps <= 0:
        problems.append(f"norm_eps: must be above 0, got {params.norm_eps}")
    if not 0 <= params.dropout < 1:
        problems.append(f"dropout: must be at least 0 and below 1, got {params.dropout}")
    return problems


def _conflicts(params: ModelParams) -> list[str]:
    """Return what cannot be together, or has no effect together, one line each."""
    problems = []
    if params.attention == "mla" and params.positions != "rope":
        problems.append(f"positions: mla needs rope, got {params.positions}")
    if params.attention == "mla" and params.bias:
        problems.append("bias: mla has none; set it to false or attention to gqa")
    if params.positions == "learned" and params.rope_scaling.kind != "none":
        problems.append("rope_scaling.kind: learned positions do not rotate; set it to none")
    if params.window is None and params.window_layers:
        problems.append("window_layers: without effect while window is null")
    return problems


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` not below `n`; `round_up(65, 64)` is 128."""
    return -(-n // multiple) * multiple
