"""The training package used as a library, without its command line."""

import lightning
import pytest
import torch

from longctx_layers.data import LongContextData
from longctx_layers.training import (
    AtomicCheckpointIO,
    Checkpoints,
    LanguageModel,
    Monitor,
    load_trained,
)
from longctx_layers.training.module import language_model


def trainer(folder, **options):
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_module_data_callbacks_and_plugin(tmp_path, capsys):
    module = LanguageModel(num_params="tiny", block="window", window_size=8)
    with pytest.raises(RuntimeError, match="model: not built yet; the trainer's fit"):
        _ = module.model
    data = LongContextData(
        "synthetic", "20", seq_len=32, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    callbacks = [Checkpoints(every_n_steps=1), Monitor(plain_lines=True)]
    own = trainer(
        tmp_path, callbacks=callbacks, plugins=[AtomicCheckpointIO()], limit_val_batches=1
    )
    own.fit(module, datamodule=data)
    assert "matmul peak" in capsys.readouterr().out
    trained = load_trained(callbacks[0].newest)
    assert trained.step == 2
    for name, value in module.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name


def test_other_data_and_other_modules_are_refused(tmp_path):
    module = LanguageModel(num_params="tiny", block="window")
    with pytest.raises(TypeError, match="datamodule=LongContextData.*got NoneType as data module"):
        trainer(tmp_path).fit(module, train_dataloaders=[torch.zeros(1)])
    with pytest.raises(TypeError, match="expected a LanguageModel, got LightningModule"):
        language_model(lightning.LightningModule())
