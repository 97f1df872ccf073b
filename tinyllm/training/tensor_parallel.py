"""Tensor parallelism: each rank has some heads and some feed-forward columns of every block.

Shoeybi et al. 2019, arXiv:1909.08053, section 3. The first matrices of attention and feed-forward
are cut by outputs, the last by inputs, so that the ranks add up once per half block:

    x -> q k v (my heads) -> attention -> o_proj (its columns for them) -> sum over ranks
    x -> gate up (my columns) -> down_proj (its columns for them)       -> sum over ranks

Between the blocks every rank has the whole residual stream. Embedding, head and the norms of the
stream are small and whole on every rank, and so is the loss: with the same input they get the same
gradient everywhere.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tinyllm.errors import TrainingError
from tinyllm.model.attention import Attention
from tinyllm.model.transformer import Block, Transformer

BY_OUTPUTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
BY_INPUTS = ("self_attn.o_proj", "mlp.down_proj")
STREAM_NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
HEADS_AXIS = 2
"""Of the (B, T, H, K) tensor that a head norm gets."""


def split_blocks(model: Transformer, axis: DeviceMesh) -> None:
    """Leave of every block this rank's part, in place; collective over the axis.

    Raises:
        TrainingError: the model's parts cannot be divided like this.
    """
    _check(model, axis.size())
    for block in model.layers:
        assert isinstance(block, Block)
        parallelize_module(block, axis, _plan(block))
        attention = block.self_attn
        assert isinstance(attention, Attention)  # checked above
        attention.n_heads //= axis.size()
        attention.n_kv_heads //= axis.size()


def _plan(block: Block) -> dict[str, ParallelStyle]:
    """Return how each module of a block is divided."""
    modules = dict(block.named_modules())
    plan: dict[str, ParallelStyle] = {}
    for name in BY_OUTPUTS:
        if name in modules:  # only SwiGLU has a gate
            plan[name] = ColwiseParallel()
    for name in BY_INPUTS:
        plan[name] = RowwiseParallel()
    for name in STREAM_NORMS:
        # q, k and v read one distributed tensor: their gradients are added up in one go
        plan[name] = PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Replicate(), use_local_output=False
        )
    for name in HEAD_NORMS:
        if not isinstance(modules[name], nn.Identity):
            # one weight, but each rank's heads give only their share of its gradient
            plan[name] = SequenceParallel(sequence_dim=HEADS_AXIS, use_local_output=True)
    return plan


def _check(model: Transformer, n_ranks: int) -> None:
    """Refuse a model whose blocks do not divide."""
    config = model.config
    for name, count in (("n_kv_heads", config.n_kv_heads), ("d_ff", config.d_ff)):
        if count % n_ranks:
            raise TrainingError(
                f"TINYLLM_TP: {n_ranks} ranks do not divide model.{name} = {count};"
                " use a divisor of it, or TINYLLM_PARALLEL=fsdp alone"
            )
    for block in model.layers:
        divided = {*BY_OUTPUTS, *BY_INPUTS}
        parts = [module for name, module in block.named_modules() if name in divided]
        plain = all(type(part) is nn.Linear for part in parts)
        if type(block.self_attn) is not Attention or not plain:
            raise TrainingError(
                "TINYLLM_TP: this kind of block is not divided (adapters, other attention);"
                " use TINYLLM_PARALLEL=ddp or fsdp alone"
            )
