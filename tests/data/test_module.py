"""The data module: its options, its splits, and the same batches again after a resumption."""

import itertools
import warnings
from collections import Counter

import lightning
import pytest
import torch

from longctx_layers.data.module import LongContextData
from longctx_layers.data.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(cache):
    def make(ready=True, **options):
        options = {"dataset_name": "synthetic", "dataset_config": "40", **options}
        data = LongContextData(**{"seq_len": 256, "batch_size": 4, "cache_dir": cache, **options})
        if ready:
            data.prepare_data()
            data.setup("fit")
        return data

    return make


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def lengths_of_segments(loader, of_lanes=False):
    """How many segments of an epoch have how many tokens; those of lanes are a row's own."""
    found = Counter()
    for batch in loader:
        for row, numbers in enumerate(batch["segment_ids"]):
            for number in numbers[numbers >= 0].tolist():
                found[row if of_lanes else 0, number] += 1
    return Counter(found.values())


# ---- Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 8, "max_seq_len": 9}, "two names of one option, got 8 and 9"),
        ({"seq_len": 0}, "seq_len: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"num_workers": -1}, "num_workers: expected at least 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"validation_fraction": 1.0}, r"validation_fraction: expected a number in \[0, 1\)"),
        ({"tokenizer": "byte"}, "tokenizer: expected bytes, bpe, bpe:SIZE"),
        ({"tokenizer": "bpe:100"}, "at least 257, or the name.* got 'bpe:100'"),
        ({"tokenizer": "bpe:"}, "got 'bpe:'"),
        ({"dataset_name": "stdlb"}, "did you mean stdlib"),
    ],
)
def test_impossible_options_before_any_data(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "longctx_layers.data.sources.open_source", lambda *a, **k: pytest.fail("reads data")
    )
    with pytest.raises(ValueError, match=message):
        LongContextData(**options, cache_dir=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_two_names_of_one_length():
    assert LongContextData(max_seq_len=32).seq_len == 32
    assert LongContextData(seq_len=32).seq_len == 32
    assert LongContextData(seq_len=32, max_seq_len=32).seq_len == 32
    assert LongContextData().seq_len == 8192


def test_persistent_workers_without_workers():
    with pytest.warns(UserWarning, match="persistent_workers: .* ignored"):
        assert not LongContextData(persistent_workers=True).persistent_workers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LongContextData(persistent_workers=True, num_workers=1).persistent_workers


def test_tokenizer_is_known_after_setup(make):
    with pytest.raises(RuntimeError, match="not known yet; call prepare_data"):
        make(ready=False).vocab_size  # noqa: B018
    assert make().vocab_size == 257


# ---- Splits and accounts


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("carry_state", [False, True])
def test_every_document_is_on_one_side_and_whole(make, tokenizer, carry_state):
    data = make(tokenizer=tokenizer, carry_state=carry_state, validation_fraction=0.2)
    assert sorted([*data.training, *data.validation]) == list(range(40))
    for documents, loader in (
        (data.training, data.train_dataloader()),
        (data.validation, data.val_dataloader()),
    ):
        lengths = data.store.lengths(documents).tolist()
        assert lengths_of_segments(loader) == Counter(lengths)
    assert f"{len(data.training)} documents" in data.describe()


@pytest.mark.parametrize("options", [{}, {"carry_state": True}, {"streaming": True}], ids=str)
def test_documents_that_are_not_separate_are_one_segment(make, options):
    data = make(**options, separate_documents=False)
    seen = Counter()
    for apart in data.train_dataloader():
        one = data.on_before_batch_transfer(apart, 0)
        pads = apart["segment_ids"] < 0
        seen.update(apart["segment_ids"][~pads].tolist())
        same([one], [{**apart, "segment_ids": -pads.long()}])
    assert len(seen) > 1


def test_streams_hold_out_what_they_validate_on(make):
    data = make(streaming=True, validation_fraction=0.2, validation_documents=3)
    stored = make(validation_fraction=0.2)
    held_out = lengths_of_segments(data.val_dataloader())
    assert sum(held_out.values()) == 3
    everything = held_out + lengths_of_segments(data.train_dataloader(), of_lanes=True)
    assert everything == Counter(stored.store.lengths(torch.arange(40).numpy()).tolist())
    assert "a stream to train on" in data.describe()


def test_validation_is_the_same_every_time(make):
    data = make(seed=3)
    same(list(data.val_dataloader()), list(data.val_dataloader()))
    same(list(data.val_dataloader()), list(make(seed=3).val_dataloader()))
    assert make(validation_fraction=0.0).val_dataloader() == []


def test_prepared_data_are_reused(make, monkeypatch):
    first = make(tokenizer="bpe:300")
    never = lambda *a, **k: pytest.fail("prepared again")  # noqa: E731
    monkeypatch.setattr("longctx_layers.data.preparation.train_bpe", never)
    monkeypatch.setattr("longctx_layers.data.tokenizers.HuggingFaceTokenizer.encode_batch", never)
    again = make(tokenizer="bpe:300")
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    same(list(again.train_dataloader()), list(first.train_dataloader()))
    assert make(seed=1).store.tokens.filename == make(seed=2).store.tokens.filename


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_a_tokenizer_comes_back_from_its_folder_alone(make, tmp_path, name):
    tokenizer = make(tokenizer=name).tokenizer
    tokenizer.save(tmp_path / "folder")
    loaded = load_tokenizer(tmp_path / "folder")
    text = "key dakemi 7302.\r\n\té<|endoftext|> 漢字 \U0001f600"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode([*loaded.encode(text), loaded.end_of_text]) == text
    assert loaded.end_of_text not in loaded.encode(text)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert make(tokenizer=str(tmp_path / "folder")).vocab_size == tokenizer.vocab_size


# ---- Resumption

KINDS = [
    {},
    {"carry_state": True},
    {"streaming": True},
    {"num_workers": 2, "persistent_workers": True},
    {"streaming": True, "num_workers": 2, "carry_state": True},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_resumed_anywhere(make, options):
    data = make(seq_len=1024, batch_size=8, **options)
    loader = data.train_dataloader()
    whole = [*loader, *loader]
    end_of_epoch = len(whole) // 2
    places = (3,) if "num_workers" in options else (0, 3, end_of_epoch, end_of_epoch + 2)
    for place in places:
        first = make(seq_len=1024, batch_size=8, **options)
        stream = first.train_dataloader()
        taken = list(itertools.islice(itertools.chain(stream, stream), place))
        state = first.state_dict()
        assert (state["epoch"], state["batch"]) == divmod(place, end_of_epoch)
        other = {**options, "num_workers": 0, "persistent_workers": False}
        resumed = make(seq_len=1024, batch_size=8, **other)
        resumed.load_state_dict(state)
        stream = resumed.train_dataloader()
        rest = itertools.chain(stream, stream)
        same(whole, taken + list(itertools.islice(rest, len(whole) - place)))


def test_state_is_safe_to_load(make, tmp_path):
    data = make(streaming=True)
    next(iter(data.train_dataloader()))
    torch.save(data.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True) == data.state_dict()


@pytest.mark.parametrize(
    ("changed", "name"),
    [({"seq_len": 128}, "seq_len 256"), ({"seed": 9}, "seed 0"), ({"batch_size": 2}, "batch_size")],
)
def test_another_order_cannot_be_resumed(make, changed, name):
    data = make(**changed)
    data.load_state_dict(make().state_dict())
    with pytest.raises(ValueError, match=f"the run to resume had {name}.* resume with the same"):
        data.train_dataloader()


def test_random_numbers_of_the_model_are_left_alone(make):
    data = make()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    assert torch.equal(torch.rand(3), expected)


# ---- With Lightning's trainer


class Recorder(lightning.LightningModule):
    """Remembers which batches it trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append({name: values.clone() for name, values in batch.items()})
        return self.weight * batch["ids"].float().mean()

    def validation_step(self, batch, batch_idx):
        assert (batch["segment_ids"] >= 0).any()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(data, folder, max_steps, resume=None, **options):
    module = Recorder()
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    trainer = lightning.Trainer(
        max_steps=max_steps, max_epochs=-1, callbacks=[saving], logger=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return module.seen


@pytest.mark.filterwarnings("ignore:.*num_workers|.*does not have many workers")
@pytest.mark.parametrize("trainer_options", [{}, {"limit_train_batches": 3}], ids=str)
@pytest.mark.parametrize("options", [{}, {"streaming": True}, {"num_workers": 2}], ids=str)
def test_a_trainer_resumes_where_it_was(make, tmp_path, options, trainer_options):
    def data(**more):
        return make(seq_len=1024, batch_size=8, dataset_config="20", **{**options, **more})

    per_epoch = min(len(list(data().train_dataloader())), 3 if trainer_options else 99)
    steps = 2 * per_epoch + 2
    whole = fit(data(), tmp_path / "whole", steps, **trainer_options)
    assert len(whole) == steps
    epochs = {frozenset(b["segment_ids"].flatten().tolist()) for b in whole}
    assert len(epochs) > 1
    for stop in (2, per_epoch, per_epoch + 1):
        rest = fit(
            data(num_workers=0), tmp_path / "rest", steps,
            resume=tmp_path / f"whole/step={stop}.ckpt", **trainer_options,
        )  # fmt: skip
        same(whole[stop:], rest)
