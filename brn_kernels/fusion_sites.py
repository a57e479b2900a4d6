"""Where in a model a norm is followed by what can be fused with it, and the forwards that fuse it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.modules.lazy import LazyModuleMixin

from .fused_call import is_transparent, is_untouched
from .fused_class import SEQUENTIAL, fused_class, original_class
from .fusion_graph import Owner, Site, activation_of, addition_of, is_only_used_once, other_operand, sequence, takes_one
from .fusion_source import source_of
from .fusion_trace import trace


class Sites:
    """All sites of a model.

    Args:
        model: any module.
        why_not: why a module cannot be the norm of a site; "" if it can, ``None`` if it is no norm.
    """

    def __init__(self, model: nn.Module, why_not: Callable[[nn.Module], str | None]) -> None:
        self.why_not = why_not
        self.names = {module: name for name, module in model.named_modules()}
        self.norms = {module: name for module, name in self.names.items() if why_not(module) is not None}
        self.owners: dict[nn.Module, Owner] = {}
        self.calls: dict[nn.Module, tuple[Owner, Node]] = {}  # where a module is called, the first place
        parts = set(self.norms)
        self.compiled = {part for module in self.names for part in _compiled_parts(module)}
        for module in reversed(self.names):  # children first
            if module in self.norms or not any(part in parts for part in module.children()):
                continue
            parts.add(module)
            self.owners[module] = owner = Owner(module, self.names[module])
            owner.reason = _unfit(module)
            if not owner.reason:
                self._trace(owner)
        for owner in self.owners.values():
            self._find_ending(owner)
            self._find_sites(owner)
        for owner in self.owners.values():
            self._generate(owner)

    def fused(self) -> Iterator[Site]:
        """The sites all of whose forwards could be generated."""
        for owner in self.owners.values():
            for site in owner.sites:
                if all(each.fused is not None or each.is_sequential for each in site.owners):
                    yield site

    def why_left(self, norm: nn.Module) -> str:
        """Why a norm that is in no site is not."""
        if reason := self.why_not(norm):
            return reason
        if not is_untouched(norm):
            return "has hooks, or is patched or compiled"
        module, name = norm, "it"
        while module in self.calls:
            owner, call = self.calls[module]
            if len(call.users) > 1:
                return f"output of {name} used {len(call.users)} times"
            if not call.users:
                return f"output of {name} not used"
            if not takes_one(call):
                return f"{name} is called with other arguments"
            between, user = self._followed(owner, call)
            if user is None:
                user = next(iter((between[-1] if between else call).users))
            if user.op != "output":
                return _why_not_with(owner, call, user)
            if self._norm_of(module) is None and module is not norm:
                break
            module, name = owner.module, f"{self.names[owner.module] or 'the model'}, which ends with it,"
        if module is not norm and module not in self.calls:
            above = self._parent(module)
            return f"last in {self.names[module] or 'the model'}" + (f": {above.reason}" if above else "")
        above = self._parent(norm)
        if above is None:
            return "is the model itself"
        where = self.names[above.module] or "the model"
        return f"{where} left: {above.reason}" if above.reason else f"not called by {where}"

    def _parent(self, module: nn.Module) -> Owner | None:
        """The owner nearest above a module that is not called by any, which is why."""
        parents = [owner for owner in self.owners.values() if any(m is module for m in owner.module.modules())]
        parents = [
            owner for owner in parents if owner.module is not module and not owner.reason.startswith("it has no")
        ]
        return parents[0] if parents else None

    def _trace(self, owner: Owner) -> None:
        if type(owner.module).forward is nn.Module.forward:  # a list or dict of modules
            owner.reason = "it has no forward"
        elif owner.is_sequential:
            owner.trace = sequence(owner.module)
        else:
            try:
                owner.trace = trace(owner.module)
            except Exception as error:  # whatever a forward may raise
                owner.reason = str(error).strip().split("\n")[0] or type(error).__name__
        for node in owner.nodes:
            if (child := owner.called(node)) is not None:
                self.calls.setdefault(child, (owner, node))

    def _norm_of(self, module: nn.Module | None) -> tuple[nn.Module, list[Owner]] | None:
        """The norm whose result a module returns, and the owners on the way to it."""
        if module is None or not is_untouched(module):
            return None
        if (why_not := self.why_not(module)) is not None:
            return (module, []) if why_not == "" else None
        owner = self.owners.get(module)
        if owner is None or owner.ending is None:
            return None
        found = self._norm_of(owner.called(owner.ending))
        return None if found is None else (found[0], [owner, *found[1]])

    def _find_ending(self, owner: Owner) -> None:
        if owner.trace is None or len(owner.trace.required) != 1:
            return
        result = owner.nodes[-1].args[0]
        chain: list[Node] = []
        while isinstance(result, Node) and is_only_used_once(result):
            module = owner.called(result)
            if module is None or not takes_one(result):
                return
            if self._norm_of(module) is not None:
                owner.ending, owner.after_ending = result, chain
                return
            if owner.is_sequential or not is_transparent(module):
                return
            chain.insert(0, result)
            result = result.args[0]

    def _find_sites(self, owner: Owner) -> None:
        nodes = owner.nodes
        order = {node: i for i, node in enumerate(nodes)}
        taken: set[Node] = set()
        for call in reversed(nodes):  # of two norms that are added, the last one called takes the other as residual
            found = self._norm_of(owner.called(call))
            if found is None or not takes_one(call):
                continue
            norm, ways = found
            between, after = self._followed(owner, call)
            site = Site(norm, [owner, *ways], call, between)
            if after is None or after in taken:
                continue
            if activation_of(owner, after) is not None:
                site.activation = after
            elif (
                addition_of(after) is not None and not owner.is_sequential and self._may_wait(owner, site, after, order)
            ):
                site.addition = after
                _, then = self._followed(owner, after, transparent=False)
                if then is not None and activation_of(owner, then) == "relu":
                    site.activation = then
            else:
                continue
            taken |= {node for node in (site.addition, site.activation) if node is not None}
            owner.sites.insert(0, site)
            for way in ways:
                way.is_ending_used = True

    def _followed(self, owner: Owner, node: Node, transparent: bool = True) -> tuple[list[Node], Node | None]:
        """What uses the node's result, if one thing alone does, and what lies between them."""
        between: list[Node] = []
        while is_only_used_once(node):
            (user,) = node.users
            module = owner.called(user)
            if not transparent or module is None or not is_transparent(module) or not is_untouched(module):
                return between, user
            between.append(user)
            node = user
        return between, None

    def _may_wait(self, owner: Owner, site: Site, addition: Node, order: dict[Node, int]) -> bool:
        """Whether the norm's call can be put where the addition is without anybody seeing the difference."""
        last = site.between[-1] if site.between else site.call
        residual = other_operand(addition, last)
        if residual is None:
            return False
        if addition_of(addition) == "iadd" and addition.args[0] is not last:
            # the model adds into the residual: only if that is a norm's result, which nobody else sees
            if not is_only_used_once(residual) or self._norm_of(owner.called(residual)) is None:
                return False
        passed = [
            node
            for node in owner.nodes
            if order[site.call] < order[node] < order[addition]
            and node not in site.between
            and node.op != "placeholder"
        ]
        if any(node.op == "get_attr" for node in passed):  # of the norm's statistics, it may be, before their update
            return False
        if not passed:
            return True
        if site.norm is not owner.called(site.call):  # a whole branch: it may draw random numbers
            modules = [owner.called(node) for node in passed]
            if not all(module is not None and is_transparent(module) and is_untouched(module) for module in modules):
                return False
            site.passed = [str(node.target) for node in passed]
            return True
        inputs = site.call.all_input_nodes
        if any(node.op != "call_module" for node in inputs) or any(_may_write(owner, node) for node in passed):
            return False  # what is passed may write into the norm's input
        return not any(
            set(node.all_input_nodes) & set(inputs) or _parts_of(owner, node) & {site.norm, *_modules_of(owner, inputs)}
            for node in passed
        )

    def _generate(self, owner: Owner) -> None:
        if owner.trace is None or not (owner.sites or owner.is_ending_used):
            return
        original = original_class(owner.module)
        try:
            source = SEQUENTIAL if owner.is_sequential else source_of(owner, owner.trace)
            if not owner.is_sequential or owner.sites:
                owner.fused = fused_class(original, source)
        except Exception as error:  # functions that cannot be imported, and metaclasses of all kinds
            owner.reason = f"its forward cannot be generated: {error}"


