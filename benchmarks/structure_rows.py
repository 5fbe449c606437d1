"""The methods of the study of structured pruning, and what to ask each for so that it removes a share of the blocks."""

from dataclasses import dataclass, field

from sparity import registry
from sparity.errors import InvalidInput
from sparity.models.dimensions import DEPTH, EXPERTS, HIDDEN
from sparity.static.structure.whole_ends import WholeEnds

NEAR = 0.05  # a method that comes no nearer to a share has no row there
STEPS, EXACT = 8, 0.002  # of the search for what to ask for
LORA = {"lora": {"steps": 100, "rate": 1e-4}}  # as lora_prune trains
ALIKE = {"keep_first": 0, "keep_last": 0}  # no block stays whole


@dataclass(frozen=True)
class Asked:
    """A method with its options."""

    method: str
    options: dict = field(default_factory=dict)
    weights: bool = False  # it is asked for a share of all blocks' weights, and shapes alone do not say what stays
    backward: bool = False  # it needs gradients

    def given(self, model):
        """The options, with the number of heads where Llama wants a multiple of it."""
        return {k: model.config.num_attention_heads if v == "heads" else v for k, v in self.options.items()}


def llm_pruner(**options):
    """All blocks alike."""
    return Asked("llm_pruner", ALIKE | options, backward=True)


METHODS = {
    "magnitude, channels": Asked("magnitude"),
    "minitron, channels": Asked("minitron"),
    "minitron, query heads": Asked("minitron", {"dimension": "query_heads"}),
    "minitron, KV groups": Asked("minitron", {"dimension": "kv_groups"}),
    "minitron, hidden size": Asked("minitron", {"dimension": "hidden_size", "multiple_of": "heads"}),
    "minitron, depth": Asked("minitron", {"dimension": "depth"}),
    "shortgpt": Asked("shortgpt"),
    "angular": Asked("angular"),
    "sleb": Asked("sleb"),
    "laco": Asked("laco"),
    "linear map, in the MLP": Asked("linear_map"),
    "linear map, in the stream": Asked("linear_map", {"into": "stream"}),
    "flap": Asked("flap", weights=True),
    "flap, blocks alike": Asked("flap", {"structure": "UL-UM"}),
    "2ssp": Asked("two_ssp", weights=True),
    "slicegpt": Asked("slicegpt", {"round_to": "heads"}),
    "slicegpt, one rotation": Asked("slicegpt", {"rotation": "global", "round_to": "heads"}),
    "bonsai": Asked("bonsai", {"masks": 32, "step": 0.15}),
    "llm_pruner": Asked("llm_pruner", backward=True),
    "llm_pruner, blocks alike": llm_pruner(),
    "llm_pruner, second order": llm_pruner(taylor="param_second"),
    "llm_pruner, mixed": llm_pruner(taylor="param_mix"),
    "llm_pruner, vectors": llm_pruner(taylor="vectorize"),
    "llm_surgeon": Asked("llm_surgeon", {"shots": 4}, weights=True, backward=True),
    "sheared": Asked("sheared", backward=True),
    "sheared, masks alone": Asked("sheared", {"rate": 0.0}, backward=True),
    "compresso": Asked("compresso", weights=True, backward=True),
    "compresso, blocks alike": Asked("compresso", {"share": "block"}, backward=True),
    "compresso, masks alone": Asked("compresso", {"rate": 0.0}, weights=True, backward=True),
    "lora_prune": Asked("lora_prune", backward=True),
    "lora_prune, blocks alike": Asked("lora_prune", ALIKE, backward=True),
    "lora_prune, ten times the rate": Asked("lora_prune", ALIKE | {"rate": 1e-3}, backward=True),
}
OF_EXPERTS = {
    "frequency": Asked("frequency"),
    "reap": Asked("reap"),
    "naee": Asked("naee"),
    "ream": Asked("ream"),
    "minitron, experts": Asked("minitron", {"dimension": "experts"}),
    "magnitude, experts": Asked("magnitude", {"dimension": "experts"}),
    "minitron, channels": Asked("minitron"),
    "shortgpt": Asked("shortgpt"),
}
SLOW = {  # row: windows of text, and options, on a large model, and there at 20 % alone
    "sleb": (2, {}),
    "laco": (2, {}),
    "bonsai": (1, {"masks": 32, "step": 0.3}),
    "llm_pruner, blocks alike": (8, {}),
    "llm_pruner, second order": (4, {}),
    "llm_pruner, mixed": (4, {}),
    "llm_pruner, vectors": (4, {}),
    "llm_surgeon": (4, {"shots": 2}),
    "sheared": (64, {}),
    "sheared, masks alone": (64, {}),
    **dict.fromkeys(("compresso", "compresso, blocks alike", "compresso, masks alone"), (64, {})),
    **dict.fromkeys(
        ("lora_prune", "lora_prune, blocks alike", "lora_prune, ten times the rate"),
        (8, {"steps": 40, "every": 4, "batch": 1}),
    ),
}
HEAL = {
    "least_squares": {"method": "least_squares"},
    "distillation": {"method": {"distillation": {"steps": 50, "rate": 1e-3}}},
    "lora": {"method": LORA},
    "lora, unguarded": {"method": LORA, "guard": False},
    "finetune": {"method": {"finetune": {"steps": 200}}, "guard": False},  # it learns the text, whatever the dense says
}
HEALED = (
    *("minitron, channels", "minitron, depth", "linear map, in the MLP", "flap, blocks alike", "2ssp"),
    "llm_pruner, blocks alike",
)
HEALED_LARGE = ("minitron, channels, least_squares", "minitron, depth, least_squares", "2:4", "2:4, eora, rank 32")


