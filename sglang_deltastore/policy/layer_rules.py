"""Which built models can be served: the configuration does not tell everything, the modules do.

What a model does with its attention is partly in its layers' fields and partly in the code that calls them, so that
code is read too: whatever it passes that DeltaStore's attention does not know is found before the first request.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from deltastore_kernels.layout import HEAD_DIMS

from .refusals import Refused

SERVED_ARGUMENTS = ("q", "k", "v", "forward_batch", "save_kv_cache", "sinks")
"""What our attention understands. `save_kv_cache` is a question of the forward batch, which the backend checks; `sinks`
are learned logits, one of each query head."""

_NEVER_CALLED = ("_forward_rope_store",)
"""Methods of SGLang's models that run with options alone that are refused: MiMo-V2's, with speculation."""

_ADVICE = "serve this model with --kv-compress none"


def check_layers(layers: list[Any], model: nn.Module, cached: Sequence[int] | None = None) -> None:
    """Raises Refused for a model whose RadixAttention layers (sorted by layer_id) we cannot serve. cached: ids of a
    hybrid's layers that have a KV cache, as SGLang counts them, None: all from the first on."""
    if not layers:
        raise Refused(f"--kv-compress deltastore: {type(model).__name__} has no attention layer of SGLang's; {_ADVICE}")
    # The modules that call them first: they say best what a model does.
    for owner, names in _owners(model, layers):
        _check_owner(owner, names)
    expected = cached or range(layers[0].layer_id, layers[0].layer_id + len(layers))
    if len(layers) != len(expected):
        _refuse(
            "the model", "its number of attention layers", len(layers), f"{len(expected)}, as its configuration says"
        )
    for layer, layer_id in zip(layers, expected, strict=True):
        _check_layer(layer, layer_id)


def check_windows(layers: Sequence[Any], kept_tokens: int) -> None:
    """Raises Refused for layers whose pages SGLang frees where they lie kept_tokens behind, and that see further."""
    for layer in layers:
        window = layer.sliding_window_size
        if window is None or not 0 <= window <= kept_tokens:
            raise Refused(
                f"--kv-compress deltastore: layer {layer.layer_id}: its window is {window}; allowed is at most "
                f"{kept_tokens}, as far behind as SGLang keeps its pages; add --disable-hybrid-swa-memory"
            )


def _refuse(where: str, what: str, got: Any, allowed: Any) -> NoReturn:
    raise Refused(f"--kv-compress deltastore: {where}: {what} is {got}; allowed is {allowed}; {_ADVICE}")


def _check_layer(layer: Any, expected: int) -> None:
    where = f"layer {layer.layer_id}"
    if layer.layer_id != expected:
        _refuse(where, "layer_id", layer.layer_id, f"{expected} (one KV cache for each layer, none shared or left out)")
    if layer.attn_type.value != "decoder":
        _refuse(where, "attn_type", layer.attn_type.value, "decoder (causal)")
    if layer.is_cross_attention or layer.use_irope:
        _refuse(where, "cross attention or chunked attention (irope)", True, False)
    scoring = (layer.logit_capping_method, layer.pos_encoding_mode)
    if scoring != ("tanh", "NONE"):
        _refuse(where, "logit_capping_method, pos_encoding_mode", scoring, ("tanh", "NONE"))
    if layer.xai_temperature_len > 0:
        _refuse(where, "xai_temperature_len", layer.xai_temperature_len, "-1 (no temperature by length)")
    if max(sizes := (layer.qk_head_dim, layer.v_head_dim)) > max(HEAD_DIMS):
        _refuse(where, "(qk_head_dim, v_head_dim)", sizes, f"at most {max(HEAD_DIMS)} each")
    if layer.tp_k_head_num != layer.tp_v_head_num:
        _refuse(where, "(KV heads of keys, of values)", (layer.tp_k_head_num, layer.tp_v_head_num), "as many of both")


