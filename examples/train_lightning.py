"""Batch Renormalization in Lightning.

python examples/train_lightning.py
python examples/train_lightning.py --devices 2 --sync
"""

import argparse
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from made_images import CLASSES, made_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import brn_kernels as brn


class Classifier(pl.LightningModule):
    """Built from the layer itself; ``brn.convert_batchnorm`` would do as well for a network that exists already.

    ``batches`` is how many batches a process will see. That is the number of optimizer steps, times
    ``accumulate_grad_batches`` where gradients are accumulated: the clip limits count batches.
    """

    def __init__(self, batches: int, width: int = 16, lr: float = 0.02, sync: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        schedule = brn.ClipSchedule.for_training(batches)
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            brn.BatchRenorm2d(width, momentum=0.1, schedule=schedule, activation="relu"),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            brn.BatchRenorm2d(2 * width, momentum=0.1, schedule=schedule, activation="relu"),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1, bias=False),
            brn.BatchRenorm2d(2 * width, momentum=0.1, schedule=schedule, activation="relu"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )

    def configure_model(self) -> None:
        # Lightning calls this when the processes are there, before DDP wraps the module; so does load_from_checkpoint.
        if self.hparams.sync and torch.distributed.is_initialized():
            brn.convert_sync(self.net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        if self.global_step % self.trainer.log_every_n_steps == 0:
            self.print(f"step {self.global_step:4d}/{self.trainer.max_steps}  loss {loss.item():.4f}")
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        right = (self(x).argmax(1) == y).float().mean()
        self.log("accuracy", right, batch_size=len(y), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--sync", action="store_true", help="statistics of all processes instead of each one's own")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the images are in memory

    pl.seed_everything(0)
    model = Classifier(args.steps, sync=args.sync)
    trainer = pl.Trainer(
        max_steps=args.steps,
        accelerator=args.accelerator,
        devices=args.devices,
        # True would call nn.SyncBatchNorm.convert_sync_batchnorm, which knows BatchNorm layers only and leaves Batch
        # Renormalization as it is, without a word: hence configure_model above.
        sync_batchnorm=False,
        log_every_n_steps=20,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(*made_images(4096, seed=0)), args.batch_size, shuffle=True))
    test = DataLoader(TensorDataset(*made_images(1024, seed=1)), batch_size=256)
    (results,) = trainer.test(model, test, verbose=False)
    model.print(f"test accuracy {100 * results['accuracy']:.2f} % ({trainer.global_step} steps)")


if __name__ == "__main__":
    main()
