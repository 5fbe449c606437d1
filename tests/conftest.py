"""Models and texts that tests share."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

ASSETS = Path(os.environ.get("SPARITY_TEST_ASSETS", Path(__file__).parents[2] / "shared"))


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


@pytest.fixture(scope="session")
def family_models():
    """A tiny random model per family, by model type."""
    return {name: build(config) for name, config in tiny_configs().items()}


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory, family_models):
    """A tiny random Llama, saved."""
    folder = tmp_path_factory.mktemp("tiny-llama") / "model"
    family_models["llama"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory, family_models):
    """A tiny random GPT-2, saved."""
    folder = tmp_path_factory.mktemp("tiny-gpt2") / "model"
    family_models["gpt2"].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def token_files(tmp_path_factory):
    """Random token ids below 97: `calibration` [6, 24] and `text` [400] as .npy files."""
    folder = tmp_path_factory.mktemp("tokens")
    drawn = np.random.default_rng(0)
    np.save(folder / "calibration.npy", drawn.integers(0, 97, (6, 24)))
    np.save(folder / "text.npy", drawn.integers(0, 97, 400))
    return {"calibration": str(folder / "calibration.npy"), "text": str(folder / "text.npy")}


@pytest.fixture(scope="session")
def assets():
    """The folder of real models and texts."""
    if not ASSETS.is_dir():
        pytest.skip(f"no test assets: {ASSETS} does not exist (set SPARITY_TEST_ASSETS)")
    return ASSETS


@pytest.fixture(scope="session")
def stories_model(assets):
    """A small real Llama (969,216 parameters, context 256)."""
    return assets / "models" / "babyllama-byte361-960K"


@pytest.fixture(scope="session")
def stories(assets):
    """Stories as lists of documents: `calibration` and `held_out`."""
    folder = assets / "data" / "tinystories-sample"
    return {
        "calibration": json.loads((folder / "calib.json").read_text()),
        "held_out": json.loads((folder / "eval.json").read_text()),
    }
