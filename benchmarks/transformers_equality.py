"""The largest difference of any logit to `transformers`, weights copied both ways, in fp32.

    python benchmarks/transformers_equality.py

Random models of the preset `small`'s width with no neutral norm or bias, two rows of 256 tokens.
"ours there": our weights under their names. "theirs here": their folder, read by `import_hf`. The
floor is what fp32 rounding alone does to theirs: its distance to itself in fp64. The last line is
one JSON object.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tinyllm.export.families import CLASSES, Family, family_of, hf_config
from tinyllm.export.hf_import import import_hf
from tinyllm.export.hf_weights import to_hf
from tinyllm.model.directory import load_model
from tinyllm.model.init import build_model
from tinyllm.model.sizes import ModelConfig, ModelParams, resolve
from tinyllm.model.transformer import Transformer
from tinyllm.params import build_params, read_yaml

PARAMS = Path(__file__).parent.parent / "params.yaml"
VOCAB_SIZE, TOKENS = 4096, 256
GPT2 = {"norm": "layernorm", "ffn": "gelu", "bias": True, "positions": "learned"}
KINDS: dict[Family, dict[str, Any]] = {
    "llama": {"qk_norm": False},
    "qwen3": {},
    "deepseek_v3": {"attention": "mla"},
    "gpt2": {**GPT2, "qk_norm": False, "n_kv_heads": 4},
}


def build_config(family: Family, n_layers: int) -> ModelConfig:
    """Return the sizes of a model of one class."""
    document = {**read_yaml(PARAMS)["model"], "n_layers": n_layers, **KINDS[family]}
    config = resolve(build_params(ModelParams, document, str(PARAMS)), VOCAB_SIZE)
    assert family_of(config) == family
    return config


@torch.no_grad()
def roughen(model: torch.nn.Module) -> Any:
    """Move every parameter off its initial value, in place; return the model in evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


@torch.no_grad()
def measure(family: Family, n_layers: int) -> dict[str, float]:
    """Return the differences of one class."""
    ids = torch.randint(0, VOCAB_SIZE, (2, TOKENS), generator=torch.Generator().manual_seed(2))
    config = build_config(family, n_layers)
    ours: Transformer = roughen(build_model(config, seed=0))
    content = hf_config(config)
    build = getattr(transformers, CLASSES[family])
    theirs = build(transformers.AutoConfig.for_model(**content)).eval()
    theirs.load_state_dict(to_hf(ours.state_dict(), config, family))
    there = theirs(ids).logits
    figures = {"ours_there": (ours(ids) - there).abs().max().item()}
    roughen(theirs)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "hf")
        import_hf(Path(folder) / "hf", Path(folder) / "ours")
        here = load_model(Path(folder) / "ours")(ids)
    fp32 = theirs(ids).logits
    figures["theirs_here"] = (here - fp32).abs().max().item()
    figures["floor"] = (theirs.double()(ids).logits - fp32).abs().max().item()
    figures["largest_logit"] = fp32.abs().max().item()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="2 layers")
    options = parser.parse_args()
    rows = {family: measure(family, 2 if options.quick else options.layers) for family in KINDS}
    print(
        "| class | ours there | theirs here | fp32 itself | largest logit |\n|---|---|---|---|---|"
    )
    for family, row in rows.items():
        print(
            f"| {CLASSES[family]} | {row['ours_there']:.1e} | {row['theirs_here']:.1e}"
            f" | {row['floor']:.1e} | {row['largest_logit']:.1f} |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
