"""The model of transformers that should compute what ours does."""

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def transformers_model(ours):
    """Return a dense model of transformers with the weights of ours."""
    c = ours.config
    shared = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.d,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.d_head,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base},
        "max_position_embeddings": c.max_seq_len,
        "tie_word_embeddings": c.tie_embeddings,
    }
    if c.qk_norm:
        theirs = Qwen3ForCausalLM(Qwen3Config(**shared))
    else:
        theirs = LlamaForCausalLM(LlamaConfig(**shared))
    weights = {f"model.{n}": w for n, w in ours.state_dict().items() if n != "lm_head.weight"}
    theirs.load_state_dict({**weights, "lm_head.weight": ours.lm_head.weight})
    return theirs.eval()
