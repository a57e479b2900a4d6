"""The source of a fused forward."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Graph, Node
from torch.fx.graph import _format_target
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from . import fused_call
from .fusion_graph import FUNCTIONS, Owner, Site, addition_of, other_operand
from .fusion_trace import Trace


def source_of(owner: Owner, traced: Trace) -> str:
    """The text of the fused forward, and of the forward that takes a residual and an activation, if that is used."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    result = graph.graph_copy(traced.graph, copies)
    graph.output(result)
    for node in graph.nodes:
        node.type = None
    plain = [p.name for p in traced.parameters if p.kind is not p.KEYWORD_ONLY]
    named = [p.name for p in traced.parameters if p.kind is p.KEYWORD_ONLY]
    arguments = ["self", *plain, *(["*", *named] if named else [])]
    passed = ["self", *plain, *(f"{name}={name}" for name in named)]
    original = f"original_forward({', '.join(passed)})"
    for site in owner.sites:
        _fuse(graph, owner, site, copies)
    text, imports = _code(graph)
    imports += traced.imports
    moved = [f"is_transparent({_format_target('self', name)})" for site in owner.sites for name in site.passed]
    forward = _function("forward", arguments, [*traced.conditions, *moved], f"return {original}", text)
    if owner.is_ending_used and owner.ending is not None:
        ending = copies[owner.ending]
        with graph.inserting_before(ending):
            end = graph.call_function(
                fused_call.end,
                (
                    graph.get_attr(str(ending.target)),
                    ending.args[0],
                    graph.get_attr("residual_"),
                    graph.get_attr("activation_"),
                    tuple(graph.get_attr(str(node.target)) for node in owner.after_ending),
                ),
            )
        output = next(iter(reversed(graph.nodes)))
        output.args = (end,)
        for node in [*reversed([copies[node] for node in owner.after_ending]), ending]:
            graph.erase_node(node)
        text, more = _code(graph)
        imports += more
        text = [line.replace("self.residual_", "residual_").replace("self.activation_", "activation_") for line in text]
        (name,) = traced.required
        conditions = [each for each in [*traced.conditions, *moved] if not _is_of_a_default(each, traced)]
        unfused = f"return original_forward(self, {name}), False"
        forward += _function("ending", ["self", name, "residual_", "activation_"], conditions, unfused, text)
    used = [line for line in sorted(set(imports)) if re.search(rf"\b{_bound_by(line)}\b", forward)]
    return "\n".join([*used, "", forward])


def _fuse(graph: Graph, owner: Owner, site: Site, copies: dict[Node, Node]) -> None:
    """Replace the nodes of a site by one call."""
    call, between = copies[site.call], [copies[node] for node in site.between]
    parts = [copies[node] for node in (site.addition, site.activation) if node is not None]
    where = call if site.addition is None else copies[site.addition]
    residual, addition = None, "add"
    if site.addition is not None:
        last = site.between[-1] if site.between else site.call
        other = other_operand(site.addition, last)
        assert other is not None
        residual, addition = copies[other], str(addition_of(site.addition))
        if addition == "iadd" and site.addition.args[0] is not last:
            addition = "iadd_residual"
    with graph.inserting_before(where):
        activation: Any = None
        if site.activation is not None:
            is_module = owner.called(site.activation) is not None
            activation = graph.get_attr(str(site.activation.target)) if is_module else FUNCTIONS[site.activation.target]
        fused = graph.call_function(
            fused_call.norm_add_act,
            (
                graph.get_attr(str(call.target)),
                call.args[0],
                residual,
                activation,
                addition,
                tuple(graph.get_attr(str(node.target)) for node in between),
            ),
        )
    parts[-1].replace_all_uses_with(fused)
    for node in [*reversed(parts), *reversed(between), call]:
        graph.erase_node(node)
    # another site may have taken this one's result as its residual
    for original, copied in copies.items():
        if copied is parts[-1]:
            copies[original] = fused


def _code(graph: Graph) -> tuple[list[str], list[str]]:
    """The lines of a graph's function, and the imports these need."""
    code = graph.python_code("self")
    lines = code.src.strip().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward"))
    return lines[start + 1 :], _format_import_block(code.globals, sys_importer).split("\n")


def _function(name: str, arguments: list[str], conditions: list[str], otherwise: str, lines: Any) -> str:
    body = lines if isinstance(lines, list) else lines.split("\n")
    guard = [f"    if not ({' and '.join(conditions)}):", f"        {otherwise}"] if conditions else []
    return "\n".join([f"def {name}({', '.join(arguments)}):", *guard, *body]) + "\n\n"


def _bound_by(statement: str) -> str:
    """The name that an import statement binds."""
    return re.split(r"[ .]", statement.partition(" = ")[0].replace("import ", ""))[0] if " as " not in statement else (
        statement.split(" as ")[1]
    )  # fmt: skip


def _is_of_a_default(condition: str, traced: Trace) -> bool:
    return any(
        condition.startswith((f"{p.name} ", f"type({p.name}) "))
        for p in traced.parameters
        if p.name not in traced.required
    )
