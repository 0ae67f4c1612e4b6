"""The shapes of the params of well-known models, computed from the numbers in their published configs.

Arguments are called as in the configs. Names, shapes and order of params are those of the implementations.
"""

from __future__ import annotations

from functools import partial

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet(layers: tuple[int, ...], num_classes: int = 1000) -> Shapes:
    """He et al., arXiv:1512.03385. Config: torchvision's `resnet50`."""

    def conv_and_norm(conv: str, bn: str, out: int, into: int, kernel: int) -> Shapes:
        return {f"{conv}.weight": (out, into, kernel, kernel), **norm(bn, out)}

    shapes, into = conv_and_norm("conv1", "bn1", 64, 3, 7), 64
    for stage, blocks in enumerate(layers):
        width, out = 64 * 2**stage, 256 * 2**stage
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            for number, sizes in enumerate(((width, into, 1), (width, width, 3), (out, width, 1)), start=1):
                shapes |= conv_and_norm(f"{at}.conv{number}", f"{at}.bn{number}", *sizes)
            if block == 0:
                shapes |= conv_and_norm(f"{at}.downsample.0", f"{at}.downsample.1", out, into, 1)
            into = out
    return shapes | linear("fc", num_classes, into)


def vit(embed_dim: int, depth: int, img_size: int = 224, patch_size: int = 16, num_classes: int = 1000) -> Shapes:
    """Dosovitskiy et al., arXiv:2010.11929. Configs: timm's `vit_base_patch16_224`, `vit_large_patch16_224`."""
    shapes: Shapes = {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, (img_size // patch_size) ** 2 + 1, embed_dim),
        "patch_embed.proj.weight": (embed_dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (embed_dim,),
    }
    for at in (f"blocks.{layer}" for layer in range(depth)):
        shapes |= norm(f"{at}.norm1", embed_dim)
        shapes |= linear(f"{at}.attn.qkv", 3 * embed_dim, embed_dim) | linear(f"{at}.attn.proj", embed_dim, embed_dim)
        shapes |= norm(f"{at}.norm2", embed_dim)
        shapes |= linear(f"{at}.mlp.fc1", 4 * embed_dim, embed_dim) | linear(f"{at}.mlp.fc2", embed_dim, 4 * embed_dim)
    return shapes | norm("norm", embed_dim) | linear("head", num_classes, embed_dim)


def bert(
    hidden_size: int,
    num_hidden_layers: int,
    intermediate_size: int,
    vocab_size: int = 30522,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
) -> Shapes:
    """Devlin et al., arXiv:1810.04805, with the pooler and without heads. Configs: google-bert/bert-base-uncased and
    bert-large-uncased on huggingface.co."""
    embeddings = {"word": vocab_size, "position": max_position_embeddings, "token_type": type_vocab_size}
    shapes: Shapes = {f"embeddings.{name}_embeddings.weight": (n, hidden_size) for name, n in embeddings.items()}
    shapes |= norm("embeddings.LayerNorm", hidden_size)
    for at in (f"encoder.layer.{layer}" for layer in range(num_hidden_layers)):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{at}.attention.{name}", hidden_size, hidden_size)
        shapes |= norm(f"{at}.attention.output.LayerNorm", hidden_size)
        shapes |= linear(f"{at}.intermediate.dense", intermediate_size, hidden_size)
        shapes |= linear(f"{at}.output.dense", hidden_size, intermediate_size)
        shapes |= norm(f"{at}.output.LayerNorm", hidden_size)
    return shapes | linear("pooler.dense", hidden_size, hidden_size)


def gpt2(n_embd: int, n_layer: int, n_positions: int = 1024, vocab_size: int = 50257) -> Shapes:
    """Radford et al., "Language Models are Unsupervised Multitask Learners". Configs: openai-community/gpt2,
    gpt2-medium, gpt2-large and gpt2-xl on huggingface.co. The output layer is tied to the embedding."""

    def conv1d(name: str, into: int, out: int) -> Shapes:  # transformers' class; the weight is transposed
        return {f"{name}.weight": (into, out), f"{name}.bias": (out,)}

    shapes: Shapes = {"transformer.wte.weight": (vocab_size, n_embd), "transformer.wpe.weight": (n_positions, n_embd)}
    for at in (f"transformer.h.{layer}" for layer in range(n_layer)):
        shapes |= norm(f"{at}.ln_1", n_embd)
        shapes |= conv1d(f"{at}.attn.c_attn", n_embd, 3 * n_embd) | conv1d(f"{at}.attn.c_proj", n_embd, n_embd)
        shapes |= norm(f"{at}.ln_2", n_embd)
        shapes |= conv1d(f"{at}.mlp.c_fc", n_embd, 4 * n_embd) | conv1d(f"{at}.mlp.c_proj", 4 * n_embd, n_embd)
    return shapes | norm("transformer.ln_f", n_embd)


def llama(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    intermediate_size: int,
    num_key_value_heads: int = 8,
    vocab_size: int = 128256,
    tie_word_embeddings: bool = False,
) -> Shapes:
    """Llama 3, arXiv:2407.21783. Configs: meta-llama/Llama-3.2-1B, 3.2-3B, 3.1-8B and 3.1-70B on huggingface.co. With
    tie_word_embeddings the output layer is tied to the embedding."""
    keys = hidden_size // num_attention_heads * num_key_value_heads
    block: Shapes = {
        "self_attn.q_proj": (hidden_size, hidden_size),
        "self_attn.k_proj": (keys, hidden_size),
        "self_attn.v_proj": (keys, hidden_size),
        "self_attn.o_proj": (hidden_size, hidden_size),
        "mlp.gate_proj": (intermediate_size, hidden_size),
        "mlp.up_proj": (intermediate_size, hidden_size),
        "mlp.down_proj": (hidden_size, intermediate_size),
        "input_layernorm": (hidden_size,),
        "post_attention_layernorm": (hidden_size,),
    }
    shapes: Shapes = {"model.embed_tokens.weight": (vocab_size, hidden_size)}
    for layer in range(num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden_size,)
    return shapes if tie_word_embeddings else {**shapes, "lm_head.weight": (vocab_size, hidden_size)}


MODELS: dict[str, partial[Shapes]] = {
    "resnet50": partial(resnet, layers=(3, 4, 6, 3)),
    "vit-b": partial(vit, embed_dim=768, depth=12),
    "vit-l": partial(vit, embed_dim=1024, depth=24),
    "bert-base": partial(bert, hidden_size=768, num_hidden_layers=12, intermediate_size=3072),
    "bert-large": partial(bert, hidden_size=1024, num_hidden_layers=24, intermediate_size=4096),
    "gpt2-124m": partial(gpt2, n_embd=768, n_layer=12),
    "gpt2-medium": partial(gpt2, n_embd=1024, n_layer=24),
    "gpt2-large": partial(gpt2, n_embd=1280, n_layer=36),
    "gpt2-xl": partial(gpt2, n_embd=1600, n_layer=48),
    "llama-1b": partial(llama, 2048, 16, num_attention_heads=32, intermediate_size=8192, tie_word_embeddings=True),
    "llama-3b": partial(llama, 3072, 28, num_attention_heads=24, intermediate_size=8192, tie_word_embeddings=True),
    "llama-8b": partial(llama, 4096, 32, num_attention_heads=32, intermediate_size=14336),
    "llama-70b": partial(llama, 8192, 80, num_attention_heads=64, intermediate_size=28672),
}
