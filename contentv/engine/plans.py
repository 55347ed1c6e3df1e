"""Tensor-parallel plans: for each model, which layers are split and how."""

from __future__ import annotations

from contentv.parallel.tensor import TensorPlan

# Attention by whole heads, feed-forwards by hidden channels, in both streams. Modulations, embeddings and the output
# layer are replicated: they are small per token, and splitting them would cost more talk than it saves.
MMDIT_PLAN = TensorPlan(
    column=(
        "*.attn.to_q", "*.attn.to_k", "*.attn.to_v",
        "*.attn.add_q_proj", "*.attn.add_k_proj", "*.attn.add_v_proj",
        "*.ff.net.0.proj", "*.ff_context.net.0.proj",
    ),
    row=("*.attn.to_out.0", "*.attn.to_add_out", "*.ff.net.2", "*.ff_context.net.2"),
    inputs=("*.attn", "*.ff", "*.ff_context"),
    partial=("*.attn.norm_q", "*.attn.norm_k", "*.attn.norm_added_q", "*.attn.norm_added_k"),
    tokenwise=("pos_embed.proj", "context_embedder", "proj_out"),
    modulations=("*.norm1.linear", "*.norm1_context.linear", "norm_out.linear"),
)  # fmt: skip