def removed_by(subject, asked, sparsity):
    """The share of all blocks' weights that a method takes when asked for `sparsity`, by shapes alone."""
    if asked.weights:
        return sparsity
    model = subject.model
    depth, block = subject.depth, next(iter(subject.blocks()))
    weights = {projection.name: projection.weight.numel() for projection in block.projections}
    total, among = sum(weights.values()), {EXPERTS: [p.name for p in block.projections if p.expert is not None]}
    sizes = {EXPERTS: subject.family.experts(model.config, 0), HIDDEN: int(model.config.hidden_size), DEPTH: depth}
    for dimension in subject.dimensions(block):
        sizes[dimension.name] = dimension.size
        among[dimension.name] = [cut.projection for cut in dimension.cuts]
    options = {name: value for name, value in asked.given(model).items() if value not in ("block", "stream")}
    options |= {"rotation": "global"} if asked.method == "slicegpt" else {}
    method = registry.create("structure.method", asked.method, options)
    cut = len(method.cut_blocks(depth)) / depth if isinstance(method, WholeEnds) else 1.0
    return cut * sum(
        (1 - left / sizes[name]) * sum(weights[each] for each in among.get(name, weights)) / total
        for name, left in method.sizes_on_average(subject.decoder, sparsity).items()
    )


def sparsity_for(subject, asked, share):
    """What to ask a method for so that it takes nearly `share` off all blocks; None where it comes not near enough."""
    low, high, middle, tried = 0.0, 1.0, share, {}
    while len(tried) < STEPS and not any(abs(found - share) < EXACT for found in tried.values()):
        try:
            tried[middle] = removed_by(subject, asked, middle)
        except InvalidInput:  # it would leave nothing, or too little
            tried[middle] = 1.0
        low, high = (middle, high) if tried[middle] < share else (low, middle)
        straight = middle * share / tried[middle] if tried[middle] else 0.0
        middle = straight if low < straight < high else (low + high) / 2
    best = min(tried, key=lambda sparsity: abs(tried[sparsity] - share))
    return best if abs(tried[best] - share) <= NEAR else None
