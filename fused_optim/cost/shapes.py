"""Shapes of the params of well-known models, by name, made from the dimensions of their architectures.

Names are those of the implementation that people mostly load, order too, so that groups can be told by them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet50() -> Shapes:
    """He et al., arXiv:1512.03385, in torchvision's form."""

    def conv_and_norm(conv: str, bn: str, out: int, into: int, kernel: int) -> Shapes:
        return {f"{conv}.weight": (out, into, kernel, kernel), **norm(bn, out)}

    shapes = conv_and_norm("conv1", "bn1", 64, 3, 7)
    into = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            at, out = f"layer{stage}.{block}", 4 * width
            shapes |= conv_and_norm(f"{at}.conv1", f"{at}.bn1", width, into, 1)
            shapes |= conv_and_norm(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            shapes |= conv_and_norm(f"{at}.conv3", f"{at}.bn3", out, width, 1)
            if block == 0:
                shapes |= conv_and_norm(f"{at}.downsample.0", f"{at}.downsample.1", out, into, 1)
            into = out
    return {**shapes, **linear("fc", 1000, into)}


def pre_norm_block(at: str, width: int, names: tuple[str, ...]) -> Shapes:
    """Attention and a four times wider MLP, all with biases: 12 tensors. names: of the norm before attention, its
    joint projection to queries, keys and values, its output; of the norm before the MLP, its two layers."""
    norm_1, attention, output, norm_2, wide, narrow = (f"{at}.{name}" for name in names)
    return {
        **norm(norm_1, width),
        **linear(attention, 3 * width, width),
        **linear(output, width, width),
        **norm(norm_2, width),
        **linear(wide, 4 * width, width),
        **linear(narrow, width, 4 * width),
    }


def gpt2(width: int, layers: int) -> Shapes:
    """Radford et al., "Language Models are Unsupervised Multitask Learners". The output layer is the embedding."""
    names = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    shapes: Shapes = {"transformer.wte.weight": (50257, width), "transformer.wpe.weight": (1024, width)}
    for layer in range(layers):
        shapes |= pre_norm_block(f"transformer.h.{layer}", width, names)
    return {**shapes, **norm("transformer.ln_f", width)}


def vit(width: int, layers: int) -> Shapes:
    """ViT with patches of 16 in images of 224 pixels, 1,000 classes: Dosovitskiy et al., arXiv:2010.11929."""
    names = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    patches = (224 // 16) ** 2
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    for layer in range(layers):
        shapes |= pre_norm_block(f"blocks.{layer}", width, names)
    return {**shapes, **norm("norm", width), **linear("head", 1000, width)}


def bert(width: int, layers: int) -> Shapes:
    """The uncased model with its pooler and without the heads of its pretraining: Devlin et al., arXiv:1810.04805."""
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (30522, width),
        "embeddings.position_embeddings.weight": (512, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        **norm("embeddings.LayerNorm", width),
    }
    for layer in range(layers):
        at = f"encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{at}.attention.{name}", width, width)
        shapes |= norm(f"{at}.attention.output.LayerNorm", width)
        shapes |= linear(f"{at}.intermediate.dense", 4 * width, width)
        shapes |= linear(f"{at}.output.dense", width, 4 * width)
        shapes |= norm(f"{at}.output.LayerNorm", width)
    return {**shapes, **linear("pooler.dense", width, width)}


def llama(width: int, layers: int, keys: int, hidden: int, tied: bool) -> Shapes:
    """Llama 3, arXiv:2407.21783. keys: width of all keys together, and of all values; hidden: of the MLP; tied: the
    output layer is the embedding."""
    shapes: Shapes = {"model.embed_tokens.weight": (128256, width)}
    for layer in range(layers):
        block: Shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    return shapes if tied else {**shapes, "lm_head.weight": (128256, width)}


MODELS: dict[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "vit-b": partial(vit, width=768, layers=12),
    "vit-l": partial(vit, width=1024, layers=24),
    "bert-base": partial(bert, width=768, layers=12),
    "bert-large": partial(bert, width=1024, layers=24),
    "gpt2-124m": partial(gpt2, width=768, layers=12),
    "gpt2-medium": partial(gpt2, width=1024, layers=24),
    "gpt2-large": partial(gpt2, width=1280, layers=36),
    "gpt2-xl": partial(gpt2, width=1600, layers=48),
    "llama-1b": partial(llama, width=2048, layers=16, keys=512, hidden=8192, tied=True),
    "llama-3b": partial(llama, width=3072, layers=28, keys=1024, hidden=8192, tied=True),
    "llama-8b": partial(llama, width=4096, layers=32, keys=1024, hidden=14336, tied=False),
    "llama-70b": partial(llama, width=8192, layers=80, keys=1024, hidden=28672, tied=False),
}
