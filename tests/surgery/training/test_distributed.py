"""Two processes under gloo: the first cuts, both go on with the same numbers, as one process with the same global batch would."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from itertools import chain, pairwise

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import surgery
from passes.errors import SurgeryError, SurgeryTypeError, SurgeryValueError
from surgery import DecompositionSchedule

pytestmark = pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
STEPS_BEFORE, STEPS_AFTER, STEPS_WHOLE = 3, 10, 3


def network():
    """Without batch norm: its statistics differ between one process and two, with or without surgery."""
    torch.manual_seed(4)
    layers = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).double()


def batch(step, part=slice(None)):
    generator = torch.Generator().manual_seed(100 + step)
    x, y = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64), torch.randint(0, 5, (8,), generator=generator)
    return x[part], y[part]


def optimizers(model):
    convolutions = [p for p in model.parameters() if p.ndim == 4]
    rest = [p for p in model.parameters() if p.ndim != 4]
    return [torch.optim.AdamW(convolutions, 1e-3, amsgrad=True), torch.optim.SGD(rest, 0.05, momentum=0.9)]


def train(model, several, steps, part=slice(None)):
    for step in steps:
        x, y = batch(step, part)
        for optimizer in several:
            optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        for optimizer in several:
            optimizer.step()


def run(model, part=slice(None), wrap=lambda model: model):
    """Train, cut, train, fuse back, train."""
    several = optimizers(model)
    schedule = DecompositionSchedule(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER, 0.5, decay="product", guard="none")
    ends = [0, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER, STEPS_BEFORE + STEPS_AFTER + STEPS_WHOLE]
    seen = []
    for first, last in pairwise(ends):
        schedule.step(first, model, several)
        wrapped = wrap(model)
        train(wrapped, several, range(first, last), part)
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        del wrapped
    return seen


def ddp(rank, folder):
    found = run(network(), slice(rank * 4, rank * 4 + 4), DistributedDataParallel)
    torch.save(found, folder / f"{rank}.pt")


def other_ranks_differ(rank, folder):
    """Whatever the second process has, it gets what the first one has; and a look at the ranks is the first one's, too."""
    model = network()
    several = optimizers(model)
    train(model, several, range(2 + rank))  # numbers and states that differ
    twin = network()
    schedule = DecompositionSchedule(surgery.Settled(earliest=0, latest=0), ranks=0.4, guard="none")
    report = schedule.step(0, model, several, also=twin)
    states = [[optimizer.state[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in several]
    torch.save([model.state_dict(), twin.state_dict(), states, report.to_json(), schedule.state_dict()], folder / f"{rank}.pt")


def factored_states(rank, folder):
    """An optimizer whose states have other shapes than its parameters."""
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), 1e-3)
    if rank == 0:  # the second process has none yet
        train(model, [optimizer], range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that those of cut layers are begun again
        DecompositionSchedule(0, ranks={"3": (4, 4)}, guard="none").step(0, model, optimizer)
    torch.save([optimizer.state[p] for group in optimizer.param_groups for p in group["params"]], folder / f"{rank}.pt")


def failure(rank, folder):
    def rule(site, spectra):
        if rank == 0:
            raise ValueError("a rule's own")
        raise AssertionError("only the first process asks the rule")

    model = network()
    before = list(map(id, model.parameters()))
    with pytest.raises(SurgeryError, match="a rule's own" if rank == 0 else "in the first process of this run: .*a rule's own"):
        DecompositionSchedule(0, ranks=rule).step(0, model)
    assert before == list(map(id, model.parameters()))


def sharded(rank, folder):
    """Train shared out, gather and cut, share out again and go on, as docs/training.md says."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    whole, part = StateDictOptions(full_state_dict=True), slice(rank * 4, rank * 4 + 4)
    schedule = DecompositionSchedule(STEPS_BEFORE, ranks=0.5, guard="none")
    model = shared_out(network())
    optimizer = momentum(model)
    train(model, [optimizer], range(STEPS_BEFORE), part)
    with pytest.raises(SurgeryTypeError, match="before fully_shard"):
        schedule.step(STEPS_BEFORE, model, optimizer)
    numbers, state = get_state_dict(model, optimizer, options=whole)
    model = network()
    optimizer = momentum(model)
    schedule.load_state_dict(schedule.state_dict(), model, optimizer)
    set_state_dict(model, optimizer, model_state_dict=numbers, optim_state_dict=state, options=whole)
    schedule.step(STEPS_BEFORE, model, optimizer)
    numbers, state = get_state_dict(model, optimizer, options=whole)
    optimizer = momentum(shared_out(model))
    set_state_dict(model, optimizer, model_state_dict=numbers, optim_state_dict=state, options=whole)
    schedule.attach(model, optimizer)
    train(model, [optimizer], range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER), part)
    torch.save({name: p.full_tensor().detach() for name, p in model.named_parameters()}, folder / f"{rank}.pt")


def shared_out(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        if isinstance(layer, surgery.Chain | nn.Conv2d):
            fully_shard(layer)
    return fully_shard(model)


def momentum(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def accumulated(rank, folder):
    """Gradients that each process has of its own when the first one cuts, and when it fuses back."""
    model = network()
    optimizer = momentum(model)
    schedule = DecompositionSchedule(0, 1, ranks=0.5, guard="none")
    seen = []
    for position in range(2):
        x, y = batch(position, slice(rank * 4, rank * 4 + 4))
        functional.cross_entropy(model(x), y).backward()
        schedule.step(position, model, optimizer)
        seen.append([p.grad.clone() for p in model.parameters()])
    torch.save(seen, folder / f"{rank}.pt")


def unlike(rank, folder):
    """Only the first process keeps an averaged copy, as many programs do."""
    model = network()
    before = list(map(id, model.parameters()))
    with pytest.raises(SurgeryValueError, match="process 0: 2 and 1; process 1: 2 and 0"):
        DecompositionSchedule(0, ranks=0.5, guard="none").step(0, model, optimizers(model), also=network() if rank == 0 else None)
    assert before == list(map(id, model.parameters()))


def alone_in_its_norms(rank, folder):
    """The first process runs batches by itself, in train mode, through norms that would wait for the other."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.SyncBatchNorm(12), nn.ReLU(), nn.Conv2d(12, 16, 3))
    x = torch.randn(4, 3, 8, 8)
    schedule = DecompositionSchedule(0, ranks=0.5, guard="step", example_inputs=x, batch_norm=[x, x])
    schedule.step(0, model, momentum(model))
    torch.save(model.state_dict(), folder / f"{rank}.pt")


WORKS = (ddp, other_ranks_differ, factored_states, failure, sharded, accumulated, unlike, alone_in_its_norms)


def start(rank, port, folder):
    """One process: all works in turn, since starting it takes longer than any of them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", SURGERY_CACHE=str(folder))
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for work in WORKS:
        try:
            work(rank, folder / work.__name__)
        except BaseException:
            (folder / work.__name__ / f"error{rank}").write_text(traceback.format_exc())
        distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes have to say, by work."""
    folder = tmp_path_factory.mktemp("processes")
    for work in WORKS:
        (folder / work.__name__).mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [multiprocessing.get_context("spawn").Process(target=start, args=(rank, port, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
        if process.is_alive():
            process.kill()

    def of(work):
        told = "\n".join(file.read_text() for file in sorted((folder / work.__name__).glob("error*")))
        assert not told, told
        assert [process.exitcode for process in processes] == [0, 0]
        return [torch.load(file, weights_only=True) for file in sorted((folder / work.__name__).glob("*.pt"))]

    return of


def test_both_go_on_with_the_same_numbers_and_as_one_process_would(found):
    first, second = found(ddp)
    alone = run(network())
    assert [list(numbers) for numbers in first] == [list(numbers) for numbers in alone]
    assert list(first[0]) == list(first[2]) != list(first[1])
    for mine, theirs, one in zip(first, second, alone, strict=True):
        for name, value in one.items():
            assert torch.equal(mine[name], theirs[name]), name
            torch.testing.assert_close(mine[name], value, rtol=1e-7, atol=1e-9)


def test_the_others_get_what_the_first_has(found):
    first, second = found(other_ranks_differ)
    for mine, theirs in zip(first[:2], second[:2], strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "3.core.weight" in first[0]
    for mine, theirs in zip(chain(*first[2]), chain(*second[2]), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert first[3:] == second[3:]


def test_states_that_are_not_of_their_parameters_shapes_are_sent_as_they_are(found):
    first, second = found(factored_states)
    assert any("row_var" in state for state in first)
    for mine, theirs in zip(first, second, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) if isinstance(mine[key], torch.Tensor) else mine[key] == theirs[key] for key in mine)


def test_processes_that_are_not_alike_are_told_so_in_all_of_them(found):
    assert found(unlike) == []


def test_norms_that_wait_for_other_processes_do_not_when_one_looks_alone(found):
    first, second = found(alone_in_its_norms)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(first["1.running_mean"].abs().max()) > 0


def test_a_failure_of_the_first_is_told_to_all(found):
    assert found(failure) == []


def test_a_sharded_model_is_gathered_cut_and_sharded_again_and_learns_as_in_one_process(found):
    first, second = found(sharded)
    alone = network()
    optimizer = momentum(alone)
    schedule = DecompositionSchedule(STEPS_BEFORE, ranks=0.5, guard="none")
    for step in range(STEPS_BEFORE + STEPS_AFTER):
        schedule.step(step, alone, optimizer)
        train(alone, [optimizer], [step])
    assert "3.core.weight" in first
    assert first.keys() == dict(alone.named_parameters()).keys()
    for name, parameter in alone.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=1e-7, atol=1e-9)


def test_gradients_of_each_process_go_through_the_cut(found):
    """Of the mean loss of halves they are twice those of the whole batch, in sum."""
    first, second = found(accumulated)
    model = network()
    schedule = DecompositionSchedule(0, 1, ranks=0.5, guard="none")
    for position, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        x, y = batch(position)
        functional.cross_entropy(model(x), y).backward()
        schedule.step(position, model, momentum(model))
        for a, b, p in zip(mine, theirs, model.parameters(), strict=True):
            torch.testing.assert_close((a + b) / 2, p.grad, rtol=1e-4, atol=1e-6)  # least squares by iteration
