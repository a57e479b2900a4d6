"""The forward of a module as the search for sites sees it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from . import fused_call
from .fused_call import activation_name, is_untouched
from .fusion_trace import Trace

ADDITIONS = {
    operator.add: "add", torch.add: "add", "add": "add", operator.iadd: "iadd", "add_": "iadd",
}  # fmt: skip
FUNCTIONS = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.hardswish: "hardswish", F.leaky_relu: "leaky_relu", F.leaky_relu_: "leaky_relu",
}  # fmt: skip


@dataclass
class Site:
    """A norm, what follows it, and the module whose forward calls both."""

    norm: nn.Module
    owners: list[Owner]  # whose forwards have to be fused: of the addition or activation, then on the way to the norm
    call: Node  # of the norm, or of what ends with it
    between: list[Node]
    passed: list[str] = field(default_factory=list)  # modules the call is moved past, which return their input
    addition: Node | None = None
    activation: Node | None = None

    @property
    def kind(self) -> str:
        """One of "norm + act", "norm + add" and "norm + add + act"."""
        return "norm" + " + add" * (self.addition is not None) + " + act" * (self.activation is not None)


@dataclass(eq=False)
class Owner:
    """A module that calls norms, or modules with norms in them."""

    module: nn.Module
    name: str
    trace: Trace | None = None
    reason: str = ""  # why it stays as it is, if it has to
    sites: list[Site] = field(default_factory=list)
    ending: Node | None = None  # the call whose result it returns, if that call ends with a norm
    after_ending: list[Node] = field(default_factory=list)
    is_ending_used: bool = False
    fused: type[nn.Module] | None = None

    @property
    def is_sequential(self) -> bool:
        """Whether it just calls its children one after the other."""
        return fused_call.is_sequential(self.module)

    def called(self, node: Any) -> nn.Module | None:
        """The child that the node calls."""
        if not isinstance(node, Node) or node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    @property
    def nodes(self) -> list[Node]:
        """Of its graph, in the order in which they run."""
        return [] if self.trace is None else list(self.trace.graph.nodes)


def activation_of(owner: Owner, node: Node) -> str | None:
    """The fused activation that a node is, if it is one."""
    module = owner.called(node)
    if module is not None:
        return activation_name(module) if takes_one(node) and is_untouched(module) else None
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = FUNCTIONS.get(node.target)
    slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
    if name == "leaky_relu" and slope != 0.01 or not set(node.kwargs) <= {"inplace", "negative_slope"}:
        return None
    return name


def takes_one(node: Node) -> bool:
    """Whether a call has one argument, by position, that is computed in the graph."""
    return len(node.args) == 1 and isinstance(node.args[0], Node) and not node.kwargs


def is_only_used_once(node: Node) -> bool:
    """Whether one node alone uses the result."""
    return len(node.users) == 1


def addition_of(node: Node) -> str | None:
    """How a node adds its two operands (see ``norm_add_act``); None if it does something else."""
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    return ADDITIONS.get(node.target)


def other_operand(addition: Node, operand: Node) -> Node | None:
    """What is added to the operand; None if that is no other result of the graph."""
    a, b = addition.args
    if a is b or not isinstance(a, Node) or not isinstance(b, Node):
        return None
    return b if a is operand else a


def sequence(module: nn.Module) -> Trace:
    """The graph of an ``nn.Sequential``."""
    graph = Graph()
    node = graph.placeholder("input")
    for name in module._modules:
        node = graph.call_module(name, (node,))
    graph.output(node)
    return Trace(graph, [], ["input"], [], [])
