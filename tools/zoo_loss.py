"""What a model of the zoo is trained to lessen."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

ROWS = 256  # of logits at a time


class HeadLoss(torch.autograd.Function):
    """Mean loss of the next tokens, from hidden states and the head's weight, without ever holding all logits.

    Gradients are made with the loss, some rows at a time: logits in float32 would leave a CPU's cache and fill a GPU.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """`hidden` [tokens, size], `weight` [words, size], `targets` [tokens] -> loss []."""
        matrix, loss = weight.bfloat16(), torch.zeros((), device=weight.device)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), ROWS):
            rows, words = hidden[start : start + ROWS].bfloat16(), targets[start : start + ROWS, None]
            logits = (rows @ matrix.T).float()  # [rows, words]
            total = logits.logsumexp(-1, keepdim=True)
            loss += (total - logits.gather(1, words)).sum()
            slope = logits.sub_(total).exp_()
            slope.scatter_add_(1, words, torch.full_like(total, -1.0))
            slope = slope.bfloat16()
            hidden_gradient[start : start + ROWS] = slope @ matrix
            weight_gradient += slope.T @ rows
        ctx.save_for_backward(hidden_gradient / len(hidden), weight_gradient / len(hidden))
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        """Hand on the gradients that the loss was made with."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return slope * hidden_gradient, slope * weight_gradient, None


def loss_of(model: PreTrainedModel, trunk: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of every token but the first, [sequences, tokens]; for experts, with what keeps them in balance."""
    experts = model.config.model_type == "mixtral"
    out = trunk(input_ids=ids, **({"output_router_logits": True} if experts else {}), use_cache=False)
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)  # [tokens, size]
    loss = HeadLoss.apply(hidden, model.get_output_embeddings().weight, ids[:, 1:].flatten())
    if experts:
        # Layer by layer: over all layers at once, as transformers has it, an expert may idle if its namesakes work.
        sizes = model.config.num_local_experts, model.config.num_experts_per_tok
        balance = sum(load_balancing_loss_func((logits,), *sizes) for logits in out.router_logits)
        loss = loss + model.config.router_aux_loss_coef * balance / len(out.router_logits)
    return loss
