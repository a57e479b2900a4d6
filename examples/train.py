"""Plain PyTorch with Batch Renormalization: one process, or several under torchrun.

python examples/train.py
torchrun --nproc-per-node 2 examples/train.py --sync
"""

import argparse
import copy
import dataclasses
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from made_images import CLASSES, made_images
from torch import Tensor, nn

try:
    import brn_kernels as brn
except ImportError:  # then there is still --norm batchnorm
    brn = None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("batchnorm", "batchrenorm"), default="batchrenorm")
    parser.add_argument("--schedule", choices=("for-training", "paper", "batchnorm"), default="for-training")
    parser.add_argument("--r-max", type=float, help="final limit of r instead of the schedule's")
    parser.add_argument("--d-max", type=float, help="final limit of d instead of the schedule's")
    parser.add_argument("--momentum", type=float, default=0.1, help="of running statistics; 0.01 for long trainings")
    parser.add_argument("--sync", action="store_true", help="statistics of all processes instead of each one's own")
    parser.add_argument("--model-width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--amp", choices=("none", "bf16"), default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--checkpoint", metavar="PATH", help="resume from this file if it exists, and save to it")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="stop there, as if interrupted")
    parser.add_argument("--export", metavar="PATH", help="write a torch.export program with plain BatchNorm at the end")
    args = parser.parse_args()
    if args.norm == "batchrenorm" and brn is None:
        parser.error("--norm batchrenorm needs brn_kernels, which is not installed; --norm batchnorm works without it")
    if args.norm == "batchnorm" and args.sync and args.device == "cpu":
        parser.error("--norm batchnorm --sync needs GPUs: torch.nn.SyncBatchNorm does not run on CPUs")
    return args


def network(width: int, momentum: float) -> nn.Module:
    """(N, 1, H, W) images to (N, CLASSES) logits, normalized by BatchNorm."""
    layers: list[nn.Module] = []
    for channels_in, channels, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 2)):
        layers += [
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels, momentum=momentum),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def renormalize(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The model with Batch Renormalization for BatchNorm."""
    schedule = {
        "for-training": brn.ClipSchedule.for_training(args.steps),
        "paper": brn.ClipSchedule.paper(),
        "batchnorm": brn.ClipSchedule.batchnorm(),
    }[args.schedule]
    limits = {"r_max": args.r_max, "d_max": args.d_max}
    schedule = dataclasses.replace(schedule, **{name: limit for name, limit in limits.items() if limit is not None})
    return brn.convert_batchnorm(model, schedule=schedule, momentum=args.momentum)


def synchronize(model: nn.Module, norm: str) -> nn.Module:
    """The model with statistics of all processes."""
    # nn.SyncBatchNorm.convert_sync_batchnorm leaves Batch Renormalization as it is, brn.convert_sync leaves BatchNorm.
    return brn.convert_sync(model) if norm == "batchrenorm" else nn.SyncBatchNorm.convert_sync_batchnorm(model)


def save(
    path: str, step: int, **parts: nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler
) -> None:
    # The clip limits need no entry: they follow num_batches_tracked, which is in the model's state_dict.
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, path + ".part")
    os.replace(path + ".part", path)  # an interruption leaves the old file or the new one


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right in evaluation mode: normalized by running statistics."""
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(256), labels.split(256), strict=True)
    )
    model.train()
    return 100 * right / len(labels)


def export(model: nn.Module, images: Tensor, path: str) -> None:
    """Write a program that runs without brn_kernels and predicts the same."""
    model.eval()
    plain = copy.deepcopy(model)
    if brn is not None:
        plain = brn.revert_to_batchnorm(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-4)
    batch = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(plain, (images,), dynamic_shapes=(batch,)), path)
    print(f"exported with plain BatchNorm to {path}: predictions are equal")


def main() -> None:
    args = parse_args()
    distributed = "RANK" in os.environ  # torchrun sets it
    device = torch.device(args.device)
    if distributed:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    images, labels = (t.to(device) for t in made_images(4096, seed=0))
    test_images, test_labels = (t.to(device) for t in made_images(1024, seed=1))

    torch.manual_seed(args.seed)
    model = network(args.model_width, args.momentum)
    if args.norm == "batchrenorm":
        model = renormalize(model, args)
    if args.sync and distributed:
        model = synchronize(model, args.norm)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    first = 0
    if args.checkpoint and os.path.exists(args.checkpoint):
        state = torch.load(args.checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        decay.load_state_dict(state["decay"])
        first = state["step"]
        if rank == 0:
            print(f"resumed at step {first}")

    trained = model  # wrapped below; checkpoints, accuracy and export use the bare model
    if distributed:
        # DDP's default, to broadcast the first process's running statistics before every forward, matters here: Batch
        # Renormalization normalizes by them in training too, and without --sync each process's would go its own way.
        trained = nn.parallel.DistributedDataParallel(trained)
    if args.compile:
        trained = torch.compile(trained)

    start = time.perf_counter()
    last = args.steps if args.stop_at is None else min(args.stop_at, args.steps)
    for step in range(first + 1, last + 1):
        # Every process draws its own images, and a resumed training those that it would have drawn.
        generator = torch.Generator().manual_seed((args.seed * args.steps + step) * world + rank)
        batch = torch.randint(len(labels), (args.batch_size,), generator=generator).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp == "bf16"):
            loss = F.cross_entropy(trained(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if rank == 0 and (step % args.log_every == 0 or step in (1, last)):
            print(f"step {step:4d}/{args.steps}  loss {loss.item():.4f}")
        if rank == 0 and args.checkpoint and (step % args.save_every == 0 or step == last):
            save(args.checkpoint, step, model=model, optimizer=optimizer, decay=decay)

    if rank == 0:
        seconds = time.perf_counter() - start
        percent = accuracy(model, test_images, test_labels)
        print(f"test accuracy {percent:.2f} % ({args.norm}, {last} steps, processes: {world}, {seconds:.1f} s)")
        if args.export:
            export(model, test_images[:64], args.export)
    if distributed:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
