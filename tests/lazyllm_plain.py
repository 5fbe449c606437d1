"""LazyLLM as it was published, token by token."""

from collections import Counter

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparity.dynamic.cache.functions import policy_of


class Plain:
    """The algorithm for one text in a Llama, one token after another: a KV cache and an Aux Cache for each layer."""

    def __init__(self, model, keep, at, sinks, recent):
        self.model, self.keep, self.length = model.model, keep, 0
        self.head, self.policy = model.lm_head, policy_of({"lazyllm": {"at": at}})
        self.sinks, self.recent = sinks, recent
        self.cached = [{} for _ in self.model.layers]  # place -> key and value
        self.auxiliary = [{} for _ in self.model.layers]  # place -> the state with which the layer would be entered
        self.computed = Counter()

    def call(self, ids):
        """Logits `[words]` after the last token."""
        going = {self.length + index: state for index, state in enumerate(self.model.embed_tokens(ids))}
        self.length += len(ids)
        read, layers = list(range(self.length)), len(self.model.layers)
        for index, block in enumerate(self.model.layers):
            going |= {place: self.auxiliary[index].pop(place) for place in read if place in self.auxiliary[index]}
            going, weights = self._block(index, block, dict(sorted(going.items())), read)
            if index + 1 < layers:
                budget = max(self.policy.budget(self.length, self.keep, index + 1, layers), self.sinks + self.recent)
                first = read[: self.sinks] + read[-self.recent :]
                heeded = sorted((place for place in read if place not in first), key=weights.get, reverse=True)
                read = sorted(first + heeded[: budget - len(first)])
                self.auxiliary[index + 1] |= {place: state for place, state in going.items() if place not in read}
                going = {place: state for place, state in going.items() if place in read}
        return self.head(self.model.norm(going[self.length - 1]))

    def _block(self, index, block, going, read):
        attention, cached = block.self_attn, self.cached[index]
        group = attention.num_key_value_groups
        queries, found = {}, {}
        for place, state in going.items():
            normed, shape = block.input_layernorm(state), (1, -1, 1, attention.head_dim)
            cosine, sine = self.model.rotary_emb(state[None, None], torch.tensor([[place]]))
            query, key = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
            query, key = apply_rotary_pos_emb(query, key, cosine, sine)
            cached[place] = key[0, :, 0], attention.v_proj(normed).view(shape)[0, :, 0]
            queries[place] = query[0, :, 0]
            self.computed[index, place] += 1
        for place, state in going.items():
            seen = [each for each in read if each <= place]
            keys, values = (
                torch.stack([cached[each][part] for each in seen], 1).repeat_interleave(group, 0) for part in (0, 1)
            )
            weights = (keys @ queries[place][..., None] * attention.scaling).softmax(1)  # [heads, tokens, 1]
            state = state + attention.o_proj((weights * values).sum(1).flatten())
            found[place] = state + block.mlp(block.post_attention_layernorm(state))
        return found, dict(zip(seen, weights.mean((0, 2)).tolist(), strict=True))  # of the last token
