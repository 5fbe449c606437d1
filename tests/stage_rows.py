"""One row per stage: options with which it does something, and options with which it does nothing."""

OF_EXPERTS = {"expert_skipping"}  # stages that need experts; these take none:
OF_NO_EXPERTS = {"activations", "topk_training"}

ROWS = {
    "prune": ({"score": "wanda", "sparsity": 0.5}, {"sparsity": 0.0}),
    "channels": ({"sparsity": 0.25}, {"sparsity": 0.0}),
    "permute": ({"where": ["mlp_channels", "values", "residual"]}, {"sweeps": 0}),
    "rescale": ({"group": 8, "steps": 4}, {"where": []}),
    "quantize": ({"method": "gptq", "bits": 4, "group": 8, "symmetric": False}, {"dense": ["*"]}),
    "attention_blocks": (
        {"layout": {"local": {"window": 4}}, "block": 4, "shortest": 8},
        {"layout": {"local": {"window": 4}}, "shortest": 4096},
    ),
    "expert_skipping": ({"sparsity": 0.5}, {"sparsity": 0.0}),
    "cache": ({"policy": "streaming_llm", "keep": 0.25}, {"keep": 1.0}),
    "structure": ({"method": {"minitron": {"multiple_of": 4}}, "sparsity": 0.25}, {"sparsity": 0.0}),
    "activations": ({"sparsity": 0.4}, {"sparsity": 0.0}),
    "topk_training": ({"sparsity": 0.4, "steps": 3, "rate": 0.01}, {"steps": 0}),
    "sparse_training": ({"method": "sr_ste", "steps": 3, "rate": 0.01}, {"method": {"asp": {"kept": 4}}, "steps": 0}),
    "heal": (
        {"method": {"finetune": {"steps": 3, "rate": 0.01}}, "guard": False},
        {"method": {"finetune": {"steps": 0}}},
    ),
    "relufication": ({"steps": 3, "rate": 0.01}, {"steps": 0, "function": "keep"}),
}
