"""Surgery in place on a module of any class: a chain stands at the layer's own name on its parent, at every alias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from passes.chain import Chain, ChainInfo, cut_chain, cut_layer, original_layer
from passes.factorization import Factorization
from passes.geometry import Piece
from passes.graph_host import GraphHost
from passes.graph_meta import decomposed_graphs
from passes.host import Host, Undo, site_of
from passes.site import Call, Found, Site, find_layers
from passes.watching import Observation, observe_module

__all__ = ["ModuleHost"]


class ModuleHost(Host):
    """Host for any ``nn.Module``; works in place on the model it is given.

    Args:
        model: the module; if it is itself a layer or a chain, ``commit`` returns its replacement.
        example_inputs: with them, sites know their calls and who else reads their weights. A tensor, a tuple of positional or a mapping of
            keyword arguments.
        observed: what the inputs tell, where it is known already (see ``observe_module``).
        private: see ``Host``.
    """

    def __init__(self, model: nn.Module, example_inputs: Any = None, *, observed: Observation | None = None, private: bool = False) -> None:
        self.model = model
        self._private = private
        seen = observe_module(model, example_inputs) if observed is None and example_inputs is not None else observed
        self._calls: Mapping[str, tuple[Call, ...]] | None = None if seen is None else seen.calls
        self._readers: Mapping[str, str] = {} if seen is None else seen.readers
        self._graphs = {name: GraphHost(graph, private=private) for name, graph in decomposed_graphs(model).items()}
        self._find()
        self._prepared: dict[str, nn.Module] = {}
        self._undo = Undo()

    def sites(self) -> tuple[Site, ...]:
        sites: list[Site] = []
        for name in self._order:
            if name in self._graphs:
                outward = [self._outward(name, site) for site in self._graphs[name].sites()]
                sites += [site for site in outward if not self._astride.intersection(site.aliases)]
            else:
                sites.append(site_of(self._found[name], self._calls_of(name, name), self._module_at(name)))
        return tuple(sites)

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> None:
        graph = self._graph_around(site.name)
        if graph is not None:
            self._graphs[graph].replace(_inward(graph, site), factorization, pieces)
            return
        module = self._found[site.name].module
        if isinstance(module, Chain):
            layers, info = cut_chain(dict(module.named_children()), module.__dict__["_surgery"], factorization, pieces)
        else:
            layers, info = cut_layer(module, factorization, pieces)
        self._prepare(site.name, Chain(layers, info).train(module.training))

    def restore(self, site: Site, piece: Piece) -> None:
        graph = self._graph_around(site.name)
        if graph is not None:
            self._graphs[graph].restore(_inward(graph, site), piece)
            return
        chain = self._found[site.name].module
        info: ChainInfo = chain.__dict__["_surgery"]
        self._prepare(site.name, original_layer(info, piece, dict(chain.named_children()), hooks_from=chain))

    def commit(self) -> nn.Module:
        self._undo = undo = Undo()
        try:
            for graph in self._graphs.values():
                graph.commit()
                undo.later(graph.rollback)
            for name, module in self._prepared.items():
                self._place(name, module, undo)
        except BaseException:
            undo()
            raise
        self._prepared = {}
        return self.model

    def rollback(self) -> None:
        self._undo()
        self._find()

    def _find(self) -> None:
        """Layers and chains outside decomposed graphs by name, and the order of all: the graphs' own stand where their first layer does."""
        self._found: dict[str, Found] = {}
        self._order: list[str] = []
        self._astride: set[str] = set()  # names of layers that are both inside a decomposed graph and outside of it
        for found in find_layers(self.model):
            name, graphs = found.names[0], {self._graph_around(name) for name in found.names}
            graph = graphs.pop()
            if graphs:
                self._astride.update(found.names)
                found = replace(found, keep=f"it is both in a decomposed graph and outside of it ({', '.join(found.names)})")
            if graphs or graph is None:
                read = None if isinstance(found.module, Chain) else self._readers.get(name)
                self._found[name] = replace(found, keep=found.keep or read)
                self._order.append(name)
            elif graph not in self._order:
                self._order.append(graph)

    def _prepare(self, name: str, module: nn.Module) -> None:
        if self._private:
            self._place(name, module, None)
        else:
            self._prepared[name] = module

    def _place(self, name: str, module: nn.Module, undo: Undo | None) -> None:
        found = self._found[name]
        for alias in found.names:
            path, _, child = alias.rpartition(".")
            if alias == "":
                self.model = module
            elif undo is None:
                self.model.get_submodule(path)._modules[child] = module
            else:
                undo.assign(self.model.get_submodule(path)._modules, child, module)  # the key exists: the order of the state dict holds
        self._found[name] = replace(found, module=module)

    def _graph_around(self, name: str) -> str | None:
        """The decomposed graph module in this model that a layer is in, if it is: there chains are nodes, not modules."""
        return next((graph for graph in self._graphs if name.startswith(graph + ".")), None)

    def _outward(self, graph: str, site: Site) -> Site:
        """A site of a graph module in this model, under its name in this model and with its calls in the whole."""
        name = f"{graph}.{site.name}"
        ends = (site.pieces[0].name, site.pieces[-1].name) if site.chain is not None else None
        calls = self._calls_of(*((f"{name}.{end}" for end in ends) if ends else (name, name)))
        shared = next((other for other in sorted(self._astride) if other.startswith(name + ".")), None)
        keep = site.keep or (f"its layer {shared} is also used outside of its graph" if shared else self._readers.get(name))
        return replace(site, name=name, aliases=tuple(f"{graph}.{alias}" for alias in site.aliases), calls=calls, keep=keep)

    def _calls_of(self, first: str, last: str) -> tuple[Call, ...] | None:
        """Calls with the inputs of one module and the outputs of another, as observed."""
        if self._calls is None:
            return None
        pairs = zip(self._calls.get(first, ()), self._calls.get(last, ()), strict=False)
        return tuple(Call(a.input_shape, b.output_shape) for a, b in pairs)

    def _module_at(self, name: str) -> Callable[[], nn.Module]:
        return lambda: self._found[name].module


def _inward(graph: str, site: Site) -> Site:
    names = [alias.removeprefix(graph + ".") for alias in site.aliases]
    return replace(site, name=names[0], aliases=tuple(names))
