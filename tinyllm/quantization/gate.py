"""The promise that quantisation costs next to nothing, and who broke it when it is not kept."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tinyllm.errors import GateError
from tinyllm.model.transformer import Transformer
from tinyllm.quantization.int8 import kinds_of, quantize_model


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeParams:
    """The `quantize` section of params.yaml."""

    weight_bits: int
    """Of the layers in the blocks: 8, or 4 (docs/int4.md); embedding and head have 8."""
    activation_bits: int
    """What inputs of layers are rounded to: 8, or 16, twice the multiplications (docs/int8.md)."""
    max_bpb_increase_share: float
    """Gate: val_bpb may rise by this share of its value before; more fails the stage."""
    seq_len: int
    """Tokens per window when val_bpb is measured; at most the model's max_seq_len are used."""
    calibration_tokens: int
    """Tokens of the training text by which rounding is compensated; 0: round to the nearest."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        problems = []
        if self.weight_bits not in (4, 8):
            problems.append(f"weight_bits: must be 8 or 4, got {self.weight_bits}")
        if self.activation_bits not in (8, 16):
            problems.append(f"activation_bits: must be 8 or 16, got {self.activation_bits}")
        if self.seq_len < 1:
            problems.append(f"seq_len: must be at least 1, got {self.seq_len}")
        if self.calibration_tokens < 0:
            problems.append(
                f"calibration_tokens: must not be negative, got {self.calibration_tokens}"
            )
        if not self.max_bpb_increase_share >= 0:
            problems.append(
                f"max_bpb_increase_share: must not be negative, got {self.max_bpb_increase_share}"
            )
        if problems:
            raise ValueError("\n".join(problems))


def check_gate(
    model: Transformer,
    before_bpb: float,
    after_bpb: float,
    params: QuantizeParams,
    evaluate_bpb: Callable[[Transformer], float],
    sample_BT: Tensor | None = None,
) -> None:
    """Refuse a quantised model whose val_bpb rose too much, naming the layers that cost it.

    Args:
        model: in floating point.
        before_bpb: its val_bpb.
        after_bpb: of the quantised model.
        params: what was asked for and may be lost.
        evaluate_bpb: measures a model; called once per kind of layer, only if the gate is broken.
        sample_BT: what `quantize_model` got.

    Raises:
        GateError: the rise is above the limit, or not a number.
    """
    rise = (after_bpb - before_bpb) / before_bpb
    if rise <= params.max_bpb_increase_share:
        return
    costs = rank_kinds(model, before_bpb, params, evaluate_bpb, sample_BT)
    worst = ", ".join(f"{kind} {share:+.2%}" for kind, share in costs[:3])
    raise GateError(
        f"quantize: val_bpb rises by {rise:.2%}, from {before_bpb:.4f} to {after_bpb:.4f}; allowed"
        f" are {params.max_bpb_increase_share:.2%} (quantize.max_bpb_increase_share); alone these"
        f" cost: {worst}; train longer or raise the limit"
        + (", or set quantize.weight_bits: 8" if params.weight_bits == 4 else "")
    )


def rank_kinds(
    model: Transformer,
    before_bpb: float,
    params: QuantizeParams,
    evaluate_bpb: Callable[[Transformer], float],
    sample_BT: Tensor | None = None,
) -> list[tuple[str, float]]:
    """Return each kind of layer with the rise of val_bpb when it alone is quantised, worst first.

    The rise is a share of `before_bpb`; one that is not a number ranks first.
    """
    costs = []
    for kind in kinds_of(model):
        bits = params.weight_bits, params.activation_bits
        bpb = evaluate_bpb(quantize_model(model, {kind}, sample_BT, *bits))
        costs.append((kind, (bpb - before_bpb) / before_bpb))
    return sorted(costs, key=lambda cost: cost[1] if cost[1] == cost[1] else float("inf"))[::-1]
