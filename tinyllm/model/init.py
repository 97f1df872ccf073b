"""How weights begin.

| weight                         | begins as                                        |
|--------------------------------|--------------------------------------------------|
| embedding, tied head           | normal, 0.02                                     |
| untied head                    | zero: the first prediction is uniform            |
| matrices that read the stream  | normal, 1 / sqrt(fan-in)                         |
| o_proj, down_proj              | normal, 1 / sqrt(fan-in) / sqrt(2 n_layers)      |
| norms                          | one                                              |
| learned positions              | normal, 0.02                                     |
| biases                         | zero                                             |

The factors of o_proj and down_proj keep the residual stream's variance independent of depth
(GPT-2 report, section 2.3).
"""

import torch
from torch import nn

from tinyllm.model.sizes import ModelConfig
from tinyllm.model.transformer import Transformer

EMBEDDING_STD = 0.02


def build_model(config: ModelConfig, seed: int) -> Transformer:
    """Return a new model in fp32 on the CPU; the same seed gives the same weights."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.embed_tokens.weight.normal_(0, EMBEDDING_STD, generator=generator)
        if model.embed_positions is not None:
            model.embed_positions.weight.normal_(0, EMBEDDING_STD, generator=generator)
        if not config.tie_embeddings:
            model.lm_head.weight.zero_()
        for name, module in model.layers.named_modules():
            if isinstance(module, nn.Linear):
                writes_stream = name.endswith(("o_proj", "down_proj"))
                std = module.in_features**-0.5 / (
                    (2 * config.n_layers) ** 0.5 if writes_stream else 1
                )
                module.weight.normal_(0, std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
    return model


def count_parameters(model: nn.Module) -> int:
    """Return the number of distinct parameters; a tied matrix counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