def _why_not_with(owner: Owner, call: Node, user: Node) -> str:
    """Why a norm is not fused with what uses its result."""
    module = owner.called(user)
    if module is not None:
        what = original_class(module).__name__
        if what in ("StochasticDepth", "DropPath"):
            what += ", which drops"
        return f"followed by {what}"
    if addition_of(user) is not None and other_operand(user, call) is not None:
        return "added to the result of another norm, which is fused"
    return f"followed by {getattr(user.target, '__name__', user.target)}"


def _unfit(module: nn.Module) -> str:
    """Why a module's class must stay, whatever its forward is."""
    if isinstance(module, (torch.jit.ScriptModule, GraphModule)):
        return f"it is a {'GraphModule' if isinstance(module, GraphModule) else 'ScriptModule'}"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy: run a batch through the model first"
    if hasattr(original_class(module), "_brn_original"):
        return "its class was replaced after it had been fused"
    if "forward" in module.__dict__:
        return "its forward has been patched"
    return ""


def _compiled_parts(module: nn.Module) -> list[nn.Module]:
    """The modules that were compiled as one, this module being the outermost."""
    if isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl is not None:
        return list(module.modules())
    compiled = module._modules.get("_orig_mod")
    return [] if compiled is None else [module, *compiled.modules()]


def _may_write(owner: Owner, node: Node) -> bool:
    if owner.called(node) is not None:
        return any(getattr(part, "inplace", False) for part in _parts_of(owner, node))
    name = getattr(node.target, "__name__", str(node.target))
    in_place = name.startswith("i") and hasattr(operator, name) and name not in ("index", "inv", "invert")
    return in_place or name.endswith("_") or name == "setitem" or bool(node.kwargs.get("inplace"))


def _parts_of(owner: Owner, node: Node) -> set[nn.Module]:
    module = owner.called(node)
    return set() if module is None else set(module.modules())


def _modules_of(owner: Owner, nodes: list[Node]) -> list[nn.Module]:
    return [module for node in nodes if (module := owner.called(node)) is not None]
