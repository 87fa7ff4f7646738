"""The weights of a layer by name, with the shapes that a configuration gives them."""

from __future__ import annotations

from isthmus.engine.config import DecoderConfig

Shape = tuple[int, ...]


def matrix_shapes(config: DecoderConfig, index: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the packed matrices of layer `index`."""
    d, latent, experts = config.d_model, config.latent, config.experts_of(index)
    if latent is None:
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        found = {"q": (queries, d), "k": (keys, d), "v": (keys, d)}
    else:
        found = {"q_down": (latent.q_rank, d)} if latent.q_rank else {}
        found |= {
            "q": (config.n_heads * (latent.d_plain + latent.d_rotated), latent.q_rank or d),
            "latent": (config.head_dim, d),
            "k_up": (config.n_heads * latent.kv_rank, latent.d_plain),
            "v_up": (config.attention_out, latent.kv_rank),
        }
    found["o"] = (d, config.attention_out)
    widths = {"": config.d_ff}
    if experts:
        widths = {f"experts.{e}.": experts.d_expert for e in range(experts.n_experts)}
        widths |= {"shared.": experts.d_shared} if experts.d_shared else {}
    for prefix, width in widths.items():
        found |= {f"{prefix}gate": (width, d), f"{prefix}up": (width, d), f"{prefix}down": (d, width)}
    return found


def array_shapes(config: DecoderConfig, index: int) -> dict[str, Shape]:
    """Shapes of the float32 arrays of layer `index`: norms, biases, the router; the last norm's and the head's biases
    belong to the last layer."""
    d, last = (config.d_model,), index == config.n_layers - 1
    found: dict[str, Shape] = {"attn_norm": d, "ffn_norm": d}
    if config.layer_norm:
        found |= {"attn_norm_bias": d, "ffn_norm_bias": d} | ({"final_norm_bias": d} if last else {})
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if config.qkv_bias:
        found |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.o_bias:
        found["o_bias"] = d
    if config.head_bias and last:
        found["head_bias"] = (config.vocab_size,)
    if config.qk_norm:
        found |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.qk_norm_whole:
        found |= {"q_norm": (queries,), "k_norm": (keys,)}
    if config.sink_logits:
        found["sink_logits"] = (config.n_heads,)
    if config.latent:
        found["latent_norm"] = (config.latent.kv_rank,)
        found |= {"q_down_norm": (config.latent.q_rank,)} if config.latent.q_rank else {}
    if experts := config.experts_of(index):
        n = experts.n_experts
        found["router"] = (n, config.d_model)
        found |= {"router_bias": (n,)} if experts.router_bias else {}
        found |= {"choice_bias": (n,)} if experts.choice_bias else {}
        found |= {"shared_gate": (1, config.d_model)} if experts.shared_gate else {}
        if experts.bias:
            found |= {"gate_bias": (n, experts.d_expert), "up_bias": (n, experts.d_expert), "down_bias": (n, *d)}
    return found
