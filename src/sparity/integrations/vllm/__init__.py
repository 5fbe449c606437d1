"""vLLM reads Sparity's packed checkpoints: a plug-in of its group `vllm.general_plugins`, found by its entry point.

Importing this imports neither vLLM nor torch: `docs/integrations/vllm.md`.
"""


def register() -> None:
    """Make vLLM know the quantisation method `sparity`; it calls this in each of its processes, maybe several times."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from sparity.checkpoints.packed import METHOD
    from sparity.integrations.vllm.quantization import PackedConfig

    register_quantization_config(METHOD)(PackedConfig)
