"""Batch Renormalization in a timm model, with timm's optimizer, schedule and averaged weights.

python examples/train_timm.py
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from made_images import CLASSES, made_images
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import brn_kernels as brn


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right in evaluation mode: normalized by running statistics."""
    training = model.training
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train(training)
    return 100 * right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_efficientnet", help="any of timm's with BatchNorm")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=2048, help="for training")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    data = TensorDataset(*made_images(args.images, seed=0, size=32, channels=3))
    loader = DataLoader(data, args.batch_size, shuffle=True, drop_last=True)
    test_images, test_labels = (t.to(args.device) for t in made_images(512, seed=1, size=32, channels=3))
    steps = args.epochs * len(loader)

    model = timm.create_model(args.model, num_classes=CLASSES)
    # timm's BatchNormAct2d is converted too, with its activation and drop. The momentum is for a training this short;
    # leave it out for one of many thousand steps.
    brn.convert_batchnorm(model, schedule=brn.ClipSchedule.for_training(steps), momentum=0.1)
    # For statistics of all processes: brn.convert_sync(model), here, once torch.distributed is initialized. What timm's
    # train.py does for --sync-bn, timm.layers.convert_sync_batchnorm, converts BatchNorm layers and leaves ours as they
    # are. Its --dist-bn (timm.utils.distribute_bn) finds statistics by their names, which are BatchNorm's, so it works.
    model.to(args.device)
    # timm spares biases and norm layers from weight decay by their shape, so ours too.
    optimizer = create_optimizer_v2(model, opt="sgd", lr=args.lr, momentum=0.9, weight_decay=1e-4)
    schedule, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=args.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    # Averages all that is in state_dict: running_mean and running_var like weights, num_batches_tracked is copied, and
    # `clipped`, which is not in it, stays. exclude_buffers=True copies all buffers instead of averaging.
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)

    step = 0
    for epoch in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            ema.update(model, step=step)
            schedule.step_update(step)
            if step % 10 == 0 or step in (1, steps):
                print(f"epoch {epoch}  step {step:4d}/{steps}  loss {loss.item():.4f}")

    print(f"test accuracy {accuracy(model, test_images, test_labels):.2f} % ({args.model}, {steps} steps)")
    print(f"averaged weights: {accuracy(ema.module, test_images, test_labels):.2f} %")
    # Averaged statistics are not those of the averaged weights: take these from the training images.
    brn.update_stats(ema.module, loader, device=args.device)
    print(f"averaged weights, with statistics of their own: {accuracy(ema.module, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
