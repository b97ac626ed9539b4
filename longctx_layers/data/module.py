"""The data module: documents in, packed batches out, the same ones again after a resumption."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from longctx_layers.data import sources
from longctx_layers.data.errors import DataError, ResumptionError
from longctx_layers.data.loader import (
    Position,
    Progress,
    StoredBatches,
    StoredLoader,
    TrainingLoader,
    ValidationLoader,
)
from longctx_layers.data.packing import Batch, Epoch, Shape
from longctx_layers.data.split import (
    check_stored,
    check_stream,
    held_out_of_stream,
    split,
    training_texts,
)
from longctx_layers.data.store import LAYOUT, content_key, first_characters, in_memory, prepare
from longctx_layers.data.streaming import StreamedLoader, StreamedRows, of_all_processes
from longctx_layers.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    bpe_vocab_size,
    check_tokenizer,
    load_tokenizer,
    train_bpe,
)
from longctx_layers.data.trainer_flags import (
    batch_limit,
    check_interval,
    check_trainer,
    settle_stream,
)
from longctx_layers.files import write_once

SEQ_LEN = 8192
BPE_CHARACTERS = 100_000_000  # of the training documents that a BPE is learnt from


class LongContextData(lightning.LightningDataModule):
    """Packed documents for causal language models.

    Batches are dicts of int64 `[B, T]`: `ids`; `labels`, the next tokens, -100 at the ends of
    documents and at pads; `segment_ids`, one number per document, negative for pads. Rows are full
    but for the end of an epoch, which may have pads up to rows of nothing else.

    Which batch comes when depends on the options, the epoch and this process's place among all
    processes, not on the number of workers or on global random numbers.

    Args:
        dataset_name: `wikitext`, `synthetic`, `local`, `stdlib` (the source files of Python's
            standard library), or the name of any text dataset on the Hugging Face hub.
        dataset_config: the dataset's configuration: for wikitext wikitext-2-raw-v1 (the default),
            wikitext-2-v1, wikitext-103-raw-v1 or wikitext-103-v1; for local the path of a file or
            folder of text, JSON, CSV, Parquet or Arrow; for synthetic the number of documents.
        seq_len: tokens of a row; 8192 unless given.
        max_seq_len: another name of seq_len.
        batch_size: rows of a batch on each process.
        num_workers: processes that load batches.
        persistent_workers: whether they live on from epoch to epoch; not those of a stream.
        tokenizer: `bytes`, `bpe` or `bpe:SIZE` (learnt from the training documents), or the name or
            folder of one of Hugging Face's.
        text_column: of a dataset with columns; `text`, or the only one of strings, unless given.
        validation_fraction: of the documents, held out by their content and the seed; a dataset's
            own validation split is used instead where it has one.
        validation_documents: held out of a stream, at most.
        seed: of the split and of the order of documents and rows.
        streaming: whether to tokenise while training, and keep nothing on the disk.
        carry_state: whether row b of a batch goes on where row b of the one before stopped.
        separate_documents: whether attention and state begin anew with each document. If not, they
            go on, and the segment ids tell tokens (0) from pads only: for models that will read
            streams which never begin anew.
        cache_dir: where tokenised data and learnt tokenizers are kept; a folder in the user's cache
            unless given.

    Attributes:
        vocab_size: ids are below it; after `setup`.
        tokenizer: see `longctx_layers.data.tokenizers.Tokenizer`; after `setup`.
        begins_pass: whether the batch that training takes is the first of a pass over the data,
            so that no state is carried over into it.

    Raises:
        ValueError: for an option that cannot be, before any data is touched.
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
    ):
        super().__init__()
        if None not in (seq_len, max_seq_len) and seq_len != max_seq_len:
            raise ValueError(
                f"seq_len, max_seq_len: one option with two names, got {seq_len} and {max_seq_len};"
                " pass one of them"
            )
        self.seq_len = seq_len or max_seq_len or SEQ_LEN
        sources.check(dataset_name, dataset_config)
        check_tokenizer(tokenizer)
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("max_seq_len", max_seq_len, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("validation_documents", validation_documents, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(
                f"validation_fraction: expected a number in [0, 1), got {validation_fraction}"
            )
        if persistent_workers and not num_workers:
            warnings.warn(
                "persistent_workers: there are no workers to persist with num_workers=0; ignored",
                stacklevel=2,
            )
        self.dataset_name, self.dataset_config = dataset_name, dataset_config
        self.batch_size, self.num_workers = batch_size, num_workers
        self.persistent_workers = persistent_workers and num_workers > 0
        self.tokenizer_name, self.text_column = tokenizer, text_column
        self.validation_fraction, self.validation_documents = (
            validation_fraction,
            validation_documents,
        )
        self.seed, self.streaming, self.carry_state = seed, streaming, carry_state
        self.separate_documents = separate_documents
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache()
        self.progress = Progress()
        self.begins_pass = True
        self._tokenizer: Tokenizer | None = None
        self._resumed_order: dict[str, Any] | None = None

    # ---- Preparation

    def prepare_data(self) -> None:
        """Download, learn the tokenizer and tokenise, where that is not done yet; one process."""
        self.setup("fit")

    def setup(self, stage: str) -> None:
        """Open what `prepare_data` made; on another machine without it, make it.

        Raises:
            DataError: for data that cannot be trained on, or a trainer that does not fit them.
        """
        check_trainer(self.trainer)
        if self._tokenizer is not None:
            return
        source = sources.open_source(
            self.dataset_name, self.dataset_config, self.text_column, streaming=self.streaming
        )
        tokenizer = self._make_tokenizer(source)
        self._content = content_key(str(LAYOUT), source.fingerprint, tokenizer.fingerprint)
        if self.streaming:
            self._source = source.training
            held_out = held_out_of_stream(
                source, self.seed, self.validation_fraction, self.validation_documents
            )
            self.store = in_memory(held_out, tokenizer)
            self.training, self.validation = np.arange(0), np.arange(len(self.store))
            check_stream(source, {int(one) for one in self.store.digests}, tokenizer)
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

    def _make_tokenizer(self, source: sources.Source) -> Tokenizer:
        if self.tokenizer_name == "bytes":
            return ByteTokenizer()
        size = bpe_vocab_size(self.tokenizer_name)
        if size is None:
            return load_tokenizer(self.tokenizer_name)
        choices = f"{size} {BPE_CHARACTERS} {self.seed} {self.validation_fraction}"
        folder = self.cache_dir / f"bpe-{content_key(source.fingerprint, choices)}"
        texts = training_texts(source, self.seed, self.validation_fraction)
        write_once(
            folder,
            lambda partial: train_bpe(first_characters(texts, BPE_CHARACTERS), size).save(partial),
        )
        return load_tokenizer(folder)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RuntimeError("tokenizer: known after setup(); call prepare_data() and setup()")
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def describe(self) -> str:
        """One line: what there is to train on and what is held out."""
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

    def _shape(self) -> Shape:
        """With this process's place among those that see different data."""
        places = getattr(self.trainer, "distributed_sampler_kwargs", None) or {}
        rank, world_size = places.get("rank", 0), places.get("num_replicas", 1)
        return Shape(self.batch_size, self.seq_len, rank, world_size)

    def _workers(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.persistent_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def train_dataloader(self) -> TrainingLoader:
        shape = self._shape()
        if self._resumed_order is not None:
            self.check_order(self._resumed_order)
        self.progress.continues, self.progress.repeats = self.streaming, self._repeats
        if self.streaming:
            held_out = {int(one) for one in self.store.digests}
            rows = StreamedRows(self._source, held_out, self.tokenizer, shape, self.seed)
            options = {**self._workers(), "persistent_workers": False}
            return StreamedLoader(self, rows, endless=settle_stream(self.trainer), **options)
        epoch = partial(
            Epoch, self.store, self.training, shape, seed=self.seed, carry_state=self.carry_state
        )
        loader = StoredLoader(self, StoredBatches(epoch), **self._workers())
        check_interval(self.trainer, len(loader))
        return loader

    def val_dataloader(self) -> ValidationLoader | list[Any]:
        """Empty without validation documents.

        Raises:
            DataError: if there are none, and the trainer is to do nothing but validate.
        """
        if not len(self.validation):
            if self.trainer is not None and self.trainer.state.fn == "validate":
                raise DataError(
                    "validation_fraction: expected documents to validate on, got "
                    f"{self.validation_fraction}, which holds out none; pass more"
                )
            return []
        epoch = partial(Epoch, self.store, self.validation, self._shape())
        return ValidationLoader(StoredBatches(epoch), **self._workers())

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Called by the trainer with each batch that it is about to use."""
        if self.trainer is not None and self.trainer.training:
            self.begins_pass = not self.progress.position.batch
            # With this one, which the trainer does not count yet.
            taken = self.trainer.fit_loop.batch_idx + 2
            self.progress.taken(last=taken >= self.trainer.num_training_batches)
        if not self.separate_documents:
            batch = {**batch, "segment_ids": batch["segment_ids"].clamp(max=0)}
        return batch

    # ---- Resumption

    @property
    def content(self) -> str:
        """Equal for equal texts in equal tokens; after `setup`."""
        return self._content

    @property
    def _repeats(self) -> bool:
        """Whether the trainer wants the same batches in every epoch."""
        return bool(getattr(self.trainer, "overfit_batches", 0))

    def _order(self, shape: Shape) -> dict[str, Any]:
        """What the order of the batches depends on."""
        return {
            "content": self.content,
            "seq_len": shape.length,
            "batch_size x processes": shape.all_rows,
            "validation_fraction": self.validation_fraction,
            "seed": self.seed,
            "carry_state": self.carry_state,
            "streaming": self.streaming,
            "separate_documents": self.separate_documents,
            # What a stream holds out it does not train on.
            "validation_documents": self.validation_documents if self.streaming else None,
            "overfit_batches": self._repeats,
            "limit_train_batches": batch_limit(self.trainer),
        }

    def state_dict(self) -> dict[str, Any]:
        """Which batch of which epoch comes next, and of which data."""
        shape = self._shape()
        position = of_all_processes(self.progress.position, shape.world_size)
        return {**position._asdict(), "order": self._order(shape)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The next `train_dataloader` starts with the batch that the state says comes next."""
        self.progress.load(Position(*(state_dict[field] for field in Position._fields)))
        self._resumed_order = state_dict["order"]

    def check_order(self, resumed: dict[str, Any]) -> None:
        """Whether the batches are those of the run to resume; `resumed` is its `order`.

        Raises:
            ResumptionError: if not; it names the option.
        """
        order = self._order(self._shape())
        if getattr(self.trainer, "fast_dev_run", False):  # a trial, with a limit of its own
            order["limit_train_batches"] = resumed.get("limit_train_batches")
        for name, value in resumed.items():
            if value == order[name]:
                continue
            if name == "limit_train_batches" and self._repeats:
                had = f"overfit_batches {value}, this one has {order[name]}"
            elif name == "content":
                had = "other documents or another tokenizer than --data.dataset_name, "
                had += "dataset_config, text_column and tokenizer give now"
            else:
                had = f"{name} {value}, this one has {order[name]}"
            raise ResumptionError(
                f"data: the run to resume had {had}; resume with the same data and options"
            )


def default_cache() -> Path:
    """A folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "longctx-layers"
