"""A tiny random model of every family."""

import torch

FAST = {  # what else a family must have, so that the engine decodes it on its fast path
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {"hidden_size": 64},
    "qwen3": {"head_dim": 16},
}


def tiny_configs():
    """A tiny configuration per family."""
    from transformers import (
        Gemma2Config,
        Gemma3TextConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        OPTConfig,
        Phi3Config,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "llama": LlamaConfig(**sizes),
        "mistral": MistralConfig(**sizes, sliding_window=8),
        "qwen2": Qwen2Config(**sizes),
        "qwen3": Qwen3Config(**sizes, head_dim=8),
        "gemma2": Gemma2Config(**sizes, head_dim=8, sliding_window=8),  # every second layer sees 8 tokens
        "gemma3_text": Gemma3TextConfig(**sizes, head_dim=8, sliding_window=8, sliding_window_pattern=2),
        "phi3": Phi3Config(**sizes, pad_token_id=0),
        "mixtral": MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(
            **sizes, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
        ),
        "opt": OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt_neox": GPTNeoXConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt2": GPT2Config(
            vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }


def build(config, seed=0):
    """A random model of a configuration, in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    return model
