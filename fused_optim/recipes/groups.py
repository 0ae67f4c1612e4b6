"""Param groups: no decay on biases, norms and embeddings; a learning rate per layer; matrices for Muon.

Each helper takes a model, or splits groups that another helper made. Any torch optimizer takes the result:

    groups = no_decay(model, weight_decay=0.05)
    groups = layerwise(model, lr=1e-3, factor=0.8, groups=groups)
    optimizer = FusedAdamW(groups)  # the number of groups does not change the number of launches
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

Group = dict[str, Any]
NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
HEADS = ("head", "lm_head", "classifier", "fc", "embed_out", "output_projection", "score", "qa_outputs")


def named_group(model: nn.Module, **options: Any) -> Group:
    """One group of all trainable params of a model: {"params": [(name, param), ...], **options}. Each param is in it
    once; a tied param has its first name.

    Args:
        model: the module.
        options: options of the group.
    """
    return {"params": [(name, param) for name, param in model.named_parameters() if param.requires_grad], **options}


def split(groups: Sequence[Group], label: Callable[[str, Parameter, Group], tuple[str, Group]]) -> list[Group]:
    """Splits groups by a label. Other options stay.

    Args:
        groups: groups with (name, param) pairs as "params".
        label: function of a param's name, the param and its group. It returns the name and the options of the new
            group.

    Returns:
        New groups. Those of one old group are in the order of their first params. Their "name" is the label, or the old
            name, a dot and the label.

    Raises:
        ValueError: a group's params have no names.
    """
    made: dict[tuple[int, str], Group] = {}
    for number, group in enumerate(groups):
        for pair in group["params"]:
            if not isinstance(pair, tuple):
                raise ValueError(
                    'the "params" of a group to be split must be (name, param) pairs, but hold a '
                    f"{type(pair).__name__}; use the pairs of model.named_parameters()"
                )
            name, options = label(pair[0], pair[1], group)
            whole = f"{group['name']}.{name}" if "name" in group else name
            new = made.setdefault((number, name), {**group, **options, "name": whole, "params": []})
            new["params"].append(pair)
    return list(made.values())


def no_decay(
    model: nn.Module,
    weight_decay: float,
    *,
    biases: bool = True,
    norms: bool = True,
    embeddings: bool = True,
    ndim_below: int = 2,
    modules: tuple[type[nn.Module], ...] = (),
    also: Callable[[str, Parameter], bool] | None = None,
    groups: Sequence[Group] | None = None,
) -> list[Group]:
    """Two groups: "decay", with weight_decay, and "no_decay", with 0.

    A tied param is exempt from decay if any module that holds it exempts it. It has its first name.

    Args:
        model: the module. The groups hold its trainable params in their order, each once.
        weight_decay: weight decay of the params that are not exempt.
        biases: exempt params whose own name contains the word bias (bias, bias_ih_l0, in_proj_bias).
        norms: exempt the params of torch's normalization modules.
        embeddings: exempt the params of Embedding and EmbeddingBag.
        ndim_below: exempt params with fewer dimensions, for example norms and scales of other modules; 0: none.
        modules: more types of modules whose own params are exempt.
        also: function of name and param that returns True for more params to exempt.
        groups: groups to split, in place of the params of the model.

    Returns:
        Groups with "params" as (name, param) pairs, "name" and "weight_decay".
    """
    kinds = modules + NORMS * norms + EMBEDDINGS * embeddings
    exempt = {
        param
        for module in model.modules()
        for name, param in module.named_parameters(recurse=False)
        if isinstance(module, kinds) or (biases and "bias" in name.split("_")) or param.ndim < ndim_below
    }

    def label(name: str, param: Parameter, _: Group) -> tuple[str, Group]:
        if param in exempt or (also is not None and also(name, param)):
            return "no_decay", {"weight_decay": 0.0}
        return "decay", {"weight_decay": weight_decay}

    return split([named_group(model)] if groups is None else groups, label)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that make the output of a model: what its method get_output_embeddings() returns (models of
    transformers have it); else all Linear modules at or in a module with a name in HEADS; else the last Linear module.
    """
    given = getattr(model, "get_output_embeddings", None)
    found = given() if callable(given) else None
    if isinstance(found, nn.Module):
        return [found]
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    named: list[nn.Module] = [module for name, module in linear if not {*name.split(".")}.isdisjoint(HEADS)]
    return named or [module for _, module in linear[-1:]]


