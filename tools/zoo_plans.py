"""The models of the zoo: shapes and schedules, for a CPU, for a GPU, and as toys for tests."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

BUNDLED = Path(__file__).parents[1] / "src/sparity/zoo/llama"
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True)
class Plan:
    """How a model of the zoo is made: its shape, and what it is trained on."""

    config: PretrainedConfig = field(repr=False)
    steps: int
    decay_steps: int
    sequences: int  # of a step
    at_once: int  # sequences of one forward pass
    context: int
    longer: int  # times as long are some contexts, of as many tokens a step
    tokens: int | None = None  # of the corpus that are tokenised; None: all
    start: Path | None = None  # a trained Llama that the model begins from
    matrix_rate: float = 0.02
    other_rate: float = 0.003
    warm_up: int = 50  # steps


def llama(hidden: int, layers: int, inner: int) -> PretrainedConfig:
    """Llama: SwiGLU, RMSNorm, rotary positions, a key-value head for two query heads of size 32."""
    heads = hidden // 32
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        **IDS,
    )


def opt(hidden: int, layers: int, context: int) -> PretrainedConfig:
    """OPT: learned positions, LayerNorm, ReLU."""
    return OPTConfig(
        vocab_size=8192,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        ffn_dim=4 * hidden,
        num_attention_heads=hidden // 32,
        max_position_embeddings=context,
        dropout=0.0,
        tie_word_embeddings=True,
        **IDS,
    )


def mixtral(hidden: int, layers: int, inner: int) -> PretrainedConfig:
    """Mixtral: eight experts of which two work on a token."""
    return MixtralConfig(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.05,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        **IDS,
    )


PLANS = {
    "cpu": {
        "llama": Plan(llama(192, 6, 512), 7500, 3000, 8, 4, 256, 2, tokens=24_000_000),
        "relu": Plan(opt(192, 6, 512), 1661, 450, 8, 4, 256, 2, 24_000_000, BUNDLED),
        "moe": Plan(mixtral(192, 6, 128), 652, 260, 8, 8, 256, 2, 24_000_000, BUNDLED, 0.005, 0.001),
    },
    "gpu": {
        "llama": Plan(llama(256, 8, 704), 6000, 3000, 128, 32, 512, 4),
        "relu": Plan(opt(192, 6, 2048), 5000, 2500, 128, 32, 512, 4),
        "moe": Plan(mixtral(160, 5, 320), 5000, 2500, 128, 32, 512, 4),
    },
    "toy": {
        "llama": Plan(llama(96, 2, 256), 60, 45, 4, 4, 128, 1, other_rate=0.015, warm_up=5),
        "relu": Plan(opt(96, 2, 128), 120, 90, 4, 4, 128, 1, other_rate=0.015, warm_up=5),
        "moe": Plan(mixtral(96, 2, 32), 60, 45, 4, 4, 128, 1, other_rate=0.015, warm_up=5),
    },
}
