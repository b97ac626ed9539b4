"""The data module: documents in, packed batches out; a resumed run gets the same batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from longctx_layers.data import order, sources
from longctx_layers.data.errors import DataError
from longctx_layers.data.keys import content_key
from longctx_layers.data.loader import (
    Position,
    Progress,
    StoredBatches,
    StoredLoader,
    TrainingLoader,
    ValidationLoader,
)
from longctx_layers.data.packing import Batch, Epoch, Shape
from longctx_layers.data.preparation import check_least, default_cache, make_tokenizer
from longctx_layers.data.split import check_stored, check_stream, held_out_of_stream, split
from longctx_layers.data.store import LAYOUT, in_memory, prepare
from longctx_layers.data.streaming import StreamedLoader, StreamedRows, of_all_processes
from longctx_layers.data.tokenizers import Tokenizer, check_tokenizer
from longctx_layers.data.trainer_flags import check_interval, check_trainer, settle_stream

SEQ_LEN = 8192


class LongContextData(lightning.LightningDataModule):
    """Packed documents for training causal language models, with or without a Lightning trainer.

    Batches are dicts of int64 `[B, T]`: `ids`; `labels`, the next tokens, -100 at the ends of
    documents and at padding; `segment_ids`, one number per document, negative for padding. Rows are
    full, except at the end of an epoch, which may have padding and even rows of nothing else.

    Which batch comes when depends on the options, the epoch and this process's place among all
    processes, not on the number of workers or on global random numbers.

    >>> import tempfile
    >>> data = LongContextData("synthetic", "20", seq_len=64, batch_size=2,
    ...                        cache_dir=tempfile.mkdtemp())
    >>> data.prepare_data()
    >>> data.setup("fit")
    >>> batch = next(iter(data.train_dataloader()))
    >>> batch["ids"].shape, data.vocab_size
    (torch.Size([2, 64]), 257)

    Args:
        dataset_name: `wikitext`, `synthetic`, `local`, `stdlib` (the source files of Python's
            standard library), a source of your own (`sources.register_source`), or the name of any
            text dataset on the Hugging Face hub.
        dataset_config: the dataset's configuration: for wikitext wikitext-2-raw-v1 (the default),
            wikitext-2-v1, wikitext-103-raw-v1 or wikitext-103-v1; for local the path of a file or
            folder of text, JSON, CSV, Parquet or Arrow; for synthetic the number of documents.
        seq_len: tokens of a row; 8192 by default.
        max_seq_len: another name for seq_len.
        batch_size: rows of a batch on each process.
        num_workers: processes that load batches.
        persistent_workers: whether to keep these processes between epochs; not for a stream.
        tokenizer: `bytes`, `bpe` or `bpe:SIZE` (trained on the training documents), or the name or
            folder of one of Hugging Face's.
        text_column: of a dataset with columns; by default `text`, or the only one of strings.
        validation_fraction: of the documents, held out by their content and the seed; if the
            dataset has a validation split, it is used instead.
        validation_documents: at most so many are held out of a stream.
        seed: of the split and of the order of documents and rows.
        streaming: whether to tokenise while training, and keep nothing on the disk.
        carry_state: whether row b of a batch continues where row b of the previous batch stopped.
        separate_documents: whether attention and state are reset at the start of each document. If
            not, the segment ids only distinguish tokens (0) from padding: for models that will
            read endless streams.
        cache_dir: where tokenised data and trained tokenizers are kept; by default a folder in the
            user's cache.

    Attributes:
        vocab_size: all ids are below it; after `setup`.
        tokenizer: see `longctx_layers.data.tokenizers.Tokenizer`; after `setup`.
        begins_pass: whether the batch that training uses is the first of a pass over the data,
            so that no state is carried over into it.

    Raises:
        ValueError: for an invalid option, before any data is read.
    """

    def __init__(
        self,
        dataset_name: str = "wikitext",
        dataset_config: str | None = None,
        seq_len: int | None = None,
        max_seq_len: int | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        persistent_workers: bool = False,
        tokenizer: str = "bytes",
        text_column: str | None = None,
        validation_fraction: float = 0.05,
        validation_documents: int = 256,
        seed: int = 0,
        streaming: bool = False,
        carry_state: bool = False,
        separate_documents: bool = True,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if None not in (seq_len, max_seq_len) and seq_len != max_seq_len:
            raise ValueError(
                "seq_len, max_seq_len: two names of one option, got "
                f"{seq_len} and {max_seq_len}; pass one of them"
            )
        self.seq_len = seq_len or max_seq_len or SEQ_LEN
        sources.check(dataset_name, dataset_config)
        check_tokenizer(tokenizer)
        check_least(1, seq_len=seq_len, max_seq_len=max_seq_len, batch_size=batch_size)
        check_least(0, num_workers=num_workers, seed=seed)
        check_least(1, validation_documents=validation_documents)
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: expected a number in [0, 1), got {validation_fraction}"
            )
        if persistent_workers and not num_workers:
            warnings.warn(
                "persistent_workers: there are no workers with num_workers=0; ignored",
                stacklevel=2,
            )
        self.dataset_name = dataset_name
        self.dataset_config = dataset_config
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.persistent_workers = persistent_workers and num_workers > 0
        self.tokenizer_name = tokenizer
        self.text_column = text_column
        self.validation_fraction = validation_fraction
        self.validation_documents = validation_documents
        self.seed = seed
        self.streaming = streaming
        self.carry_state = carry_state
        self.separate_documents = separate_documents
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.progress = Progress()
        self.begins_pass = True
        self._tokenizer: Tokenizer | None = None
        self._resumed_order: dict[str, Any] | None = None

    # ---- Preparation

    def prepare_data(self) -> None:
        """Download, train the tokenizer and tokenise, unless it was done before; one process."""
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Open what `prepare_data` wrote; on a machine without it, write it first.

        Raises:
            DataError: for data that cannot be trained on, or a trainer that does not fit it.
        """
        check_trainer(self.trainer)
        if self._tokenizer is not None:
            return
        source = sources.open_source(
            self.dataset_name, self.dataset_config, self.text_column, streaming=self.streaming
        )
        tokenizer = make_tokenizer(
            self.tokenizer_name, source, self.cache_dir, self.seed, self.validation_fraction
        )
        self._content = content_key(str(LAYOUT), source.fingerprint, tokenizer.fingerprint)
        if self.streaming:
            self._source = source.training
            held_out = held_out_of_stream(
                source, self.seed, self.validation_fraction, self.validation_documents
            )
            self.store = in_memory(held_out, tokenizer)
            self.training, self.validation = np.arange(0), np.arange(len(self.store))
            check_stream(source, self._held_out(), tokenizer)
        else:
            self.store = prepare(
                self.cache_dir / f"tokens-{self._content}",
                sources.texts(source.training),
                sources.texts(source.validation),
                tokenizer,
            )
            self.training, self.validation = split(self.store, self.seed, self.validation_fraction)
        check_stored(self.store, training=self.training, validation=self.validation)
        self._tokenizer = tokenizer

    def _held_out(self) -> set[int]:
        """Digests of the documents that a stream holds out."""
        return {int(digest) for digest in self.store.digests}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; after `setup`."""
        if self._tokenizer is None:
            raise RuntimeError("tokenizer: not known yet; call prepare_data() and setup() first")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """All ids are below it; after `setup`."""
        return self.tokenizer.vocab_size

    def describe(self) -> str:
        """Describe in one line what is trained on and what is held out; after `setup`."""
        training, validation = [
            f"{len(documents):,} documents with {self.store.lengths(documents).sum():,} tokens"
            for documents in (self.training, self.validation)
        ]
        if self.streaming:
            training = "a stream"
        elif len(self.training) + len(self.validation) < len(self.store):
            left_out = len(self.store) - len(self.training) - len(self.validation)
            training += f" (and not {left_out:,} that the validation split has too)"
        return (
            f"{self.dataset_name}: {training} to train on, {validation} held out; tokenizer "
            f"{self.tokenizer_name}, {self.vocab_size:,} ids"
        )

    # ---- Batches

    def shape(self) -> Shape:
        """The shape of batches, and this process's place among those that see different data."""
        places = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        return Shape(
            self.batch_size, self.seq_len, places.get("rank", 0), places.get("num_replicas", 1)
        )

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.persistent_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> TrainingLoader:
        """The training batches, from the current position on; after `setup`.

        Raises:
            DataError: for a trainer that does not fit the data.
            ResumptionError: if the data is not that of the run to resume.
        """
        shape = self.shape()
        if self._resumed_order is not None:
            self.check_order(self._resumed_order)
        self.progress.continues = self.streaming
        self.progress.repeats = self.repeats_batches
        if self.streaming:
            rows = StreamedRows(self._source, self._held_out(), self.tokenizer, shape, self.seed)
            options = {**self._workers(), "persistent_workers": False}
            return StreamedLoader(self, rows, endless=settle_stream(self.trainer), **options)
        epoch = partial(
            Epoch, self.store, self.training, shape, seed=self.seed, carry_state=self.carry_state
        )
        loader = StoredLoader(self, StoredBatches(epoch), **self._workers())
        check_interval(self.trainer, len(loader))
        return loader

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """The validation batches; empty without validation documents.

        Raises:
            DataError: if there are none, but the trainer is only to validate.
        """
        if not len(self.validation):
            if self.trainer is not None and self.trainer.state.fn == "validate":
                raise DataError(
                    "validation_fraction: expected documents to validate on, got "
                    f"{self.validation_fraction}, which holds out none; pass more"
                )
            return []
        epoch = partial(Epoch, self.store, self.validation, self.shape())
        return ValidationLoader(StoredBatches(epoch), **self._workers())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Note that a batch is used; the trainer calls it with each one."""
        if self.trainer is not None and self.trainer.training:
            self.begins_pass = not self.progress.position.batch
            # Including this one, which the trainer does not count yet.
            n_taken = self.trainer.fit_loop.batch_idx + 2
            self.progress.taken(last=n_taken >= self.trainer.num_training_batches)
        if not self.separate_documents:
            batch = {**batch, "segment_ids": batch["segment_ids"].clamp(max=0)}
        return batch

    # ---- Resumption

    @property
    def content(self) -> str:
        """A name of the tokenised texts; equal for equal texts and tokens; after `setup`."""
        return self._content

    @property
    def repeats_batches(self) -> bool:
        """Whether the trainer wants the same batches in every epoch."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def state_dict(self) -> dict[str, Any]:
        """Which batch of which epoch comes next, and of which data."""
        position = of_all_processes(self.progress.position, self.shape().world_size)
        return {**position._asdict(), "order": order.order_of(self)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next `train_dataloader` start with the batch that comes next in `state_dict`."""
        self.progress.load(Position(*(state_dict[field] for field in Position._fields)))
        self._resumed_order = state_dict["order"]

    def check_order(self, resumed: Mapping[str, Any]) -> None:
        """Check that the batches are those of the run to resume; see `order.check_order`.

        Raises:
            ResumptionError: if they are not; it names the option.
        """
        order.check_order(self, resumed)

    @classmethod
    def of(cls, trainer: lightning.Trainer) -> LongContextData:
        """The data module that a trainer was called with.

        Raises:
            TypeError: if it was called with other data.
        """
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, LongContextData):
            raise TypeError(
                "trainer: expected trainer.fit(model, datamodule=LongContextData(...)), got "
                f"{type(data).__name__} as data module; LanguageModel and its callbacks need it"
            )
        return data
