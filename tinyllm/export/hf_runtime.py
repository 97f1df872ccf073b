"""An exported Hugging Face folder in `transformers`, offline; only for proving the export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinyllm.tokenizer.chat import Message


class TransformersModel:
    """A model and its tokenizer as a user of transformers gets them."""

    def __init__(self, folder: Path) -> None:
        """Load from a local folder; nothing is looked up elsewhere."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
        self.model.train(False)
        # The comparison runs to its full length: an end of turn must not stop one side of it.
        self.model.generation_config.eos_token_id = None

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every position of one sequence, (T, V)."""
        with torch.inference_mode():
            logits: npt.NDArray[np.float32] = self.model(torch.tensor([ids])).logits[0].numpy()
        return logits

    def greedy(
        self, prompt_ids: Sequence[int], n_tokens: int
    ) -> tuple[list[int], npt.NDArray[np.float32]]:
        """Return `generate`'s tokens and the logits that each was taken from, (n_tokens, V)."""
        prompt = torch.tensor([prompt_ids])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[0, len(prompt_ids) :].tolist(), torch.cat(out.logits).numpy()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; what looks like a special token in it stays text, as ours."""
        encoded = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        ids: list[int] = encoded["input_ids"]
        return ids

    def render(self, chat: Sequence[Message]) -> tuple[str, list[int]]:
        """Return a conversation that waits for an answer, as text and as ids."""
        messages = [{"role": message.role, "content": message.content} for message in chat]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        ids = self.tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        return text, ids


class PeftAdapter(TransformersModel):
    """An adapter on its base, not merged, as a user of peft gets it."""

    def __init__(self, folder: Path) -> None:
        """Load a folder that `write_peft` wrote."""
        from peft import PeftModel

        super().__init__(folder / "base")
        self.model = PeftModel.from_pretrained(self.model, folder)
        self.model.train(False)
        self.model.generation_config.eos_token_id = None
