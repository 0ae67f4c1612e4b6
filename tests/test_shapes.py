"""The shapes of well-known models compared with the original implementations, built on the meta device from the same
config numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trainers import require

from fused_optim.cost import shapes
from fused_optim.cost.shapes import MODELS

pytestmark = pytest.mark.trainers

TIMM = {768: "vit_base_patch16_224", 1024: "vit_large_patch16_224"}


def of_transformers(kind: str, config: str) -> Callable[[dict[str, Any]], nn.Module]:
    def build(numbers: dict[str, Any]) -> nn.Module:
        transformers = require("transformers")
        return getattr(transformers, kind)(getattr(transformers, config)(**numbers))

    return build


BUILDERS: dict[Any, Callable[[dict[str, Any]], nn.Module]] = {
    shapes.resnet: lambda numbers: require("torchvision").models.resnet50(num_classes=numbers["num_classes"]),
    shapes.vit: lambda numbers: require("timm").create_model(TIMM[numbers["embed_dim"]], **numbers),
    shapes.bert: of_transformers("BertModel", "BertConfig"),
    shapes.gpt2: of_transformers("GPT2LMHeadModel", "GPT2Config"),
    shapes.llama: of_transformers("LlamaForCausalLM", "LlamaConfig"),
}
HEADS = {shapes.bert: ("hidden_size", "num_attention_heads"), shapes.gpt2: ("n_embd", "n_head")}  # heads of width 64


@pytest.mark.filterwarnings("ignore::UserWarning")  # the libraries initialize tensors on meta
@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_the_implementation(name: str) -> None:
    layout, given = MODELS[name].func, MODELS[name]
    bound = inspect.signature(layout).bind(*given.args, **given.keywords)
    bound.apply_defaults()
    numbers = bound.arguments
    if layout in HEADS:
        width, heads = HEADS[layout]
        numbers = {**numbers, heads: numbers[width] // 64}
    with torch.device("meta"):
        model = BUILDERS[layout](numbers)
    assert list(given().items()) == [(key, tuple(param.shape)) for key, param in model.named_parameters()]