def _owners(model: nn.Module, layers: list[Any]) -> Iterator[tuple[nn.Module, list[str]]]:
    """The modules that call attention layers, with the names under which they have them, alone or in a list."""
    wanted = {id(layer) for layer in layers}
    for module in model.modules():
        names = [
            name
            for name, child in module.named_children()
            if id(child) in wanted or (isinstance(child, nn.ModuleList) and any(id(entry) in wanted for entry in child))
        ]
        if names and not isinstance(module, nn.ModuleList):
            yield module, names


def _check_owner(owner: nn.Module, names: list[str]) -> None:
    where = f"layer {getattr(owner, 'layer_id', '')} ({type(owner).__name__})".replace("  ", " ")
    tensors = {**vars(owner), **dict(owner.named_parameters(recurse=False)), **dict(owner.named_buffers(recurse=False))}
    if getattr(owner, "is_kv_shared_layer", False):
        _refuse(where, "is_kv_shared_layer", True, "False (every layer has keys and values of its own)")
    calls = _Calls(owner, names)
    for argument in calls.unknown:
        _refuse(where, "an argument of its attention", argument, f"one of {', '.join(SERVED_ARGUMENTS)}")
    attention = getattr(owner, names[0])
    query_heads = (attention[0] if isinstance(attention, nn.ModuleList) else attention).tp_q_head_num
    for name, value in tensors.items():
        if "sink" not in name or not isinstance(value, torch.Tensor):
            continue
        given = f"a tensor of shape {tuple(value.shape)}"
        if name not in calls.sinks:
            _refuse(where, name, given, "learned attention sinks that each call of attention is given as sinks=")
        if value.shape != (query_heads,):
            _refuse(where, name, given, f"({query_heads},): a logit for each query head")


class _Calls(ast.NodeVisitor):
    """The calls of attention in a module's own code: what they pass that we do not know, and which of the module's
    attributes as sinks.

    A branch is left out where the module's own attributes say that it is not taken.
    """

    def __init__(self, owner: nn.Module, names: list[str]) -> None:
        self.owner, self.names = owner, names
        self.unknown: list[str] = []
        self.sinks: set[str | None] = set()
        for cls in type(owner).__mro__:
            if cls is nn.Module:
                break
            self.visit(ast.parse(textwrap.dedent(inspect.getsource(cls))))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in _NEVER_CALLED:
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        taken = self._truth(node.test)
        for statement in [*(node.body if taken is not False else ()), *(node.orelse if taken is not True else ())]:
            self.visit(statement)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
        if self._own_attribute(called) not in self.names:
            return
        if any(isinstance(argument, ast.Constant) and argument.value is None for argument in node.args[1:3]):
            self.unknown.append("k and v None (the keys and values of another layer)")
        self.sinks |= {self._own_attribute(keyword.value) for keyword in node.keywords if keyword.arg == "sinks"}
        for keyword in node.keywords:
            if keyword.arg is None:
                self.unknown += sorted(set(self._value(keyword.value) or ()) - set(SERVED_ARGUMENTS))
            elif keyword.arg not in SERVED_ARGUMENTS and self._value(keyword.value) is not None:
                self.unknown.append(keyword.arg)

    def _own_attribute(self, node: ast.expr) -> str | None:
        """x where node is `self.x`."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return node.attr
        return None

    def _value(self, node: ast.expr) -> Any:
        """The value of a constant or of an own attribute; else the source, which stands for something unknown."""
        if isinstance(node, ast.Constant):
            return node.value
        name = self._own_attribute(node)
        return getattr(self.owner, name, None) if name else [ast.unparse(node)]

    def _truth(self, test: ast.expr) -> bool | None:
        """Whether a condition holds for this module; None: its attributes do not tell."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            return False if any(self._truth(part) is False for part in test.values) else None
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._truth(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is) and self._own_attribute(test.left):
            return self._value(test.left) is self._value(test.comparators[0])
        value = getattr(self.owner, self._own_attribute(test) or "", test)
        return bool(value) if value is None or isinstance(value, bool | int) else None
