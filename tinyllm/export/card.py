"""The model card: what an exported model is, where it comes from, how to load it."""

from collections.abc import Mapping

from tinyllm.artifact import Manifest
from tinyllm.model.sizes import ModelConfig

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [tinyllm]
---

# A tiny language model

{n_parameters:,} parameters, trained from raw text by the tinyllm pipeline: pretraining, supervised
fine-tuning on dialogues, LoRA, merged.

| size | value |
|---|---|
{sizes}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("hf")
model = AutoModelForCausalLM.from_pretrained("hf")
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

`onnx/model.onnx`, beside this folder, is the same model with its key-value cache as inputs and
outputs.
{facts}
## Lineage

SHA-256 of everything this model was made from.

| artifact | digest |
|---|---|
{lineage}

## Limits

A model of this size repeats the style of its corpus. It knows no facts and must not be relied on.
"""


def model_card(
    config: ModelConfig, n_parameters: int, manifest: Manifest, facts: Mapping[str, float]
) -> str:
    """Return the text of README.md.

    Args:
        config: the sizes.
        n_parameters: a tied matrix counted once.
        manifest: of the model directory.
        facts: measured numbers by name; may be empty.
    """
    rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(facts.items()))
    lineage = {**manifest.lineage, manifest.kind: manifest.digest}
    return _CARD.format(
        n_parameters=n_parameters,
        sizes=_table(config.to_json()),
        facts=f"\n## Measured\n\n| name | value |\n|---|---|\n{rows}\n" if facts else "",
        lineage=_table({name: f"`{digest}`" for name, digest in sorted(lineage.items())}),
    )


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
