"""Tiny random decoders of public packages other than transformers: what `treespec coverage --foreign` runs.

Nothing here is a dependency: what is not installed is named and left out (the extra `foreign` installs some).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

from .models import VOCAB

_WIDTH, _HEADS, _LAYERS, _CONTEXT = 32, 4, 2, 128


def _x_transformers(**settings: Any) -> nn.Module:
    package = import_module("x_transformers")
    layers = package.Decoder(dim=_WIDTH, depth=_LAYERS, heads=_HEADS, attn_dim_head=8, **settings)
    made: nn.Module = package.TransformerWrapper(num_tokens=VOCAB, max_seq_len=_CONTEXT, attn_layers=layers)
    return made


def _litgpt(**settings: Any) -> nn.Module:
    package = import_module("litgpt")
    sizes = {"n_layer": _LAYERS, "n_embd": _WIDTH, "n_head": _HEADS, "block_size": _CONTEXT}
    words = {"vocab_size": VOCAB, "padded_vocab_size": VOCAB}
    made: nn.Module = package.GPT(package.Config(**sizes, **words, **settings))
    return made


def _torchtune(family: str, **settings: Any) -> nn.Module:
    make = getattr(import_module(f"torchtune.models.{family}"), family)
    sizes = {"num_layers": _LAYERS, "num_heads": _HEADS, "num_kv_heads": 2, "embed_dim": _WIDTH}
    made: nn.Module = make(vocab_size=VOCAB, max_seq_len=_CONTEXT, intermediate_dim=48, **sizes, **settings)
    return made


def _transformer_lens(**settings: Any) -> nn.Module:
    package = import_module("transformer_lens")
    sizes = {"n_layers": _LAYERS, "d_model": _WIDTH, "d_head": 8, "n_ctx": _CONTEXT, "d_vocab": VOCAB}
    config = package.HookedTransformerConfig(**sizes, **{"act_fn": "gelu", "device": "cpu"} | settings)
    made: nn.Module = package.HookedTransformer(config)
    return made


def _mingpt() -> nn.Module:
    gpt = import_module("mingpt.model").GPT
    config = gpt.get_default_config()
    config.model_type, config.vocab_size, config.block_size = None, VOCAB, _CONTEXT
    config.n_layer, config.n_head, config.n_embd = _LAYERS, _HEADS, _WIDTH
    made: nn.Module = gpt(config)
    return made


_LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False}

# Name of the package -> module to import, and its decoders.
PACKAGES: dict[str, tuple[str, dict[str, Callable[[], nn.Module]]]] = {
    "x-transformers": (
        "x_transformers",
        {
            "learned positions": _x_transformers,
            "rotary": lambda: _x_transformers(rotary_pos_emb=True),
            "ALiBi": lambda: _x_transformers(alibi_pos_bias=True, alibi_num_heads=_HEADS),
            "T5 bias": lambda: _x_transformers(rel_pos_bias=True),
            "one key head, GLU, RMS norm": lambda: _x_transformers(
                attn_one_kv_head=True, ff_glu=True, use_rmsnorm=True
            ),
            "memory keys": lambda: _x_transformers(attn_num_mem_kv=4),
            "flash": lambda: _x_transformers(attn_flash=True, rotary_pos_emb=True),
            "normed queries and keys": lambda: _x_transformers(attn_qk_norm=True),
            "talking heads": lambda: _x_transformers(attn_pre_talking_heads=True, attn_post_talking_heads=True),
            "sigmoid for softmax": lambda: _x_transformers(attn_sigmoid=True),
        },
    ),
    "litgpt": (
        "litgpt",
        {
            "GPT-NeoX": _litgpt,
            "Llama": lambda: _litgpt(**_LLAMA, n_query_groups=2, rotary_percentage=1.0, parallel_residual=False),
            "mixture of experts": lambda: _litgpt(
                **_LLAMA | {"mlp_class_name": "LLaMAMoE"}, n_expert=4, n_expert_per_token=2, rotary_percentage=1.0
            ),
        },
    ),
    "torchtune": (
        "torchtune",
        {family: partial(_torchtune, family) for family in ("llama3", "mistral", "qwen2")},
    ),
    "transformer-lens": (
        "transformer_lens",
        {
            "learned positions": _transformer_lens,
            "rotary": lambda: _transformer_lens(positional_embedding_type="rotary", rotary_dim=8),
        },
    ),
    "minGPT": ("mingpt", {"GPT": _mingpt}),
}


def known() -> list[str]:
    """Every decoder, as `package: style`."""
    return [f"{package}: {style}" for package, (_, styles) in PACKAGES.items() for style in styles]


def installed() -> tuple[list[str], list[str]]:
    """(decoders whose package can be imported, packages that cannot)."""
    there = {package: _imports(module) for package, (module, _) in PACKAGES.items()}
    return [name for name in known() if there[name.split(": ")[0]]], [p for p, found in there.items() if not found]


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except (Exception, SystemExit):  # code of somebody's, which may lack what it needs itself
        return False
    return True


def foreign_model(name: str) -> nn.Module:
    """The decoder, with weights that are large enough for every row to be another one."""
    package, _, style = name.partition(": ")
    model = PACKAGES[package][1][style]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.is_floating_point():
            nn.init.normal_(parameter.data, std=0.2)
    return model


def version_of(package: str) -> str:
    """The package's name and version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return package
