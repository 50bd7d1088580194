"""Surgery in place on a module of any class: a chain stands at the layer's own name on its parent, at every alias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from passes.capture import trace
from passes.chain import Chain, ChainInfo, chain_module, cut_chain, cut_layer, original_layer, pieces_of
from passes.effective import effective_layer
from passes.errors import SurgeryError, SurgeryValueError
from passes.factorization import Factorization
from passes.geometry import Piece
from passes.graph_host import GraphHost
from passes.graph_meta import decomposed_graphs
from passes.host import Host, Undo, site_of
from passes.neighbours import Neighbour, read_neighbours, sequence_graph, unproved
from passes.parity import assert_parity
from passes.placing import Fusion, layers_of_chains, place_in_modules
from passes.running import outputs_in_a_row, proof_runs
from passes.site import Call, Found, Site, find_layers, kept_together, named_groups
from passes.watching import Observation, observe_module

__all__ = ["ModuleHost"]


class ModuleHost(Host):
    """Host for any ``nn.Module``; works in place on the model it is given.

    Args:
        model: the module; if it is itself a layer or a chain, ``commit`` returns its replacement.
        example_inputs: with them, sites know their calls and who else reads their weights, and a verified trace can prove who reads what. A
            tensor, a tuple of positional or a mapping of keyword arguments.
        observed: what the inputs tell, where it is known already (see ``observe_module``).
        private: see ``Host``.
        effective_weights: layers whose weight is computed are sites with the weight that it amounts to now (see ``effective_layer``).
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any = None,
        *,
        observed: Observation | None = None,
        private: bool = False,
        effective_weights: bool = False,
    ) -> None:
        self.model = model
        self._plain = effective_layer if effective_weights else None
        self._private = private
        self._inputs = example_inputs
        seen = observe_module(model, example_inputs) if observed is None and example_inputs is not None else observed
        self._calls: Mapping[str, tuple[Call, ...]] | None = None if seen is None else seen.calls
        self._norms: Mapping[str, tuple[Call, ...]] = {} if seen is None else seen.norms
        self._readers: Mapping[str, str] = {} if seen is None else seen.readers
        self._graphs = {
            name: GraphHost(graph, private=private, effective_weights=effective_weights) for name, graph in decomposed_graphs(model).items()
        }
        self._neighbours: dict[str, Neighbour] | None = None
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
        return kept_together(sites)

    def replace(self, site: Site, factorization: Factorization, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        graph = self._graph_around(site.name)
        if graph is not None:
            return self._graphs[graph].replace(_inward(graph, site), factorization, pieces)
        module = self._found[site.name].module
        if isinstance(module, Chain):
            layers, info = cut_chain(dict(module.named_children()), module.__dict__["_surgery"], factorization, pieces)
        else:
            layers, info = cut_layer(module, factorization, pieces)
        self._prepare(site.name, chain_module(layers, info).train(module.training))
        return pieces_of(layers)

    def restore(self, site: Site, piece: Piece) -> Piece:
        graph = self._graph_around(site.name)
        if graph is not None:
            return self._graphs[graph].restore(_inward(graph, site), piece)
        chain = self._found[site.name].module
        info: ChainInfo = chain.__dict__["_surgery"]
        layer = original_layer(info, piece, dict(chain.named_children()), hooks_from=chain)
        self._prepare(site.name, layer)
        return pieces_of({"": layer})[0]

    def neighbours(self) -> dict[str, Neighbour]:
        if self._neighbours is None:
            self._neighbours = self._prove_neighbours()
        return self._neighbours

    def fuse(self, names: Sequence[str], at: str, layer: nn.Module) -> dict[str, str]:
        fusion = Fusion.of(self.neighbours(), names, at, layer)
        self._fusions.append(fusion)
        return fusion.effects("now an Identity: its parent calls it")

    def drop(self, name: str) -> str | None:
        return "its parent calls it; on the graph (surgery.trace) its node can go"

    def commit(self) -> nn.Module:
        self._undo = undo = Undo()
        proof = proof_runs(self.model, self._inputs) if self._fusions and self._traced else None
        try:
            for graph in self._graphs.values():
                graph.commit()
                undo.later(graph.rollback)
            for name, module in self._prepared.items():
                self._place(name, module, undo)
            self._place_fusions(proof, undo)
        except BaseException:
            undo()
            self._prepared = {}
            self._find()  # nothing prepared is left over for another try
            raise
        if self._prepared or self._graphs or self._private:
            self._neighbours = None
        self._prepared = {}
        return self.model

    def rollback(self) -> None:
        self._undo()
        self._find()

    def _find(self) -> None:
        """Layers and chains outside decomposed graphs by name, and the order of all: the graphs' own stand where their first layer does."""
        self._found: dict[str, Found] = {}
        self._order: list[str] = []
        self._neighbours = None
        self._fusions: list[Fusion] = []
        self._traced = False
        self._astride: set[str] = set()  # names of layers that are both inside a decomposed graph and outside of it
        for found in find_layers(self.model, self._plain):
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

    def _prove_neighbours(self) -> dict[str, Neighbour]:
        """By a verified trace where there are inputs and it can be had, else by structure, else not at all."""
        chains = layers_of_chains({n[0]: m for m, n in named_groups(self.model) if isinstance(m, Chain)})
        graph, reason = sequence_graph(self.model), "not provable without example_inputs: code of its own may read what goes between its layers"
        self._traced = False
        if self._inputs is not None:
            try:
                graph, self._traced = trace(self.model, self._inputs).graph, True
            except SurgeryValueError:  # it does not accept the inputs
                raise
            except SurgeryError as error:
                reason = f"not provable: {str(error).partition(';')[0]}"
        if graph is None:
            return unproved(self.model, reason, chains)
        inner = {n[0]: graph for _, n in named_groups(self.model) for graph in (self._graph_around(n[0]),) if graph is not None}
        keep = {name: f"it is a layer of the decomposed graph {graph}; clean that graph up by itself" for name, graph in inner.items()}
        calls = None if self._calls is None else {**self._norms, **self._calls}
        return read_neighbours(self.model, graph, chains=chains, containers=True, keep=keep, calls=calls)

    def _place_fusions(self, proof: tuple[Sequence[Any], Sequence[Any]] | None, undo: Undo) -> None:
        """Fused layers in their places, believed where a trace was the proof only if the model still computes what it did."""
        if not self._fusions:
            return
        place_in_modules(self.model, self._fusions, undo)
        if proof is not None:
            try:
                for got, expected in zip(outputs_in_a_row(self.model, proof[0]), proof[1], strict=True):
                    assert_parity(got, expected, training=True, what="the model before and after")
            except SurgeryError as error:
                raise SurgeryError(
                    f"{type(self.model).__name__} no longer computes the same with {', '.join(f.at for f in self._fusions)} fused ({error}): its "
                    "code reads more of these layers than their outputs; work on its graph instead (surgery.trace)"
                ) from error
        if self._calls is not None:
            before, calls = self._calls, dict(self._calls)
            undo.later(lambda: setattr(self, "_calls", before))
            for fusion in self._fusions:
                calls |= {m.name: m.calls for n in fusion.opened for m in self.neighbours().values() if m.chain == n and m.calls is not None}
            for fusion in self._fusions:
                for member in fusion.members:
                    calls.pop(member.name, None)
                if fusion.calls is not None:
                    calls[fusion.at] = fusion.calls
            self._calls = calls
        self._find()

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
                if undo is not None:
                    undo.later(partial(setattr, self, "model", self.model))
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
        tied_to = None if site.tied_to is None else f"{graph}.{site.tied_to}"
        shared = next((other for other in sorted(self._astride) if other.startswith(name + ".")), None)
        keep = site.keep or (f"its layer {shared} is also used outside of its graph" if shared else self._readers.get(name))
        return replace(site, name=name, aliases=tuple(f"{graph}.{alias}" for alias in site.aliases), calls=calls, keep=keep, tied_to=tied_to)

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
