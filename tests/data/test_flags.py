"""Every flag of the trainer that concerns the data means what it says, or is refused by name."""

import itertools
import types

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from longctx_layers.data.errors import DataError
from longctx_layers.data.module import LongContextData
from longctx_layers.data.trainer_flags import check_trainer
from longctx_layers.training.module import LanguageModel

KINDS = {
    "stored": {},
    "carried": {"carry_state": True},
    "stream": {"streaming": True},
    "workers": {"streaming": True, "num_workers": 2},
}
pytestmark = pytest.mark.filterwarnings("ignore:.*num_workers|.*many workers|.*val_dataloader")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(cache):
    def make(**options):
        shape = {"seq_len": 1024, "batch_size": 8, "dataset_config": "30"}
        return LongContextData("synthetic", cache_dir=cache, **{**shape, **options})

    return make


class Recorder(lightning.LightningModule):
    """Remembers the batches of each epoch, and how many validations there were."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs, self.validations = [], []

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        if not self.epochs:  # resumed within an epoch
            self.epochs.append([])
        self.epochs[-1].append(torch.cat([batch["ids"], batch["segment_ids"]]).flatten())
        return self.weight * batch["ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.validations.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, resume=None, save=None, **options):
    module = Recorder()
    callbacks = []
    if save is not None:
        callbacks = [ModelCheckpoint(save, "{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = lightning.Trainer(
        callbacks=callbacks, enable_checkpointing=save is not None, logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        **{"num_sanity_val_steps": 0, "limit_val_batches": 1, "max_epochs": -1, **options},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module


def same(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(map(torch.equal, one, other))


def seen(module):
    return list(itertools.chain(*module.epochs))


@pytest.fixture(scope="module")
def passes():
    """The batches of two passes and more, by kind of data."""
    return {}


def whole(make, passes, kind):
    if kind not in passes:
        data = make(**KINDS[kind])
        data.setup("fit")
        loader = data.train_dataloader()
        passes[kind] = [
            [torch.cat([b["ids"], b["segment_ids"]]).flatten() for b in loader] for _ in range(3)
        ]
    return passes[kind]


# ---- Batches of an epoch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_overfitting_has_the_same_batches_in_every_epoch(make, passes, kind, count):
    data = make(**KINDS[kind])
    first = whole(make, passes, kind)[0]
    expected = first[:count]
    if data.streaming:  # its length is not known: begun again
        expected = list(itertools.islice(itertools.cycle(first), count))
    module = fit(data, overfit_batches=count, max_epochs=3, limit_val_batches=0)
    assert len(module.epochs) == 3
    for epoch in module.epochs:
        assert same(epoch, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_leaves_no_document_unseen(make, passes, kind):
    """Epochs of a stream follow each other; stored ones are other parts of other orders."""
    epochs = whole(make, passes, kind)
    assert len(epochs[0]) not in (3, 6)  # a pass ends within an epoch
    module = fit(make(**KINDS[kind]), limit_train_batches=3, max_epochs=3)
    assert [len(epoch) for epoch in module.epochs] == [3, 3, 3]
    if kind in ("stream", "workers"):
        assert same(seen(module), list(itertools.chain(*epochs))[:9])
    else:
        assert all(same(got, epoch[:3]) for got, epoch in zip(module.epochs, epochs, strict=True))


def test_fractions(make, passes):
    epochs = whole(make, passes, "stored")
    half = len(epochs[0]) // 2
    module = fit(make(), limit_train_batches=0.5, max_epochs=2)
    assert all(same(got, epoch[:half]) for got, epoch in zip(module.epochs, epochs, strict=False))
    module = fit(make(validation_fraction=0.0), overfit_batches=0.5, max_epochs=2)
    assert same(*module.epochs)
    for name in ("limit_train_batches", "overfit_batches", "val_check_interval"):
        with pytest.raises(DataError, match=f"trainer.{name}: expected a number of batches, since"):
            fit(make(streaming=True), max_epochs=1, **{name: 0.5})


HARMLESS = [
    {"num_sanity_val_steps": -1},
    {"reload_dataloaders_every_n_epochs": 1},
    {"val_check_interval": 2, "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": 2, "limit_val_batches": 1.0},
    {"use_distributed_sampler": False},
    {"accumulate_grad_batches": 2},
]


@pytest.mark.parametrize("kind", ["stored", "stream"])
@pytest.mark.parametrize("options", HARMLESS, ids=str)
def test_flags_that_leave_training_as_it_is(make, passes, kind, options):
    module = fit(make(**KINDS[kind]), max_epochs=3, **options)
    expected = whole(make, passes, kind)
    assert len(module.epochs) == 3
    for got, epoch in zip(module.epochs, expected, strict=True):
        assert same(got, epoch)


def test_fast_dev_run(make, passes):
    for kind in ("stored", "stream"):
        module = fit(make(**KINDS[kind]), fast_dev_run=2)
        assert same(seen(module), whole(make, passes, kind)[0][:2])
        assert len(module.validations) == 1


# ---- Resumption

LIMITS = [
    {"overfit_batches": 3},
    {"limit_train_batches": 3},
    {"limit_train_batches": 3, "reload_dataloaders_every_n_epochs": 1},
    {"reload_dataloaders_every_n_epochs": 2, "num_sanity_val_steps": 1},
    {"limit_train_batches": 4, "val_check_interval": 3, "check_val_every_n_epoch": None},
]


@pytest.mark.parametrize("kind", ["carried", "stream"])
@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_resumed_in_mid_epoch(make, kind, options, tmp_path):
    options = {**options, "max_steps": 11}
    expected = fit(make(**KINDS[kind]), save=tmp_path, **options)
    for step in (2, 3, 5, 8):  # within an epoch, at its end, within the second, in another pass
        resumed = fit(make(**KINDS[kind]), resume=tmp_path / f"step={step}.ckpt", **options)
        assert same(seen(resumed), seen(expected)[step:]), step


def test_a_resumption_must_overfit_again(make, tmp_path):
    fit(make(), save=tmp_path, max_steps=1, overfit_batches=2)
    with pytest.raises(ValueError, match="had overfit_batches True, this one has False"):
        fit(make(), resume=tmp_path / "step=1.ckpt", max_steps=2)
    with pytest.raises(ValueError, match="had separate_documents True, this one has False"):
        fit(make(separate_documents=False), resume=tmp_path / "step=1.ckpt", max_steps=2)


@pytest.mark.parametrize("kind", ["stored", "stream"])
@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"overfit_batches": 3}, {"overfit_batches": 5}, "overfit_batches 3, this one has 5"),
        ({"overfit_batches": 2}, {"limit_train_batches": 2}, "overfit_batches True"),
        ({"limit_train_batches": 3}, {"limit_train_batches": 5}, "limit_train_batches 3,"),
        ({"limit_train_batches": 1}, {}, "limit_train_batches 1, this one has all"),
    ],
)
def test_a_resumption_must_have_the_same_batches(kind, before, after, message, make, tmp_path):
    fit(make(**KINDS[kind]), save=tmp_path, max_steps=2, **before)
    path = tmp_path / "step=2.ckpt"
    with pytest.raises(ValueError, match=f"had {message}"):
        fit(make(**KINDS[kind]), resume=path, max_steps=4, **after)
    # Checkpoints of earlier versions do not say how many.
    content = torch.load(path, weights_only=True)
    del content["LongContextData"]["order"]["limit_train_batches"]
    torch.save(content, path)
    assert len(seen(fit(make(**KINDS[kind]), resume=path, max_steps=4, **before))) == 2


def test_nothing_to_train_on(make):
    for limit in (0, 0.0):
        data = make()
        with pytest.raises(DataError, match="limit_train_batches: expected at least one batch"):
            fit(data, max_steps=2, limit_train_batches=limit)
        with pytest.raises(RuntimeError, match="tokenizer: not known yet"):
            _ = data.tokenizer  # no data were read


def test_a_schedule_without_an_end(make):
    for options in ({"max_time": "00:00:01:00"}, {"max_epochs": -1}):
        trainer = lightning.Trainer(
            max_steps=-1, logger=False, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        with pytest.raises(DataError, match="max_steps: expected a number, since"):
            trainer.fit(LanguageModel("tiny", ffn_dim=16), datamodule=make())


# ---- Validation


@pytest.mark.parametrize("kind", ["stored", "stream"])
def test_validation_by_time(kind, make):
    pytest.importorskip("lightning", minversion="2.6")
    options = {"max_steps": 3, "check_val_every_n_epoch": None}
    module = fit(make(**KINDS[kind]), val_check_interval="00:00:00:00", **options)
    assert module.validations == [1, 2, 3]
    module = fit(
        make(**KINDS[kind]), val_check_interval={"days": 9}, limit_train_batches=2, **options
    )
    assert (module.validations, len(seen(module))) == ([], 3)


def test_processes_do_not_validate_by_their_own_clocks():
    state = types.SimpleNamespace(fn="fit")
    trainer = types.SimpleNamespace(
        state=state, limit_train_batches=1.0, world_size=2, _val_check_time_interval=60.0
    )
    with pytest.raises(DataError, match="val_check_interval: expected a number of batches or"):
        check_trainer(trainer)
    trainer.world_size = 1
    check_trainer(trainer)


def test_validation_above_an_epoch(make):
    options = {"val_check_interval": 8, "max_steps": 20}
    assert fit(make(streaming=True), **options).validations == [8, 16]
    for data in (make(), make(streaming=True)):
        limit = {"limit_train_batches": 4, **options}
        with pytest.raises(DataError, match="at most the 4 batches of an epoch, got 8; pass less"):
            fit(data, **limit)
        assert fit(data, check_val_every_n_epoch=None, **limit).validations == [8, 16]
    with pytest.raises(DataError, match="check_val_every_n_epoch: expected none together with"):
        fit(make(streaming=True), check_val_every_n_epoch=2, **options)


def test_validation_of_a_limited_stream(make):
    module = fit(make(streaming=True), limit_train_batches=3, max_epochs=4)
    assert module.validations == [3, 6, 9, 12]
    module = fit(make(streaming=True), max_epochs=2)
    assert module.validations == [len(module.epochs[0]), len(seen(module))]


def test_nothing_to_validate_on(make):
    trainer = lightning.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(DataError, match="expected documents to validate on, got 0.0"):
        trainer.validate(Recorder(), datamodule=make(validation_fraction=0.0))
