"""The models of the zoo: shapes and schedules, for a CPU, for a GPU, and as toys for tests."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

BUNDLED = Path(__file__).parents[1] / "src/sparity/zoo/llama"
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@dataclass(frozen=True)
class Drill:
    """Early steps, full of sequences that ask for recall: in these the heads that look back form."""

    until: int  # this step
    context: int
    recall: float  # share of the sequences


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
    recall: float = 0.07  # share of the sequences, after the drills
    drills: tuple[Drill, ...] = ()

    def lesson(self, step: int, long: bool) -> tuple[int, int, float]:
        """How many sequences a step has, how many tokens long, and what share of them ask for recall."""
        context, recall = self.context * (self.longer if long else 1), self.recall
        for drill in reversed(self.drills):
            if step < drill.until:
                context, recall = drill.context, drill.recall
        return self.sequences * self.context // context, context, recall

    def asked(self, steps: int) -> float:
        """The share of all sequences of `steps` steps that ask for recall, by tokens."""
        return sum(self.lesson(step, long=False)[2] for step in range(steps)) / steps


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


CPU: dict[str, Any] = {"sequences": 8, "at_once": 4, "context": 256, "longer": 2, "tokens": 24_000_000}
GPU: dict[str, Any] = {"sequences": 128, "at_once": 32, "context": 512, "longer": 4}
TOY: dict[str, Any] = {"sequences": 4, "at_once": 4, "context": 128, "longer": 1, "other_rate": 0.015, "warm_up": 5}
PLANS = {
    "cpu": {
        "llama": Plan(llama(192, 6, 512), 7500, 3000, **CPU),
        # Short contexts first: with learned positions, heads find the token before where segments come again soon.
        "relu": Plan(
            opt(192, 6, 512),
            steps=11_000,
            decay_steps=4400,
            start=BUNDLED,
            recall=0.03,
            drills=(Drill(800, 64, 0.9), Drill(1100, 256, 0.5)),
            **CPU,
        ),
        "moe": Plan(
            mixtral(192, 6, 128),
            steps=7000,
            decay_steps=2800,
            start=BUNDLED,
            matrix_rate=0.01,
            other_rate=0.0015,
            recall=0.03,
            drills=(Drill(500, 256, 0.5),),
            **CPU | {"at_once": 8},
        ),
    },
    "gpu": {
        "llama": Plan(llama(256, 8, 704), 6000, 3000, **GPU),
        "relu": Plan(opt(160, 4, 2048), 5000, 2500, **GPU),
        "moe": Plan(mixtral(192, 4, 112), 5000, 2500, **GPU),
    },
    "toy": {
        "llama": Plan(llama(96, 2, 256), 60, 45, **TOY),
        "relu": Plan(opt(96, 2, 128), 120, 90, **TOY),
        "moe": Plan(mixtral(96, 2, 32), 60, 45, **TOY),
    },
}
