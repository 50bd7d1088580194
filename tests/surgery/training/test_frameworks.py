"""The callbacks for Lightning and Hugging Face's Trainer: real runs, cut on the way, and gone on from a checkpoint to the same numbers."""

from __future__ import annotations

import contextlib
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

import surgery
from passes.errors import MissingExtra, SurgeryTypeError, SurgeryValueError
from surgery import DecompositionSchedule
from surgery.zoo.torchvision_ops import import_torchvision

EPOCHS, CUT, STOP, BATCHES = 4, 1, 3, 3
X = torch.randn(BATCHES * 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 4, (BATCHES * 4,), generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def schedule(**more):
    return DecompositionSchedule(CUT, ranks=0.5, warm_up=5, decay="product", guard="none", **more)


def frameworks(name):
    """torchvision's compiled operators may not load; the frameworks import it through others."""
    with contextlib.suppress(MissingExtra):
        import_torchvision()
    return pytest.importorskip(name)


@pytest.fixture
def lightning():
    found = frameworks("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield found.pytorch


def module_for(pl):
    class Task(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            x, y = batch
            return functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Task()


def trained(pl, folder, epochs, callback, module, checkpoint=None):
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback], default_root_dir=folder, enable_checkpointing=False, **options)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


def test_lightning_cuts_on_the_way_and_goes_on_from_a_checkpoint(lightning, tmp_path):
    from surgery.training.lightning import DecompositionCallback

    whole = module_for(lightning)
    trained(lightning, tmp_path, EPOCHS, DecompositionCallback(schedule(), part="net"), whole)
    assert surgery.report(whole.net)["2"].status == "decomposed"
    half = module_for(lightning)
    trained(lightning, tmp_path, STOP, DecompositionCallback(schedule(), part="net"), half).save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback = module_for(lightning), DecompositionCallback(schedule(), part="net")
    callback.resume(tmp_path / "half.ckpt", resumed)
    trained(lightning, tmp_path, EPOCHS, callback, resumed, tmp_path / "half.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_lightning_by_steps_on_the_whole_module_and_wrong_arguments(lightning, tmp_path):
    from surgery.training.lightning import DecompositionCallback

    module = module_for(lightning)
    callback = DecompositionCallback(DecompositionSchedule(4, 7, 0.5), unit="step")
    trained(lightning, tmp_path, 2, callback, module)
    assert surgery.report(module)["net.2"].status == "decomposed"
    trained(lightning, tmp_path, 3, DecompositionCallback(DecompositionSchedule(0, ranks=0.4), part="net"), module_for(lightning))
    with pytest.raises(SurgeryTypeError, match="DecompositionSchedule"):
        DecompositionCallback(3)
    with pytest.raises(SurgeryValueError, match="unit"):
        DecompositionCallback(schedule(), unit="hour")
    with pytest.raises(SurgeryValueError, match="no state"):
        callback.resume({"callbacks": {}}, module)
    with pytest.raises(SurgeryValueError, match="no submodule 'nets'"):
        trained(lightning, tmp_path, 1, DecompositionCallback(schedule(), part="nets"), module_for(lightning))


class Task(nn.Module):
    """As Hugging Face's Trainer has it: the loss is among the outputs."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, pixels, labels=None):
        logits = self.net(pixels)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_cuts_on_the_way_and_goes_on_from_a_checkpoint(tmp_path):
    transformers = frameworks("transformers")
    pytest.importorskip("accelerate")
    from surgery.training.hugging_face import DecompositionCallback

    data = [{"pixels": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def train(folder, callback, model, epochs=EPOCHS, resume=None):
        options = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "epoch", "logging_strategy": "no", "max_grad_norm": 0}
        rates = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "weight_decay": 0.01, "seed": 5}
        args = transformers.TrainingArguments(str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, **options, **rates)
        trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[callback])
        trainer.train(resume_from_checkpoint=resume)

    whole = Task()
    train(tmp_path / "whole", DecompositionCallback(schedule()), whole)
    assert surgery.report(whole)["net.2"].status == "decomposed"
    checkpoint = tmp_path / "whole" / f"checkpoint-{STOP * BATCHES}"
    resumed, callback = Task(), DecompositionCallback(schedule())
    callback.resume(checkpoint, resumed)
    train(tmp_path / "resumed", callback, resumed, resume=str(checkpoint))
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    cuts = DecompositionCallback(schedule())
    seen = []
    cuts.schedule.step = lambda position, *_, **__: seen.append(position)
    state = SimpleNamespace(epoch=0.0)
    for state.epoch in (0.0, 0.999999999, 1.67, 2.0):  # in between where it was saved in the middle of an epoch
        cuts.on_epoch_begin(None, state, None, model=None, optimizer=None)
    assert seen == [0, 1, 1, 2]
    (checkpoint / "surgery_schedule.json").write_text("{")
    with pytest.raises(SurgeryValueError, match="not JSON"):
        callback.resume(checkpoint, Task())


def test_the_best_of_hugging_face_is_of_the_architecture_that_there_is(tmp_path):
    transformers = frameworks("transformers")
    pytest.importorskip("accelerate")
    from surgery.training.hugging_face import DecompositionCallback

    data = [{"pixels": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    epochs = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "save_strategy": "epoch", "eval_strategy": "epoch"}
    args = transformers.TrainingArguments(
        str(tmp_path), **epochs, learning_rate=1.0, load_best_model_at_end=True, metric_for_best_model="worse", report_to=[], disable_tqdm=True
    )
    seen = []

    def worse(_):  # the network from before the cut is the best of all
        seen.append(len(seen))
        return {"worse": -float(seen[-1])}

    model = Task()
    trainer = transformers.Trainer(
        model, args, train_dataset=data, eval_dataset=data, compute_metrics=worse, callbacks=[DecompositionCallback(schedule())]
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * BATCHES}")
    assert surgery.report(model)["net.2"].status == "decomposed"


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_without_the_framework_the_error_names_the_extra(name, monkeypatch):
    import importlib
    import sys

    module = {"lightning": "surgery.training.lightning", "transformers": "surgery.training.hugging_face"}[name]
    for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"'\.\[{name}\]' in a checkout"):
        importlib.import_module(module)


def test_hugging_face_by_steps_and_what_its_callback_refuses(tmp_path):
    frameworks("transformers")
    from surgery.training.hugging_face import DecompositionCallback

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    known = {"model": model, "optimizer": optimizer}
    callback = DecompositionCallback(DecompositionSchedule(2, ranks={"2": 0.5}), unit="step")
    state = SimpleNamespace(epoch=9.0, global_step=1, is_world_process_zero=False)
    args = SimpleNamespace(world_size=1, output_dir=str(tmp_path))
    callback.on_train_begin(args, state, None, **known)
    callback.on_epoch_begin(args, state, None, **known)  # epochs are not what it counts
    callback.on_step_begin(args, state, None, **known)
    assert surgery.report(model)["2"].status == "kept"
    state.global_step = 2
    callback.on_step_begin(args, state, None, **known)
    assert surgery.report(model)["2"].status == "decomposed"
    (tmp_path / "checkpoint-2").mkdir()
    callback.on_save(args, state, None)  # another process writes it
    assert list((tmp_path / "checkpoint-2").iterdir()) == []
    with pytest.raises(SurgeryTypeError, match="wrapped the model for several processes"):
        callback.on_train_begin(SimpleNamespace(world_size=2), state, None, **known)
    by_epochs = DecompositionCallback(DecompositionSchedule(0, ranks={"2": 0.25}))
    by_epochs.on_step_begin(args, state, None, **known)
    assert by_epochs.schedule.cuts_done == 0


def test_lightning_in_several_processes_is_refused():
    frameworks("lightning")
    from surgery.training.lightning import DecompositionCallback

    with pytest.raises(SurgeryTypeError, match="wrapped the module for several processes"):
        DecompositionCallback(schedule()).on_fit_start(SimpleNamespace(world_size=2), None)


def test_lightning_that_wraps_the_module_in_one_process_is_refused():
    frameworks("lightning")
    from surgery.training.lightning import DecompositionCallback

    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self):
            nn.Module.__init__(self)

    callback, strategy = DecompositionCallback(schedule()), SimpleNamespace(model=Wrapped())
    with pytest.raises(SurgeryTypeError, match="wrapped the module"):
        callback.on_fit_start(SimpleNamespace(world_size=1, strategy=strategy), None)
    strategy.model = network()
    callback.on_fit_start(SimpleNamespace(world_size=1, strategy=strategy), None)


def pair_for(pl):
    """Two networks, each with an optimizer of its own, as a generator and a discriminator."""

    class Pair(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.first, self.second = network(), network()

        def training_step(self, batch, index):
            for optimizer, net in zip(self.optimizers(), (self.first, self.second), strict=True):
                optimizer.zero_grad()
                self.manual_backward(functional.cross_entropy(net(batch[0]), batch[1]))
                optimizer.step()
            self.log("score", -float(self.current_epoch))

        def configure_optimizers(self):
            return [torch.optim.SGD(self.first.parameters(), 0.1), torch.optim.SGD(self.second.parameters(), 0.1)]

    return Pair()


def test_lightning_two_parts_each_with_their_own_optimizer(lightning, tmp_path):
    from surgery.training.lightning import DecompositionCallback

    module, rates = pair_for(lightning), []
    callbacks = [DecompositionCallback(DecompositionSchedule(1, ranks=0.5, warm_up=2 * BATCHES, rate=1), part="first")]
    callbacks.append(DecompositionCallback(DecompositionSchedule(2, ranks=0.25), part="second"))
    assert callbacks[0].state_key != callbacks[1].state_key

    class Look(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            for optimizer in trainer.optimizers:
                optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:  # behind the hooks of the warm-up
                for number, optimizer in enumerate(trainer.optimizers):
                    optimizer.register_step_pre_hook(lambda o, *_, number=number: rates.append((number, o.param_groups[0]["lr"])))

    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=3, callbacks=[*callbacks, Look()], default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4))
    assert surgery.report(module.first)["2"].status == surgery.report(module.second)["2"].status == "decomposed"
    seen = [rate for rate in rates if isinstance(rate, tuple)]
    assert [rate for number, rate in seen if number == 0] == pytest.approx([0.1 * k / 7 for k in range(1, 7)])
    assert {rate for number, rate in seen if number == 1} == {0.1}
    trainer.save_checkpoint(tmp_path / "both.ckpt")
    fresh = pair_for(lightning)
    for part, cut_at in (("first", 1), ("second", 2)):
        DecompositionCallback(DecompositionSchedule(cut_at, ranks=0.5), part=part).resume(tmp_path / "both.ckpt", fresh)
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in module.named_parameters()]


def test_nobody_stops_early_for_what_the_network_was_before_the_cut(lightning, tmp_path):
    """The score falls from epoch to epoch, and two falls in a row would end the run."""
    from surgery.training.lightning import DecompositionCallback

    module = pair_for(lightning)
    stopper = lightning.callbacks.EarlyStopping("score", mode="max", patience=2, check_on_train_epoch_end=True)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [DecompositionCallback(DecompositionSchedule(2, ranks=0.5), part="first"), stopper]
    trainer = lightning.Trainer(max_epochs=9, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4))
    assert stopper.stopped_epoch == 4  # the best is that of epoch 2; without the cut it would have been that of epoch 0


def test_the_best_of_lightning_is_of_the_architecture_that_there_is(lightning, tmp_path):
    """The score falls from epoch to epoch: without the cut the first would stay the best."""
    from surgery.training.lightning import DecompositionCallback

    module = pair_for(lightning)
    saver = lightning.callbacks.ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    options = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [DecompositionCallback(DecompositionSchedule(1, ranks=0.5), part="first"), saver]
    trainer = lightning.Trainer(max_epochs=3, callbacks=callbacks, default_root_dir=tmp_path, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4))
    best = torch.load(saver.best_model_path, weights_only=True)
    assert best["epoch"] == 1
    assert set(best["state_dict"]) == set(module.state_dict())