def muon(
    model: nn.Module,
    *,
    muon: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    flatten: bool = False,
    heads: Sequence[nn.Module] | None = None,
    modules: tuple[type[nn.Module], ...] = (),
    also: Callable[[str, Parameter], bool] | None = None,
    groups: Sequence[Group] | None = None,
) -> list[Group]:
    """Two groups for FusedMuon: "muon", with use_muon=True, holds the matrices; "adamw", with use_muon=False, all other
    params.

    A matrix is a param of two dimensions. These are stepped by AdamW nevertheless: the params of Embedding and
    EmbeddingBag; params with "embed" in their own name (pos_embed); the params of the output layers. A tied param is
    stepped by AdamW if any module that holds it is one of these. It has its first name.

    Args:
        model: the module. The groups hold its trainable params in their order, each once.
        muon, adamw: options of the groups, such as lr, weight_decay and, for AdamW, betas.
        flatten: give the weights of convolutions to Muon, too, as matrices of the output channels and all other
            dimensions.
        heads: the output layers; None: see `output_layers`.
        modules: more types of modules whose own params AdamW steps.
        also: function of name and param that returns True for more params that AdamW steps.
        groups: groups to split, in place of the params of the model.

    Returns:
        Groups with "params" as (name, param) pairs, "name", "use_muon" and the given options.

    Source: Jordan et al., https://kellerjordan.github.io/posts/muon
    """
    heads = output_layers(model) if heads is None else heads
    kinds = EMBEDDINGS + modules
    others, convolutions = set(), set()
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if isinstance(module, kinds) or "embed" in name:
                others.add(param)
            if isinstance(module, nn.modules.conv._ConvNd):
                convolutions.add(param)
    others |= {param for head in heads for param in head.parameters()}

    def label(name: str, param: Parameter, _: Group) -> tuple[str, Group]:
        is_matrix = param.ndim == 2 or (flatten and param.ndim > 2 and param in convolutions)
        if not is_matrix or param in others or (also is not None and also(name, param)):
            return "adamw", {"use_muon": False, **(adamw or {})}
        return "muon", {"use_muon": True, **({"flatten": True} if flatten else {}), **(muon or {})}

    return split([named_group(model)] if groups is None else groups, label)


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model by name, in order. The layers are its children. A Sequential, ModuleList or ModuleDict is
    replaced by the layers in it. Layers without params are left out."""
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", layer) for inner, layer in layers(child))
        elif next(child.parameters(), None) is not None:
            yield name, child


def depths(model: nn.Module) -> dict[str, int]:
    """The depth of every param by name: the number of its layer (see `layers`), counted from the input. Params of the
    model itself have depth 0. Frozen params count, so that freezing a layer does not change the depth of others."""
    found = {name: 0 for name, _ in model.named_parameters()}
    for number, (prefix, layer) in enumerate(layers(model)):
        for name, _ in layer.named_parameters():
            if f"{prefix}.{name}" in found:
                found[f"{prefix}.{name}"] = number
    return found


def layerwise(
    model: nn.Module,
    lr: float,
    factor: float | Sequence[float],
    *,
    depth: Callable[[str, Parameter], int] | None = None,
    groups: Sequence[Group] | None = None,
) -> list[Group]:
    """A learning rate per depth (discriminative learning rates): lr * factor ** (top - depth). The top layer, next to
    the output, has lr itself.

    Args:
        model: the module. The groups hold its trainable params in their order, each once.
        lr: learning rate of the top layer. A group's own lr takes precedence.
        factor: a number, usually below 1, or one factor per depth, starting at depth 0.
        depth: function of name and param that returns the depth, 0 at the input. None: the order of the model's layers,
            see `depths`. Tied params have the depth of their first name.
        groups: groups to split, for example those of no_decay, in place of the params of the model.

    Returns:
        Groups with "params" as (name, param) pairs, "name" ("depth_0", or "decay.depth_0" and so on) and "lr".

    Raises:
        ValueError: there are fewer factors than depths, or a depth is below 0.

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", arXiv:1801.06146, section
    3.2 (there with a factor of 1 / 2.6).
    """
    found = depths(model) if depth is None else {name: depth(name, param) for name, param in model.named_parameters()}
    top = max(found.values(), default=0)
    if min(found.values(), default=0) < 0:
        raise ValueError(f"depths must be integers from 0, but the smallest is {min(found.values())}")
    if isinstance(factor, Sequence):
        if len(factor) <= top:
            raise ValueError(
                f"factor must be a number or one number for each of the {top + 1} depths, but got {len(factor)} numbers"
            )
        factors = list(factor)
    else:
        factors = [factor ** (top - level) for level in range(top + 1)]

    def label(name: str, _: Parameter, group: Group) -> tuple[str, Group]:
        level = found[name]
        return f"depth_{level}", {"lr": group.get("lr", lr) * factors[level]}

    return split([named_group(model)] if groups is None else groups, label)


def per_group(name: str, value: float | Sequence[float], optimizer: Optimizer) -> list[float]:
    """One number for each group of the optimizer.

    Args:
        name: name of the option, for the error.
        value: one number for all groups, or a list of one per group.
        optimizer: the optimizer with the groups.

    Raises:
        ValueError: the length of the list is not the number of groups.
    """
    groups = len(optimizer.param_groups)
    if not isinstance(value, list | tuple):
        return [value] * groups  # type: ignore[list-item]
    if len(value) != groups:
        raise ValueError(
            f"{name} must be a number or one number for each of the optimizer's {groups} param groups, "
            f"but got {len(value)} numbers"
        )
    return list(value)
