"""config.json of models as they were released, and how many parameters they have."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GENERIC = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


def sizes(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, positions: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
    }


_GEMMA = {
    "attention_bias": False,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "cache_implementation": "hybrid",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
}
_GEMMA2 = _GEMMA | {
    "model_type": "gemma2",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
_GEMMA3 = _GEMMA | {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
_PHI = {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
_QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "use_sliding_window": False}
# Fields as the models were released, what all of them have left out; the parameters their makers
# state.
RELEASED: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            **sizes(2048, 8192, 16, 32, 8, 128256, 131072),
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        1.236e9,
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            **sizes(576, 1536, 30, 9, 3, 49152, 8192),
            "attention_bias": False,
            "hidden_act": "silu",
            "is_llama_config": True,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        },
        134.5e6,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8, 32000, 32768),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
        },
        7.242e9,
    ),
    "Mistral-7B-v0.3": (
        {
            "model_type": "mistral",
            **sizes(4096, 14336, 32, 32, 8, 32768, 32768),
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        7.248e9,
    ),
    "gemma-2-2b": ({**_GEMMA2, **sizes(2304, 9216, 26, 8, 4, 256000, 8192)}, 2.614e9),
    "gemma-2-9b": (
        {**_GEMMA2, **sizes(3584, 14336, 42, 16, 8, 256000, 8192), "sliding_window_size": 4096},
        9.242e9,
    ),
    "gemma-3-1b": (
        {**_GEMMA3, **sizes(1152, 6912, 26, 4, 1, 262144, 32768), "sliding_window_pattern": 6},
        999.9e6,
    ),
    "gemma-3-270m": (
        {
            **_GEMMA3,
            **sizes(640, 2048, 18, 4, 1, 262144, 32768),
            "_sliding_window_pattern": 6,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
            "use_bidirectional_attention": False,
        },
        268.1e6,
    ),
    "Phi-3-mini-4k": (
        {
            **_PHI,
            **sizes(3072, 8192, 32, 32, 32, 32064, 4096),
            "original_max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "sliding_window": 2047,
        },
        3.821e9,
    ),
    "phi-4": (
        {
            **_PHI,
            **sizes(5120, 17920, 40, 40, 10, 100352, 16384),
            "original_max_position_embeddings": 16384,
            "rope_theta": 250000,
            "sliding_window": None,
        },
        14.66e9,
    ),
    "OLMo-2-7B": (
        {
            "model_type": "olmo2",
            **sizes(4096, 11008, 32, 32, 32, 100352, 4096),
            "attention_bias": False,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
        },
        7.299e9,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            **_QWEN,
            **sizes(896, 4864, 24, 14, 2, 151936, 32768),
            "max_window_layers": 24,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_mrope": False,
        },
        494.0e6,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            **_QWEN,
            **sizes(1024, 3072, 28, 16, 8, 151936, 40960),
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
        596.0e6,
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral",
            **sizes(4096, 14336, 32, 32, 8, 32000, 32768),
            "hidden_act": "silu",
            "num_experts_per_tok": 2,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        46.70e9,
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            **_QWEN,
            **sizes(2048, 6144, 48, 32, 4, 151936, 40960),
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        30.53e9,
    ),
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            **sizes(2048, 1024, 16, 16, 16, 50304, 4096),
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_act": "silu",
            "norm_topk_prob": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
        },
        6.919e9,
    ),
}
# text_config leaves out what is the default of transformers' class
_TEXT = {
    "eos_token_id": 1,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": _TEXT,
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
