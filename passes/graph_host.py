"""Surgery on a flat ``fx.GraphModule``, node for node: one call of a layer becomes one call for each layer of its chain, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from passes.chain import Chain, ChainInfo, changed_since_cut, cut_chain, cut_layer, has_hooks, merge, original_layer, pieces_of
from passes.effective import effective_layer
from passes.factorization import Factorization
from passes.geometry import Geometry, Piece
from passes.graph_meta import CHAINS
from passes.host import Host, Undo, site_of, telling_numbers
from passes.kinds import kind_of
from passes.neighbours import Neighbour, read_neighbours
from passes.placing import Fusion, assign, layers_of_chains
from passes.site import Call, Found, Site, find_layers, kept_together
from passes.watching import Observation, observe_graph

__all__ = ["GraphHost"]


class GraphHost(Host):
    """Host for a ``GraphModule`` such as ``trace`` returns; works in place on the module it is given.

    Shapes are read from and written to ``node.meta["tensor_meta"]``; what is known of chains lives in ``gm.meta``. The graph is edited on a
    copy which ``commit`` puts in place, if anything was prepared.

    Args:
        model: the graph module.
        example_inputs: with them, shapes are measured anew.
        observed: what the inputs tell, where it is known already (see ``observe_graph``).
        private: see ``Host``.
        effective_weights: as for ``ModuleHost``.
    """

    def __init__(
        self,
        model: fx.GraphModule,
        example_inputs: Any = None,
        *,
        observed: Observation | None = None,
        private: bool = False,
        effective_weights: bool = False,
    ) -> None:
        self.model = model
        self._plain = effective_layer if effective_weights else None
        self._private = private
        seen = observe_graph(model, example_inputs) if observed is None and example_inputs is not None else observed
        self._observed: Mapping[str, Any] = {} if seen is None else seen.shapes
        self._undo = Undo()
        self._neighbours: dict[str, Neighbour] | None = None
        self._read()

    def sites(self) -> tuple[Site, ...]:
        return kept_together([self._chain_site(name) if name in self._chains else self._layer_site(name, keep) for name, keep in self._order])

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        if site.chain is None:
            layers, info = cut_layer(self._layer(site.name), factorization, pieces)
            runs = [[node] for alias in site.aliases for node in self._nodes.get(alias, ())]
        else:
            layers, info = cut_chain(self._layers(site.name), self._chains[site.name], factorization, pieces)
            runs = self._runs(site.name)[0]
        container = nn.Module()
        for name, layer in layers.items():
            container.add_module(name, layer)
        self._rewrite(runs, [(f"{site.name}.{piece.name}", piece.geometry) for piece in pieces])
        self._prepare(site.name, container.train(next(iter(layers.values())).training), info)
        return pieces_of(layers)

    def restore(self, site: Site, piece: Piece) -> Piece:
        layer = original_layer(self._chains[site.name], piece, self._layers(site.name))
        self._rewrite(self._runs(site.name)[0], [(site.name, site.geometry)])
        self._prepare(site.name, layer, None)
        return pieces_of({"": layer})[0]

    def neighbours(self) -> dict[str, Neighbour]:
        if self._neighbours is None:
            chains = layers_of_chains({name: self.model.get_submodule(name) for name in self._chains})
            self._neighbours = read_neighbours(self.model, self._graph, chains=chains, containers=False)
        return self._neighbours

    def fuse(self, names: Sequence[str], at: str, layer: nn.Module) -> dict[str, str]:
        fusion = Fusion.of(self.neighbours(), names, at, layer)
        runs = [[node] for alias in fusion.members[0].aliases for node in self._nodes.get(alias, ())]
        for run in runs:
            while len(run) < len(names):
                run.extend(run[-1].users)
        self._rewrite(runs, [(at, Geometry.of(layer))])
        for member in fusion.members:
            if member.name != at:
                self._removed += member.aliases
        self._opened.update(fusion.opened)
        self._prepare(at, layer, None)
        return fusion.effects("its nodes are gone")

    def drop(self, name: str) -> str | None:
        member = self.neighbours()[name]
        for alias in member.aliases:
            for node in self._nodes.get(alias, ()):
                node.replace_all_uses_with(node.all_input_nodes[0])
                self._graph.erase_node(node)
        self._removed += member.aliases
        return None

    def commit(self) -> nn.Module:
        self._undo = undo = Undo()
        if not self._prepared and not self._removed:
            return self.model
        model = self.model
        try:
            chains = dict(self._chains)
            for name, (module, info) in self._prepared.items():
                self._place(name, module, undo)
                chains.pop(name, None)
                if info is not None:
                    chains[name] = info
            for name in self._removed:
                self._unplace(name, undo)
            for name in self._opened:
                chains.pop(name, None)
            self._graph.lint()
            meta, graph, observed = dict(model.meta), model.graph, self._observed
            undo.later(lambda: setattr(self, "_observed", observed))
            self._observed = {}  # from here on the nodes know, and their names are given anew
            undo.later(lambda: setattr(model, "meta", meta))
            undo.later(lambda: setattr(model, "graph", graph))
            model.graph = self._graph
            model.meta[CHAINS] = chains
        except BaseException:
            undo()
            raise
        self._read()
        return model

    def rollback(self) -> None:
        self._undo()
        self._read()

    def _prepare(self, name: str, module: nn.Module, info: ChainInfo | None) -> None:
        self._prepared[name] = (module, info)
        if self._private:
            self._place(name, module, Undo())

    def _place(self, name: str, module: nn.Module, undo: Undo) -> None:
        assign(self.model, self._aliases.get(name, (name,)), module, undo)

    def _unplace(self, alias: str, undo: Undo) -> None:
        """Take out a module that no node calls any more, and the containers that it leaves empty."""
        path, _, child = alias.rpartition(".")
        undo.remove(self.model.get_submodule(path)._modules, child)
        holder = self.model.get_submodule(path)
        while path and type(holder) is nn.Module and not (holder._modules or holder._parameters or holder._buffers):
            path, _, child = path.rpartition(".")
            holder = self.model.get_submodule(path)
            undo.remove(holder._modules, child)

    def _read(self) -> None:
        """Everything that is derived from the model, anew."""
        there = {name for name, module in self.model.named_modules(remove_duplicate=False) if module._modules}  # others were taken out since
        self._chains: Mapping[str, ChainInfo] = {name: info for name, info in self.model.meta.get(CHAINS, {}).items() if name in there}
        self._graph = copy.deepcopy(self.model.graph)
        self._nodes: dict[str, list[fx.Node]] = {}
        self._readers: dict[str, str] = {}  # by name of a layer, the node that reads its weight or bias by itself
        for node in self._graph.nodes:
            if node.name in self._observed:
                node.meta["tensor_meta"] = self._observed[node.name]
            if node.op == "call_module":
                self._nodes.setdefault(node.target, []).append(node)
            elif node.op == "get_attr":
                layer, _, key = node.target.rpartition(".")
                self._readers.setdefault(layer, f"its {key} is read by node {node.name} (get_attr)")
        self._prepared: dict[str, tuple[nn.Module, ChainInfo | None]] = {}
        self._removed: list[str] = []
        self._opened: set[str] = set()
        self._neighbours = None
        found = find_layers(self.model, self._plain)
        self._amount_to = {f.names[0]: f.module for f in found if f.module is not self.model.get_submodule(f.names[0])}
        self._tied: dict[str, str] = {}
        self._aliases = {f.names[0]: f.names for f in found}
        self._order: list[tuple[str, str | None]] = []  # names and reasons only: no layer is to be kept alive by this list
        owners = {f"{name}.{child}": name for name in self._chains for child, _ in self.model.get_submodule(name).named_children()}
        seen: set[str] = set()
        for item in found:
            name = owners.get(item.names[0], item.names[0])
            if name not in seen:
                self._order.append((name, item.keep))
                seen.add(name)
                if item.tied_to is not None:
                    self._tied[name] = owners.get(item.tied_to, item.tied_to)
                if name in self._chains:
                    child = item.names[0].removeprefix(name)
                    self._aliases[name] = tuple(alias.removesuffix(child) for alias in item.names)

    def _layers(self, name: str) -> dict[str, nn.Module]:
        return dict(self.model.get_submodule(name).named_children())

    def _layer_site(self, name: str, keep: str | None) -> Site:
        module, names = self._layer(name), self._aliases[name]
        nodes = [node for alias in names for node in self._nodes.get(alias, ())]
        keep = keep or next((self._readers[alias] for alias in names if alias in self._readers), None)
        if not nodes:
            keep = keep or "no node of the graph calls it: it is unused, or inside a module that the graph calls as a whole"
        elif has_hooks(module):
            keep = keep or "it has hooks, which nodes for its parts would not run"
        elif any(not _takes_its_input_alone(n) for n in nodes):
            keep = keep or "a node calls it with more than its input"
        elif isinstance(module, Chain):
            keep = "the graph calls this chain as a whole; trace the model anew to see its layers"
        calls = _calls([[n] for n in nodes])
        if calls is not None and not isinstance(module, Chain):  # a subclass may take what a layer of its attributes cannot
            fits = Geometry.of(module).fits
            calls = tuple(call for call in calls if fits(call.input_shape))
        return site_of(Found(module, names, keep, self._tied.get(name)), calls, lambda: self._layer(name))

    def _layer(self, name: str) -> nn.Module:
        """The layer of this name, or the plain one that it amounts to."""
        return self._amount_to.get(name) or self.model.get_submodule(name)

    def _chain_site(self, name: str) -> Site:
        info = self._chains[name]
        layers = self._layers(name)
        like = telling_numbers(next(iter(layers.values())))
        bias = list(layers.values())[-1]._parameters.get("bias")
        changed = changed_since_cut(layers, info)
        runs, broken = self._runs(name) if changed is None else ([], changed)
        read = next((self._readers[f"{a}.{child}"] for a in self._aliases[name] for child in layers if f"{a}.{child}" in self._readers), None)
        return Site(
            name=name,
            aliases=self._aliases[name],
            layer=type(info.original).__name__,
            geometry=Geometry.of(info.original),
            bias=None if bias is None else bias.detach(),
            dtype=like.dtype,
            device=like.device,
            calls=_calls(runs) if changed is None else None,
            keep=broken or read,
            tied_to=self._tied.get(name),
            chain=info.factorization,
            read_weight=lambda: merge(pieces_of(self._layers(name)), info).weight.detach(),
            read_pieces=lambda: pieces_of(self._layers(name)),
        )

    def _runs(self, name: str) -> tuple[list[list[fx.Node]], str | None]:
        """The chain's calls, each as its nodes in order (in the graph under edit), and why they are no longer whole, if so."""
        info = self._chains[name]
        layers = self._layers(name)
        has_bias = list(layers.values())[-1]._parameters["bias"] is not None
        shapes = kind_of(info.factorization).shapes(Geometry.of(info.original), info.factorization, has_bias)
        targets = [f"{name}.{shape.name}" for shape in shapes]
        calls = {target: self._nodes.get(target, []) for target in targets}
        runs: list[list[fx.Node]] = []
        for first in calls[targets[0]]:
            run = [first]
            for target in targets[1:]:
                users = list(run[-1].users)
                if len(users) != 1 or users[0].target != target or users[0].op != "call_module":
                    return runs, "its layers are no longer called one right after the other"
                run.append(users[0])
            runs.append(run)
        if any(len(nodes) != len(runs) for nodes in calls.values()):
            return runs, "its layers are also called on their own"
        if any(not _takes_its_input_alone(node) for run in runs for node in run):
            return runs, "a node calls one of its layers with more than its input"
        return runs, None

    def _rewrite(self, runs: Sequence[Sequence[fx.Node]], steps: Sequence[tuple[str, Geometry]]) -> None:
        """In the graph under edit, replace each run of nodes by calls of the given targets, with shapes in ``meta``."""
        for run in runs:
            first, last = run[0], run[-1]
            value = first.all_input_nodes[0]
            shape = value.meta.get("tensor_meta")
            for target, geometry in steps:
                with self._graph.inserting_before(first):  # where the input is what it was, whatever works in place on it later
                    # created by hand: the target's module comes only with the commit
                    value = self._graph.create_node("call_module", target, (value,))
                value.meta = {k: v for k, v in last.meta.items() if k != "tensor_meta"}
                if shape is not None:
                    empty = torch.empty(geometry.output_shape(tuple(shape.shape)), device="meta")
                    shape = shape._replace(shape=empty.shape, stride=empty.stride())
                    value.meta["tensor_meta"] = shape
            last.replace_all_uses_with(value)
            for node in reversed(run):
                self._graph.erase_node(node)


def _takes_its_input_alone(node: fx.Node) -> bool:
    """Whether a call has one argument, which another node gives: no output size, constant or not."""
    given = (*node.args, *node.kwargs.values())
    return len(given) == 1 and isinstance(given[0], fx.Node)


def _calls(runs: Sequence[Sequence[fx.Node]]) -> tuple[Call, ...] | None:
    """Shapes of each run's input and output, or None where a node does not know its shape."""
    calls = []
    for run in runs:
        inputs = [n.meta.get("tensor_meta") for n in run[0].all_input_nodes]
        output = run[-1].meta.get("tensor_meta")
        if output is None or not inputs or inputs[0] is None:
            return None
        calls.append(Call(tuple(inputs[0].shape), tuple(output.shape)))
    return tuple(calls)
