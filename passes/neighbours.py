"""Neighbours: which module's output goes to exactly one other module and to nothing else, in every call, and how that is known.

Two things are a proof. The graph of a ``GraphModule`` is its program, and a symbolic trace that was compared with the model stands for it: there
the users of each node say it. And where the root and every container down to a layer are plain ``nn.Sequential``, the program is nothing but
one child after the other. A plain ``nn.Sequential`` inside a module with code of its own proves nothing: that code may call its children singly,
or slice it (networks that tap their features do). A recorded forward pass proves nothing either: it is one execution.

The proof holds for the mode, train or eval, that the model is in. It is about values: a module that puts away what passes through it, as an
attribute, is not seen, but hooks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from passes.chain import Chain, TransposedChain, has_hooks
from passes.site import Call, held_outside, is_layer, named_groups, owners_of, reason_to_keep

__all__ = ["BATCH_NORMS", "Neighbour", "is_batch_norm", "is_norm", "outer_names", "read_neighbours", "sequence_graph", "unproved"]

PLAIN_CONTAINERS = (nn.Sequential, Chain, TransposedChain)
BATCH_NORMS: dict[type[nn.Module], int | None] = {nn.BatchNorm1d: None, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}
"""Spatial dimensions that each takes; None where that is known only of a call."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Neighbour:
    """A module that the network calls, and who stands next to it.

    Attributes:
        name: its first qualified name.
        aliases: every name under which it is found, the first included.
        module: it.
        chain: the name of the chain that it is a layer of, or None.
        calls: its calls, where they are known.
        keep: why it must stay as it is, or None.
        reader: the module that alone reads its output, and reads nothing else, in every call; None where there is none.
        source: the module whose ``reader`` it is.
        at_once: whether nothing else at all runs between its calls and those of its reader.
        no_reader: why it has no reader.
        no_source: why it has no source.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    chain: str | None
    calls: tuple[Call, ...] | None
    keep: str | None
    reader: str | None = None
    source: str | None = None
    at_once: bool = False
    no_reader: str | None = None
    no_source: str | None = None


def read_neighbours(
    model: nn.Module,
    graph: fx.Graph,
    *,
    chains: Mapping[str, str],
    containers: bool,
    keep: Mapping[str, str] | None = None,
    calls: Mapping[str, tuple[Call, ...]] | None = None,
) -> dict[str, Neighbour]:
    """Every module that a graph calls, by its first name, in the order of the first calls; then the layers and norms that it does not call.

    Args:
        model: where the graph's targets are found.
        graph: the program of the model.
        chains: the chain's name for the first name of each of its layers.
        containers: whether the modules around those called run too, as they do unless the graph itself is what runs.
        keep: further reasons by first name.
        calls: known calls by first name, where the graph's nodes do not know their shapes.
    """
    groups = {id(module): (module, names) for module, names in named_groups(model)}
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            nodes.setdefault(groups[id(module)][1][0], []).append(node)
    first = {alias: names[0] for _, names in groups.values() for alias in names}
    around = _containers(list(groups.values())) if containers else {}
    reasons = _obstacles(list(groups.values()), graph, chains) | dict(keep or {})
    found = {}
    for name, own in nodes.items():
        module, names = groups[id(model.get_submodule(name))]
        seen = _calls(own) or (calls or {}).get(name)
        reason = reasons.get(name) or ("it is called with more than its input" if any(_input(n) is None for n in own) else None)
        found[name] = Neighbour(name=name, aliases=names, module=module, chain=chains.get(name), calls=seen, keep=reason)
    pairs = {}
    for name, own in nodes.items():
        pairs[name] = _reader(name, own, nodes, first, around)
    for module, names in groups.values():
        if (is_layer(module) or is_norm(module)) and names[0] not in found:
            why = f"no call of it is seen: {type(module).__name__} is unused, works in its own way, or is inside a module that is called as a whole"
            found[names[0]] = Neighbour(name=names[0], aliases=names, module=module, chain=chains.get(names[0]), calls=None, keep=why)
            nodes[names[0]], pairs[names[0]] = [], (None, why)
    return _linked(found, pairs, nodes, first)


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm, of whatever subclass."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's batch norms, not of a subclass, which may compute something else."""
    return type(module) in BATCH_NORMS and "forward" not in vars(module)


def unproved(model: nn.Module, reason: str, chains: Mapping[str, str]) -> dict[str, Neighbour]:
    """Every module without submodules, with no neighbours for this reason."""
    return {
        names[0]: Neighbour(
            name=names[0],
            aliases=names,
            module=module,
            chain=chains.get(names[0]),
            calls=None,
            keep=None,
            no_reader=reason,
            no_source=reason,
        )
        for module, names in named_groups(model)
        if names[0] and not any(True for _ in module.children())
    }


def sequence_graph(model: nn.Module) -> fx.Graph | None:
    """The program of a model that is a plain ``nn.Sequential`` (of plain ones, of any modules), or None where it is something else."""
    if not _is_plain(model):
        return None
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in _leaves(model, ""):
        value = graph.create_node("call_module", name, (value,))
    graph.output(value)
    return graph


def _is_plain(module: nn.Module) -> bool:
    return type(module) in PLAIN_CONTAINERS and "forward" not in vars(module)


def _leaves(module: nn.Module, prefix: str) -> Iterator[str]:
    for child, item in module._modules.items():
        if item is not None:
            name = f"{prefix}{child}"
            if _is_plain(item):
                yield from _leaves(item, f"{name}.")
            else:
                yield name


