"""Lightning and Accelerate train our models on scikit-learn's digits for an epoch, and reload what they saved."""

import math

import pytest
import torch
from small_models import CONVERTED, build
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TRAINED = ["nystrom", "performer", CONVERTED]
# images of 8x8 grey values in patches of 2x2
DIGITS = dict(img_size=8, patch_size=2, in_chans=1, num_classes=10, global_pool="avg")


@pytest.fixture(scope="module")
def data() -> TensorDataset:
    datasets = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's digits")
    digits = datasets.load_digits()
    return TensorDataset(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target))


def loss_of(model: nn.Module, data: TensorDataset) -> float:
    with torch.no_grad():
        return cross_entropy(model.eval()(data.tensors[0]), data.tensors[1]).item()


def batches(data: TensorDataset) -> DataLoader:
    return DataLoader(data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


@pytest.fixture(scope="module")
def expected(data) -> dict[str, float]:
    """The losses after an epoch of a plain loop."""
    found = {}
    for kind in TRAINED:
        model = build(kind, **DIGITS)
        optimizer = optimizer_of(model)
        model.train()
        for images, labels in batches(data):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        found[kind] = loss_of(model, data)
        assert found[kind] < 0.75 * math.log(10)  # of a guess
    return found


@pytest.mark.parametrize("kind", TRAINED)
def test_lightning(kind, data, expected, tmp_path):
    lightning = pytest.importorskip("lightning", reason="Lightning is in the extra 'ecosystem'")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build(kind, **DIGITS)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self)

    module = Classifier()
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module.train(), batches(data))
    after = loss_of(module.model, data)
    assert after == pytest.approx(expected[kind], rel=1e-4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loss_of(again.model, data) == after


@pytest.mark.parametrize("kind", TRAINED)
def test_accelerate(kind, data, expected, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is in the extra 'ecosystem'")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")

    def prepared() -> tuple:
        model = build(kind, **DIGITS)
        return accelerator.prepare(model, optimizer_of(model), batches(data))

    model, optimizer, loader = prepared()
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(cross_entropy(model(images), labels))
        optimizer.step()
    after = loss_of(model, data)
    assert after == pytest.approx(expected[kind], rel=1e-4)
    accelerator.save_state(tmp_path)
    accelerator.free_memory()
    again, _, _ = prepared()
    accelerator.load_state(tmp_path)
    assert loss_of(again, data) == after