def _calls(nodes: Sequence[fx.Node]) -> tuple[Call, ...] | None:
    calls = []
    for node in nodes:
        given = _input(node)
        into, out = (getattr(n.meta.get("tensor_meta"), "shape", None) for n in (given or node, node))
        if given is None or into is None or out is None:
            return None
        calls.append(Call(tuple(into), tuple(out)))
    return tuple(calls)


def _input(node: fx.Node) -> fx.Node | None:
    """The node's one argument, or None where it has others or none."""
    only = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
    return node.args[0] if only else None  # type: ignore[return-value]


def _reader(
    name: str,
    own: Sequence[fx.Node],
    nodes: Mapping[str, Sequence[fx.Node]],
    first: Mapping[str, str],
    around: Mapping[str, Mapping[int, str]],
) -> tuple[str | None, str | None]:
    """The first name of the module that alone reads these calls of a module, or None and why there is none."""
    readers: dict[str, None] = {}
    for node in own:
        users = list(node.users)
        if len(users) != 1:
            others = " and ".join(str(_title(user)) for user in users) or "nothing"
            return None, f"its output is read by {others}"
        if users[0].op != "call_module":
            return None, f"its output is read by {_title(users[0])}"
        if _input(users[0]) is None:
            return None, f"{users[0].target} reads more than its output"
        readers[first[str(users[0].target)]] = None
    if len(readers) > 1:
        return None, f"its calls are followed by different modules ({', '.join(readers)})"
    reader = next(iter(readers))
    if len(nodes[reader]) != len(own):
        return None, f"{reader} is also called after something else"
    inside, outside = around.get(name, {}), around.get(reader, {})
    hooked = next((where for key, where in {**inside, **outside}.items() if (key in inside) != (key in outside)), None)
    if hooked is not None:
        return None, f"{hooked} has hooks, which see what goes from it to {reader}"
    return reader, None


def _linked(
    found: Mapping[str, Neighbour],
    pairs: Mapping[str, tuple[str | None, str | None]],
    nodes: Mapping[str, Sequence[fx.Node]],
    first: Mapping[str, str],
) -> dict[str, Neighbour]:
    sources = {reader: name for name, (reader, _) in pairs.items() if reader is not None}
    linked = {}
    for name, item in found.items():
        reader, reason = pairs[name]
        source, no_source = sources.get(name), None
        if source is None:
            given = {str(_title(n)): n for node in nodes[name] for n in node.all_input_nodes}
            before = {first[str(n.target)] for n in given.values() if n.op == "call_module"}
            if len(before) == len(given) == 1:
                other = before.pop()
                no_source = f"it reads {other}: {pairs[other][1]}"
            else:
                no_source = f"it reads {' and '.join(given) or 'nothing'}"
        at_once = reader is not None and all(node.next in node.users for node in nodes[name])
        linked[name] = replace(item, reader=reader, no_reader=reason, source=source, no_source=no_source, at_once=at_once)
    return linked


def _title(node: fx.Node) -> str:
    if node.op == "output":
        return "the caller of the model"
    if node.op == "placeholder":
        return f"the input {node.target}"
    return str(node.target) if node.op in ("call_module", "call_method", "get_attr") else str(getattr(node.target, "__name__", node.target))


def _containers(groups: Sequence[tuple[nn.Module, tuple[str, ...]]]) -> dict[str, dict[int, str]]:
    """For each module's first name the modules with hooks around it, under any of its names, by identity."""
    by_name = {alias: (module, names[0]) for module, names in groups for alias in names}
    hooked = {id(module) for module, _ in by_name.values() if has_hooks(module)}
    around: dict[str, dict[int, str]] = {}
    for alias, (_, name) in by_name.items():
        path = alias
        while hooked and path:
            path = path.rpartition(".")[0]
            outer, title = by_name[path]
            if id(outer) in hooked:
                around.setdefault(name, {})[id(outer)] = title or "the model"
    return around


def _obstacles(groups: Sequence[tuple[nn.Module, tuple[str, ...]]], graph: fx.Graph, chains: Mapping[str, str]) -> dict[str, str]:
    """Why modules must stay as they are, by first name: what is read or called of them that no graph's call of theirs shows."""
    first = {alias: names[0] for _, names in groups for alias in names}
    aliases = {names[0]: names for _, names in groups}
    opaque = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners = owners_of(groups)
    held = dict(held_outside(groups))
    reasons: dict[str, str] = {}

    def obstacle(module: nn.Module, names: tuple[str, ...]) -> str | None:
        if has_hooks(module):
            return "it has hooks, which would see something else"
        if is_layer(module):
            reason = reason_to_keep(module, names[0])
            if reason is not None:
                return reason
            other = next((n for n in owners[id(module._parameters["weight"])] if n != names[0]), None)
            if other is not None:
                return f"its weight is shared with {other or 'the model'}"
        if is_norm(module) and not is_batch_norm(module):
            return f"{type(module).__name__} computes its output in its own way"
        if any(name in read for name in names):
            return "its parameters are also read outside its own forward"
        whole = next((outer for name in names for outer in outer_names(name) if outer in opaque), None)
        if whole is not None:
            return f"it is also inside {whole}, which is called as a whole"
        chain = chains.get(names[0])
        if chain is not None and len(names) != len(aliases[first[chain]]):
            return f"it is also found outside its chain ({', '.join(names)})"
        return held.get(id(module))

    for module, names in groups:
        if any(name in opaque for name in names):
            reason = obstacle(module, names)
            if reason is not None:
                reasons[names[0]] = reason
    return reasons


def outer_names(name: str) -> Iterator[str]:
    """Names of the modules around something of this name, but of the root, inside out."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
